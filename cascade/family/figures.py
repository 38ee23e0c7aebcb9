"""Held-out figures of finished models, against the parent."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from cascade.evaluation.metrics import evaluate
from cascade.family.cost import teacher_flops
from cascade.family.models import shape_of, the_model
from cascade.family.teaching import held_out_rows, the_teacher
from cascade.family.workplace import Result, Workplace

METRICS = "metrics.json"


def make_evaluated(place: Workplace) -> Result:
    """Held-out figures of every checkpoint among the inputs, against the parent."""
    states = ("pruned", "distilled", "on_policy")
    return figures(place, [name for name in states if name in place.job.inputs] or ["parent"])


def make_evaluated_long(place: Workplace) -> Result:
    """Figures on held-out long rows: the short child with the new RoPE settings, the extended one, the
    parent."""
    return figures(place, ["distilled", "extended", "parent"])


def figures(place: Workplace, names: list[str]) -> Result:
    """Held-out figures of these inputs, against the parent."""
    corpus = place.corpus()
    rows = held_out_rows(corpus, place.job.section["held_out_tokens"])
    teacher, parent = the_teacher(place, corpus)
    facts: dict[str, Any] = {}
    flops, length = 0, corpus.sequence_length
    tokens = rows * length
    for name in names:
        model = the_model(place, name)
        facts[name] = asdict(evaluate(model, teacher, corpus, range(rows), report=place.report))
        flops += tokens * shape_of(model).forward_flops(length)
    (place.folder / METRICS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    parents = tokens * len(names) * teacher_flops(parent, length, "signals" in place.job.inputs)
    return Result(facts, tokens * len(names), flops + parents, teacher_flops=parents)
