"""Who teaches whom, what each teacher's signals cover, and what controls share with the family."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cascade.architecture import Architecture
from cascade.distillation.settings import derived_learning_rate
from cascade.errors import InputError
from cascade.family.forecast import stage_cost
from cascade.family.found import require_padding
from cascade.family.graph import Graph, Node, StagePlan
from cascade.family.layout import build_graph
from cascade.family.teachers import Parent
from cascade.kinds import Kind
from cascade.recipe import Recipe
from cascade.roles import Control
from cascade.tables.plan import plan_table
from tests.tiny_family import tiny_tree
from tests.unit.planning.shapes import TINY

SHAPES = tuple(replace(TINY, layers=layers) for layers in (3, 2, 1))
LARGER = replace(TINY, hidden=128)
GIVEN = {"x": Parent("x", "c" * 64, LARGER), "y": Parent("y", "d" * 64, SHAPES[0])}


def graph(teacher: dict[str, Any] | None = None, **changes: Any) -> Graph:
    """Three stages of 1000, 3000 and 2000 tokens."""
    stages = [
        {"name": f"s{place}", "prune": {"ratio": ratio}, "distill": {"tokens": tokens}}
        for place, (ratio, tokens) in enumerate(((0.8, 1000), (0.6, 3000), (0.4, 2000)))
    ]
    tree = tiny_tree(Path("parent"), Path("corpus.jsonl")) | {"stages": stages, "teacher": teacher or {}}
    recipe = Recipe.model_validate(tree | changes)
    plans = tuple(StagePlan((shape,), ()) for shape in SHAPES)
    return build_graph(recipe, Parent("p", "a" * 64, TINY), lambda _: plans, ("b" * 64,), given=GIVEN)


def taught(family: Graph) -> list[dict[str, Node]]:
    """The inputs of every stage's training that teach."""
    return [
        {role: node for role, node in stage.distilled.inputs.items() if role not in ("student", "corpus")}
        for stage in family.stages
    ]


def ordered(family: Graph) -> None:
    seen: set[str] = set()
    for node in family:
        assert {source.key for source in node.inputs.values()} <= seen
        assert node.key not in seen
        seen.add(node.key)


def test_the_child_before_teaches_from_signals_of_its_own() -> None:
    family = graph({"policy": "previous"})
    ordered(family)
    first, second, third = taught(family)
    assert first == {"parent": family.parent, "signals": family.signals}
    assert second["teacher"] is family.stages[0].distilled
    assert third["teacher"] is family.stages[1].distilled
    assert [inputs["signals"].section["tokens"] for inputs in (first, second, third)] == [1000, 3000, 2000]
    assert third["signals"].inputs["parent"] is third["teacher"]
    for stage in family.stages:
        assert stage.evaluated.inputs["parent"] is family.parent
        assert stage.evaluated.inputs["signals"] is family.signals


def test_one_given_model_teaches_all_stages_from_one_pass() -> None:
    family = graph({"policy": "model", "models": ["x"]})
    ordered(family)
    assert len({inputs["signals"].key for inputs in taught(family)}) == 1
    assert taught(family)[0]["signals"].section["tokens"] == 3000
    assert family.signals is None
    assert "signals" not in family.stages[0].evaluated.inputs
    assert [lesson.model for lesson in family.stages[0].teaching.lessons] == [LARGER, LARGER]


def test_a_chain_asks_every_model_about_its_own_stages_alone() -> None:
    family = graph({"policy": "model", "models": ["x", "y", "x"]})
    ordered(family)
    first, second, third = taught(family)
    assert first == third
    assert first["signals"].section["tokens"] == 2000
    assert second["signals"].section["tokens"] == 3000
    assert second["teacher"].hints == {"parent": "y"}


def test_a_mixture_has_a_teacher_and_signals_for_each_member() -> None:
    models = [{"path": "previous", "weight": 0.25}, {"path": "x", "weight": 0.75}]
    family = graph({"policy": "mixture", "models": models})
    ordered(family)
    first, second, _ = taught(family)
    assert list(second) == ["teacher", "signals", "teacher-2", "signals-2"]
    assert first["teacher"] is family.parent
    assert second["teacher"] is family.stages[0].distilled
    assert family.stages[1].distilled.section["weights"] == [0.25, 0.75]
    assert len(family.stages[1].teaching.teachers) == 2
    heavier = graph(
        {"policy": "mixture", "models": [{**models[0], "weight": 0.5}, {**models[1], "weight": 0.5}]}
    )
    assert heavier.stages[0].distilled.key != family.stages[0].distilled.key


def test_a_corrected_teacher_learns_at_a_fifth_of_the_rate_and_the_family_is_cut_from_the_original() -> None:
    family = graph({"correction_tokens": 500})
    ordered(family)
    corrected = taught(family)[0]["teacher"]
    assert corrected.kind is Kind.CORRECTED
    assert corrected.inputs["student"] is family.parent
    settings = corrected.section["distill"]
    assert settings["learning_rate"] == pytest.approx(derived_learning_rate(TINY.hidden) / 5)
    assert (settings["cross_entropy_weight"], settings["tokens"]) == (1.0, 500)
    assert taught(family)[0]["signals"].inputs["parent"] is corrected
    assert family.stages[0].pruned.inputs["checkpoint"] is family.parent
    assert {"stage": "teacher", "tokens": 500, "epochs": 1} in family.corpus.hints["needs"]
    lora = graph({"correction_tokens": 500, "correction": "lora"})
    rate = taught(lora)[0]["teacher"].section["distill"]["learning_rate"]
    assert rate == pytest.approx(2 * derived_learning_rate(TINY.hidden))


def test_an_online_teacher_stores_nothing_whoever_it_is() -> None:
    for teacher in (
        {},
        {"policy": "previous"},
        {"policy": "model", "models": ["x"]},
        {"correction_tokens": 9},
    ):
        family = graph({**teacher, "signals": "online"})
        ordered(family)
        assert Kind.SIGNALS not in {node.kind for node in family}


def test_controls_change_no_key_of_the_family_and_share_its_nodes() -> None:
    plain = graph()
    family = graph(controls=[control.value for control in Control])
    ordered(family)
    keys = [node.key for node in family]
    own = [node.key for node in plain]
    assert keys[: len(own)] == own
    scratch, one_shot, ce_only, random_prune = family.controls
    last = family.stages[-1]
    assert {control.architecture for control in family.controls} == {last.architecture}
    assert scratch.pruned.kind is Kind.INITIALISED
    assert one_shot.pruned.inputs["checkpoint"] is family.parent
    assert ce_only.pruned is last.pruned
    assert set(ce_only.distilled.inputs) == {"student", "corpus"}
    assert ce_only.distilled.section["distill"]["cross_entropy_weight"] == 1.0
    assert random_prune.pruned.inputs["checkpoint"] is family.stages[1].distilled
    assert random_prune.importance
    assert random_prune.importance.section["method"] == "random"
    tokens = [control.distilled.section["distill"]["tokens"] for control in family.controls]
    assert tokens == [6000, 6000, 2000, 2000]
    signals = [control.distilled.inputs.get("signals") for control in family.controls]
    assert [one and one.section["tokens"] for one in signals] == [6000, 6000, None, 3000]
    assert signals[3] is family.signals


def test_a_single_stage_is_its_own_one_shot_and_is_not_made_twice() -> None:
    stages = [{"name": "only", "prune": {"ratio": 0.8}, "distill": {"tokens": 1000}}]
    tree = tiny_tree(Path("parent"), Path("corpus.jsonl")) | {"stages": stages, "controls": ["one_shot"]}
    recipe = Recipe.model_validate(tree)
    plans = (StagePlan((SHAPES[0],), ()),)
    family = build_graph(recipe, Parent("p", "a" * 64, TINY), lambda _: plans, ("b" * 64,))
    assert family.controls[0].distilled is family.stages[0].distilled
    ordered(family)


def test_scratch_and_given_students_need_no_calibration_and_seed_what_follows() -> None:
    stages = [
        {"name": "drawn", "student": "scratch", "prune": {"ratio": 0.8}, "distill": {"tokens": 1000}},
        {"name": "given", "student": "given", "checkpoint": "y", "distill": {"tokens": 1000}},
        {"name": "cut", "prune": {"ratio": 0.4}, "distill": {"tokens": 1000}},
    ]
    family = graph(stages=stages)
    ordered(family)
    drawn, given, cut = family.stages
    assert drawn.importance is None
    assert drawn.pruned.section == {"architecture": SHAPES[0].record(), "seed": 0}
    assert drawn.pruned.inputs == {"checkpoint": family.parent}
    assert given.pruned.hints == {"parent": "y"}
    assert cut.pruned.inputs["checkpoint"] is given.distilled
    other = graph(stages=stages, seed=1)
    assert other.stages[0].pruned.key != drawn.pruned.key


def test_a_plan_has_a_row_for_every_control_and_a_line_for_every_teacher_s_signals() -> None:
    models = [{"path": "parent", "weight": 0.5}, {"path": "x", "weight": 0.5}]
    family = graph({"policy": "mixture", "models": models}, controls=["scratch", "ce_only"])
    table = plan_table(family, 1e12)
    names = list(table.columns[0].cells)
    assert names == ["parent", "s0", "s1", "s2", "s2-scratch", "s2-ce-only", "family"]
    # Both members, and again both for the control that takes the tokens of all stages.
    assert str(table.caption).count("teacher signals: ") == 4
    costs = [stage_cost(stage, TINY, family, set()) for stage in (family.stages[2], family.controls[1])]
    # The corpus costs nothing to ask.
    assert costs[1].flops < costs[0].flops


def padded(entries: int) -> Architecture:
    return replace(TINY, counts=replace(TINY.counts, vocabulary=TINY.vocabulary + entries))


@pytest.mark.parametrize(
    ("entries", "signals", "remedy"),
    [(1025, "hidden", "pad both alike"), (-1025, "online", "pad both"), (64, "top_k", "signals: hidden")],
)
def test_vocabularies_that_the_loss_would_refuse_are_refused_while_planning(
    entries: int, signals: str, remedy: str
) -> None:
    recipe = graph({"signals": signals}).recipe
    with pytest.raises(InputError, match=remedy) as caught:
        require_padding(recipe, TINY, padded(entries), "other")
    assert caught.value.where == "other"
    require_padding(recipe, TINY, TINY, "other")
    require_padding(graph().recipe, TINY, padded(1024), "other")
