"""The plan of a family: its models with what they cost, and the shapes within each budget."""

from __future__ import annotations

from rich.table import Table

from cascade.architecture import Architecture
from cascade.family.forecast import NO_SIGNALS, Cost, all_signals, extended_cost, parent_cost, stage_cost
from cascade.family.graph import ExtendedNodes, Graph, StageNodes
from cascade.models.positions import RopeType
from cascade.planning.cost import cost_of_cuts
from cascade.pruning.repair import Repair
from cascade.recipe import Stage
from cascade.roles import Control, Student

# Share of the matmul rate that a whole training step reaches: SmolLM2-135M trains at about 0.6 of the
# rate of a large float32 product on 2 cores. Doubtful elsewhere: a forecast, not a promise.
STEP_EFFICIENCY = 0.6
CONTEXT_OF_CACHE = 4096


def plan_table(graph: Graph, rate: float) -> Table:
    """One row a model: shape, counts, memory, and what making it costs at `rate` FLOP/s."""
    signals = all_signals(graph)
    table = Table(
        title=f"plan of family {graph.recipe.family}",
        title_justify="left",
        caption="\n".join(map(str, signals)) or NO_SIGNALS,
        caption_justify="left",
    )
    for column in ("model", "dial", *SHAPE_COLUMNS, "TFLOPs", "storage", "about"):
        table.add_column(column, justify="left" if column in ("model", "dial") else "right")
    rows: list[tuple[str, str, Architecture, Cost]] = [("parent", "", graph.original, parent_cost(graph))]
    seed, before, made = graph.original, graph.original, {node.key for node in graph.trunk}
    for stage in (*graph.stages, *graph.controls):
        start = control_seed(stage, graph.original, before) if stage.control else seed
        cost = stage_cost(stage, start, graph, made)
        rows.append((stage.stage.name, dial(stage.stage), stage.architecture, cost))
        if not stage.control:
            seed, before = stage.architecture, seed
    for branch in graph.extended:
        shape, cost = branch.child.architecture, extended_cost(branch, graph, made)
        rows.append((branch.name, rope_text(branch), shape, cost))
    for name, setting, shape, cost in rows:
        table.add_row(name, setting, *shape_cells(shape), *cost_cells(cost, rate))
    costs = [row[3] for row in rows]
    total = Cost(sum(cost.flops for cost in costs), sum(cost.stored_bytes for cost in costs))
    table.add_section()
    table.add_row("family", "", *[""] * len(SHAPE_COLUMNS), *cost_cells(total, rate))
    return table


def control_seed(stage: StageNodes, original: Architecture, before: Architecture) -> Architecture:
    """What a control is cut from: the parent, or what the last child is cut from."""
    return original if stage.control is Control.ONE_SHOT else before


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
        fitted = stage.stage.prune.resolved.repair is Repair.LEAST_SQUARES
        for shape in (*candidates, *stage.runners_up):
            cut = stage.stage.student is Student.PRUNED
            rise = f"{cost_of_cuts(graph.original, shape, fitted=fitted):.2f}" if cut else ""
            cells = shape_cells(shape)
            table.add_row(stage.stage.name, role if shape in candidates else "", *cells, rise)
        table.add_section()
    return table


def dial(stage: Stage) -> str:
    """The dial, or the checkpoint, as the user set it, for tables."""
    if stage.checkpoint:
        return stage.checkpoint
    prune = stage.prune
    if prune.shape.sizes():
        return ", ".join(f"{axis} {size}" for axis, size in prune.shape.sizes().items())
    texts = {
        "parameters": f"{prune.parameters or 0:,} parameters",
        "ratio": f"ratio {prune.ratio}",
        "memory": f"{(prune.memory or 0) / 1e6:,.0f} MB",
        "latency": f"{prune.latency} ms",
    }
    return next(text for name, text in texts.items() if getattr(prune, name) is not None)


def rope_text(branch: ExtendedNodes) -> str:
    """What a child is extended to and by which settings, for tables: `to 256, yarn 4`."""
    rope = branch.child.stage.extend.rope
    scaling = f"{rope.type.value} {rope.factor or ''}".strip() if rope.type is not RopeType.NONE else ""
    theta = f"theta {rope.theta:,.0f}" if rope.theta is not None else ""
    return ", ".join(text for text in (f"to {branch.length:,}", scaling, theta) if text)


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
