"""The one dial of a stage, resolved into a count that a child may not exceed."""

from __future__ import annotations

from dataclasses import dataclass

from cascade.architecture import Architecture
from cascade.errors import InputError


@dataclass(frozen=True)
class Budget:
    """At most `limit` parameters, counted with or without the embeddings; `dial` is what the user wrote."""

    limit: int
    embeddings: bool
    dial: str

    def spent(self, architecture: Architecture) -> int:
        """What `architecture` counts against the limit."""
        return architecture.parameters if self.embeddings else architecture.non_embedding_parameters

    def dial_for(self, architecture: Architecture, original: Architecture) -> str:
        """The dial's value that asks for exactly `architecture`, ready for an error's remedy."""
        if self.embeddings:
            return f"parameters: {architecture.parameters}"
        share = architecture.non_embedding_parameters / original.non_embedding_parameters
        # Rounded up: rounding down would ask for less than this shape and fail again.
        return f"ratio: {-(-share * 10**4 // 1) / 10**4:g}"


def resolve_budget(original: Architecture, *, parameters: int | None, ratio: float | None) -> Budget:
    """The budget of one child.

    parameters: the child's total. ratio: the share of the ORIGINAL parent's non-embedding parameters.
    Raises InputError when both or none are given, or when one is out of range.
    """
    where = "prune"
    if parameters is not None and ratio is not None:
        raise InputError(
            "two dials set the size of one child",
            value=f"parameters: {parameters}, ratio: {ratio:g}",
            where=where,
            remedy="keep one of `parameters` and `ratio`",
        )
    if parameters is not None:
        if parameters < 1:
            raise InputError("a child needs parameters", value=parameters, where=where, remedy="ask for more")
        return Budget(parameters, embeddings=True, dial=f"parameters: {parameters}")
    if ratio is None:
        raise InputError("no size is set for the child", where=where, remedy="set `parameters` or `ratio`")
    if not 0 < ratio < 1:
        raise InputError(
            "the ratio is the share of the parent that stays",
            value=f"ratio: {ratio:g}",
            where=where,
            remedy="set a number between 0 and 1, such as 0.85",
        )
    limit = int(ratio * original.non_embedding_parameters)
    return Budget(limit, embeddings=False, dial=f"ratio: {ratio:g}")
