"""What a family will cost, from its plan alone."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from rich.table import Table

from cascade.architecture import Architecture
from cascade.dials import Prune
from cascade.distillation.signals.codecs import BfloatStates, Codec, codec_of
from cascade.family.cost import evaluation_flops, importance_flops, training_flops
from cascade.family.graph import Graph, StageNodes
from cascade.planning.cost import cost_of_cuts

# Share of the matmul rate that a whole training step reaches: SmolLM2-135M trains at about 0.6 of the
# rate of a large float32 product on 2 cores. Doubtful elsewhere: a forecast, not a promise.
STEP_EFFICIENCY = 0.6
CONTEXT_OF_CACHE = 4096


@dataclass(frozen=True)
class Cost:
    """FLOPs and stored bytes of one row of the plan."""

    flops: int
    stored_bytes: int


def parent_cost(graph: Graph) -> Cost:
    """The parent's copy, its evaluation, and its one forward pass over what the hungriest stage needs."""
    parent, length = graph.original, graph.recipe.corpus.sequence_length
    held_out, signals = graph.recipe.corpus.held_out_tokens, signals_of(graph)
    tokens = signals.tokens + signals.held_out_tokens if signals else 0
    evaluated = held_out * evaluation_flops(parent, parent, length, signals is not None)
    flops = tokens * parent.forward_flops(length) + evaluated
    return Cost(flops, parent.weight_bytes() + (signals.stored_bytes if signals else 0))


@dataclass(frozen=True)
class SignalsCost:
    """What the teacher's signals take. token_bytes: of a training token; expected where entries are drawn."""

    codec: Codec
    tokens: int
    held_out_tokens: int
    parent: Architecture

    @property
    def stored_bytes(self) -> int:
        """Of all rows; held-out rows are stored as states in bfloat16 whatever the codec."""
        exact = BfloatStates(self.parent.hidden).token_bytes()
        return round(self.tokens * self.codec.token_bytes() + self.held_out_tokens * exact)

    def __str__(self) -> str:
        about = "about " if self.codec.flat else ""
        return (
            f"teacher signals: {self.codec.name}, {about}{self.codec.token_bytes():,.0f} bytes a token, "
            f"{self.tokens:,} training and {self.held_out_tokens:,} held-out tokens: "
            f"{self.stored_bytes / 1e6:,.1f} MB"
        )


def signals_of(graph: Graph) -> SignalsCost | None:
    """What will be stored of the teacher, or None."""
    if graph.signals is None:
        return None
    section, parent = graph.signals.section, graph.original
    codec = codec_of(section, parent.hidden, parent.vocabulary)
    return SignalsCost(codec, section["tokens"], section["held_out_tokens"], parent)


def stage_cost(stage: StageNodes, seed: Architecture, graph: Graph) -> Cost:
    """Calibration of the seed, training and two evaluations of the child; two stored checkpoints."""
    recipe, parent, child = graph.recipe, graph.original, stage.architecture
    length, stored, prune = recipe.corpus.sequence_length, graph.signals is not None, stage.stage.prune
    whole = not recipe.teacher.signals.keeps_entries
    drops = stage.importance.section.get("drops", ())
    trained = stage.stage.distill.tokens
    flops = (
        prune.calibration_tokens * importance_flops(seed, prune.resolved.importance, length, drops)
        + trained * training_flops(child, parent, length, stored, whole)
        + 2 * recipe.corpus.held_out_tokens * evaluation_flops(child, parent, length, stored)
    )
    lost, states = 0.0, 0
    for leg, standing in race_legs(stage):
        # The winner's legs are part of its own training.
        shapes = [candidate.architecture for candidate in stage.candidates[1:standing]]
        lost += leg * trained * sum(training_flops(shape, parent, length, stored, whole) for shape in shapes)
        # Weights and two moments of AdamW.
        states += 3 * standing * child.weight_bytes()
    pruned = sum(candidate.architecture.weight_bytes() for candidate in stage.candidates)
    return Cost(flops + round(lost), child.weight_bytes() + pruned + states)


def race_legs(stage: StageNodes) -> list[tuple[float, int]]:
    """Of each leg of a race the share of a whole training that it adds, and how many run it."""
    legs, before, standing = [], 0.0, len(stage.candidates)
    for node in stage.candidates[0].legs:
        legs.append((node.section["part"] - before, standing))
        before, standing = node.section["part"], -(-standing // 2)
    return legs


def machine_rate() -> float:
    """Matmul FLOP/s of this machine in the training precision, best of several short runs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def plan_table(graph: Graph, rate: float) -> Table:
    """One row a model: shape, counts, memory, and what making it costs at `rate` FLOP/s."""
    signals = signals_of(graph)
    table = Table(
        title=f"plan of family {graph.recipe.family}",
        title_justify="left",
        caption=str(signals or "teacher signals: none are stored, the teacher runs beside every student"),
        caption_justify="left",
    )
    for column in ("model", "dial", *SHAPE_COLUMNS, "TFLOPs", "storage", "about"):
        table.add_column(column, justify="left" if column in ("model", "dial") else "right")
    rows: list[tuple[str, str, Architecture, Cost]] = [("parent", "", graph.original, parent_cost(graph))]
    seed = graph.original
    for stage in graph.stages:
        rows.append(
            (stage.stage.name, dial(stage.stage.prune), stage.architecture, stage_cost(stage, seed, graph))
        )
        seed = stage.architecture
    for name, setting, shape, cost in rows:
        table.add_row(name, setting, *shape_cells(shape), *cost_cells(cost, rate))
    costs = [row[3] for row in rows]
    total = Cost(sum(cost.flops for cost in costs), sum(cost.stored_bytes for cost in costs))
    table.add_section()
    table.add_row("family", "", *[""] * len(SHAPE_COLUMNS), *cost_cells(total, rate))
    return table


def ranking_table(graph: Graph) -> Table:
    """For every stage the best shapes within its budget; those that race are marked, then come the next.

    expected rise: of the cross-entropy in nats right after the cut, see `cascade.planning.cost`.
    """
    table = Table(title="shapes within each budget, cheapest cuts first", title_justify="left")
    for column in ("stage", "", *SHAPE_COLUMNS, "expected rise"):
        table.add_column(column, justify="left" if column in ("stage", "") else "right")
    for stage in graph.stages:
        candidates = [candidate.architecture for candidate in stage.candidates]
        role = "races" if len(candidates) > 1 else "chosen"
        for shape in (*candidates, *stage.runners_up):
            rise = f"{cost_of_cuts(graph.original, shape):.2f}"
            cells = shape_cells(shape)
            table.add_row(stage.stage.name, role if shape in candidates else "", *cells, rise)
        table.add_section()
    return table


def dial(prune: Prune) -> str:
    """The dial as the user set it, for tables."""
    if prune.shape.sizes():
        return ", ".join(f"{axis} {size}" for axis, size in prune.shape.sizes().items())
    texts = {
        "parameters": f"{prune.parameters or 0:,} parameters",
        "ratio": f"ratio {prune.ratio}",
        "memory": f"{(prune.memory or 0) / 1e6:,.0f} MB",
        "latency": f"{prune.latency} ms",
    }
    return next(text for name, text in texts.items() if getattr(prune, name) is not None)


SHAPE_COLUMNS = (
    "layers",
    "hidden",
    "FFN",
    "heads/KV",
    "parameters",
    "non-embedding",
    "weights",
    "KV cache 4k",
)


def shape_cells(shape: Architecture) -> list[str]:
    """The architecture and its memory in float32."""
    return [
        str(shape.layers),
        str(shape.hidden),
        f"{shape.experts} x {shape.ffn}" if shape.experts else str(shape.ffn),
        f"{shape.heads}/{shape.kv_groups}",
        f"{shape.parameters:,}",
        f"{shape.non_embedding_parameters:,}",
        megabytes(shape.weight_bytes()),
        megabytes(shape.kv_cache_bytes(CONTEXT_OF_CACHE)),
    ]


def cost_cells(cost: Cost, rate: float) -> list[str]:
    """FLOPs, bytes and the time that follows from the machine's rate."""
    seconds = cost.flops / (rate * STEP_EFFICIENCY)
    return [f"{cost.flops / 1e12:,.1f}", megabytes(cost.stored_bytes), duration(seconds)]


def megabytes(count: int) -> str:
    """Decimal megabytes."""
    return f"{count / 1e6:,.0f} MB"


def duration(seconds: float) -> str:
    """`42 s`, `3.5 min`, `2.1 h` or `5.0 d`."""
    for limit, unit, size in ((90, "s", 1), (5400, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}" if unit == "s" else f"{seconds / size:.1f} {unit}"
    return f"{seconds / 86_400:.1f} d"
