"""The dial of a stage, resolved into what a child may not exceed.

Every measure is linear in the FFN size, so that the planner finds the widest FFN by division.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from cascade.architecture import Architecture
from cascade.errors import InputError

Measure = Callable[[Architecture], float]


@dataclass(frozen=True)
class Budget:
    """At most `limit` of what `measure` finds.

    unit: what is counted, for a person. dial: what the user wrote. ask: the dial that asks for just so much.
    per_embedding: what one parameter of the embeddings counts.
    """

    limit: float
    measure: Measure
    unit: str
    dial: str
    ask: Callable[[float], str]
    per_embedding: int = 0

    def below(self, architecture: Architecture) -> Budget:
        """The same with a limit that `architecture` just misses."""
        limit = self.measure(architecture) * (1 - 1e-9)
        return replace(self, limit=limit, dial=self.ask(limit))

    def dial_for(self, architecture: Architecture) -> str:
        """The dial that asks for exactly `architecture`, ready for an error's remedy."""
        return self.ask(self.measure(architecture))


def parameter_budget(parameters: int) -> Budget:
    """The child's parameters in total, embeddings included; raises InputError below 1."""
    in_range(parameters >= 1, "a child needs parameters", f"parameters: {parameters}", "ask for more")

    def ask(count: float) -> str:
        return f"parameters: {count:.0f}"

    return Budget(parameters, lambda shape: shape.parameters, "parameters", ask(parameters), ask, 1)


def ratio_budget(original: Architecture, ratio: float) -> Budget:
    """A share of the ORIGINAL parent's non-embedding parameters; raises InputError outside (0, 1)."""
    what, remedy = "the ratio is the share of the parent that stays", "set a number between 0 and 1"
    in_range(0 < ratio < 1, what, f"ratio: {ratio:g}", remedy)
    whole = original.non_embedding_parameters

    def ask(count: float) -> str:
        # Rounded up: rounding down would ask for less than this shape and fail again.
        return f"ratio: {-(-count / whole * 10**4 // 1) / 10**4:g}"

    def measure(shape: Architecture) -> float:
        return shape.non_embedding_parameters

    return Budget(int(ratio * whole), measure, "non-embedding parameters", f"ratio: {ratio:g}", ask)


def memory_budget(limit: int, context: int, bytes_per_value: int) -> Budget:
    """Bytes of the weights and of one sequence's KV cache at `context` tokens; raises InputError below 1."""
    in_range(limit >= 1, "a child needs memory", f"memory: {limit}", "ask for more")

    def ask(count: float) -> str:
        return f"memory: {-(-count // 1):.0f}"

    def measure(shape: Architecture) -> float:
        return shape.weight_bytes(bytes_per_value) + shape.kv_cache_bytes(context, bytes_per_value)

    unit = f"bytes of weights and a KV cache of {context:,} tokens"
    return Budget(limit, measure, unit, ask(limit), ask, bytes_per_value)


def latency_budget(limit: float, measure: Measure) -> Budget:
    """Milliseconds of a forward pass, as a model of this machine predicts them (see evaluation.latency)."""
    in_range(limit > 0, "a forward pass takes time", f"latency: {limit:g}", "ask for more")

    def ask(milliseconds: float) -> str:
        return f"latency: {-(-milliseconds * 10**3 // 1) / 10**3:g}"

    return Budget(limit, measure, "ms of a forward pass", f"latency: {limit:g}", ask)


def in_range(valid: bool, what: str, value: str, remedy: str) -> None:
    """Raise InputError unless a dial's value is valid."""
    if not valid:
        raise InputError(what, value=value, where="prune", remedy=remedy)
