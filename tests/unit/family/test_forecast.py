"""The plan's figures for the teacher's signals."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from cascade.family.cost import teacher_flops
from cascade.family.forecast import parent_cost, signals_of, stage_cost
from cascade.tables.plan import plan_table
from tests.unit.family.graphs import graph
from tests.unit.planning.shapes import TINY

TRAINED, HELD_OUT = 20480, 512


def printed(**teacher: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(plan_table(graph(teacher=teacher), rate=1e9))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize(
    ("teacher", "token_bytes"),
    [
        ({}, 2 * TINY.hidden),
        ({"precision": "int8"}, TINY.hidden + 4),
        ({"signals": "top_k"}, 24),
        ({"signals": "head_and_tail"}, 23),
        ({"signals": "sampled", "token_bytes": 48}, 48),
    ],
)
def test_the_plan_counts_the_bytes_of_the_codec(teacher: dict[str, Any], token_bytes: int) -> None:
    family = graph(teacher=teacher)
    assert family.signals
    signals = signals_of(family.signals, family.original)
    assert signals.stored_bytes == TRAINED * token_bytes + HELD_OUT * 2 * TINY.hidden
    assert parent_cost(family).stored_bytes == TINY.weight_bytes() + signals.stored_bytes
    said = printed(**teacher)
    assert f"{teacher.get('signals', 'hidden')}" in said
    assert f"{token_bytes} bytes a token" in said
    assert f"{TRAINED:,} training" in said


def test_the_plan_says_when_nothing_is_stored() -> None:
    assert graph(teacher={"signals": "online"}).signals is None
    assert "none are stored" in printed(signals="online")


def test_kept_entries_need_no_head_of_the_teacher() -> None:
    head = 2 * TINY.hidden * TINY.vocabulary
    assert teacher_flops(TINY, 32, stored=True) == head
    assert teacher_flops(TINY, 32, stored=True, whole=False) == 0

    def training(**teacher: Any) -> int:
        family = graph(teacher=teacher)
        return stage_cost(family.stages[0], TINY, family, {node.key for node in family.trunk}).flops

    assert training() - training(signals="head_and_tail") == TRAINED * head
