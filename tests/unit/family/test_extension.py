"""Long-context branches in the graph: keys, order, what they share; and what planning refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cascade.errors import InputError
from cascade.family.extension import child_config, require_extensions, teacher_config
from cascade.family.forecast import all_signals, extended_cost
from cascade.family.graph import Graph, StagePlan
from cascade.family.layout import build_graph
from cascade.family.pilot import pilot_recipe
from cascade.family.teachers import Parent
from cascade.kinds import Kind
from cascade.models.decoder import decoder_of
from cascade.recipe import Recipe
from cascade.recipe_files import validate_recipe
from tests.architectures import tiny
from tests.tiny import make_model
from tests.tiny_family import tiny_tree
from tests.unit.planning.shapes import TINY

Tree = dict[str, Any]
EXTEND: Tree = {"sequence_length": 128, "tokens": 2048, "rope": {"type": "yarn"}}


def tree_with(*extends: Tree, **changes: Any) -> Tree:
    """The tiny family with a long-context stage for each child that has one."""
    tree = tiny_tree(Path("parent"), Path("corpus.jsonl")) | changes
    for stage, extend in zip(tree["stages"], extends, strict=False):
        stage |= {"extend": extend} if extend else {}
    return tree


def graph_of(*extends: Tree, **changes: Any) -> Graph:
    def planner(winners: dict[str, int]) -> tuple[StagePlan, ...]:
        return tuple(StagePlan((replace(TINY, layers=layers),), ()) for layers in (3, 2))

    recipe = Recipe.model_validate(tree_with(*extends, **changes))
    return build_graph(recipe, Parent("parent", "a" * 64, TINY), planner, ("b" * 64,))


def keys(graph: Graph) -> dict[str, str]:
    return {node.name: node.key for node in graph}


def test_branches_add_nodes_and_change_no_key() -> None:
    before, after = keys(graph_of()), keys(graph_of(EXTEND, {**EXTEND, "tokens": 4096}))
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {
        "large/corpus",
        "large/signals",
        "large/extended",
        "large/evaluated-long",
        "small/extended",
        "small/evaluated-long",
    }


def test_the_trunk_comes_first_and_every_node_after_its_inputs() -> None:
    graph = graph_of(EXTEND, EXTEND, controls=["ce_only"])
    order = [node.name for node in graph]
    assert order.index("small/evaluated") < order.index("large/signals") < order.index("small/extended")
    # Too little text for long rows is found before anything is trained.
    assert order.index("large/corpus") == 1
    seen: set[str] = set()
    for node in graph:
        assert {source.key for source in node.inputs.values()} <= seen
        seen.add(node.key)
    first, second = graph.extended
    assert graph.stages[1].pruned.inputs["checkpoint"] is first.extended.inputs["student"]
    assert first.extended.inputs["signals"] is second.extended.inputs["signals"]
    assert first.corpus.hints["needs"][0] == {"stage": "large", "part": "extend", "tokens": 2048, "epochs": 1}


def test_the_longest_branch_says_how_much_the_teacher_answers_for() -> None:
    graph = graph_of(EXTEND, {**EXTEND, "tokens": 4096})
    (signals,) = [node for node in graph if node.name == "large/signals"]
    assert signals.section["tokens"] == 4096
    assert [one.rows_of for one in all_signals(graph)] == [32, 128]
    online = graph_of(EXTEND, teacher={"signals": "online"})
    assert Kind.SIGNALS not in {node.kind for node in online}
    assert online.extended[0].extended.inputs.keys() == {"student", "corpus", "parent"}


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": 4096},
        {"sequence_length": 256},
        {"rope": {"theta": 5e5}},
        {"rope": {"type": "yarn", "factor": 8}},
        {"learning_rate": 0.001},
        {"batch_tokens": 512},
    ],
)
def test_what_a_branch_is_taught_by_is_part_of_its_key_and_of_no_other(changes: Tree) -> None:
    before, after = keys(graph_of(EXTEND)), keys(graph_of({**EXTEND, **changes}))
    differing = {name for name in before if before[name] != after[name]}
    assert "large/extended" in differing
    assert differing <= {"large/corpus", "large/signals", "large/extended", "large/evaluated-long"}


def test_the_parents_rope_is_part_of_what_it_says_of_long_rows_alone() -> None:
    before, after = keys(graph_of(EXTEND)), keys(graph_of(EXTEND, teacher={"rope": {"theta": 5e5}}))
    differing = {name for name in before if before[name] != after[name]}
    assert differing == {"large/signals", "large/extended", "large/evaluated-long"}


def test_the_forecast_counts_training_teacher_and_three_measurements() -> None:
    graph = graph_of(EXTEND, teacher={"signals": "online"})
    child, parent, held_out = replace(TINY, layers=3), TINY, 512
    cost = extended_cost(graph.extended[0], graph, set())
    forward = {one: one.forward_flops(128) for one in (child, parent)}
    trained = 2048 * (3 * forward[child] + forward[parent])
    measured = held_out * (2 * forward[child] + 4 * forward[parent])
    assert cost.flops == trained + measured
    assert cost.stored_bytes == child.weight_bytes()


@pytest.mark.parametrize(
    ("extend", "teacher", "words"),
    [
        ({"sequence_length": 32, "tokens": 64}, {}, "more than corpus.sequence_length"),
        ({"sequence_length": 128}, {}, "needs `tokens`"),
        ({"tokens": 64}, {}, "needs a `sequence_length`"),
        ({**EXTEND, "rope": {"factor": 4}}, {}, "belongs to a `type`"),
        ({**EXTEND, "rope": {"type": "dynamic"}}, {}, "yarn"),
        ({**EXTEND, "rope": {"type": "yarn", "factor": 1}}, {}, "greater than 1"),
        ({**EXTEND, "ropes": {}}, {}, "did you mean `rope`"),
        ({}, {"rope": {"theta": 5e5}}, "no stage has it"),
    ],
)
def test_wrong_recipes_are_refused(extend: Tree, teacher: Tree, words: str) -> None:
    with pytest.raises(InputError) as caught:
        validate_recipe(tree_with(extend, teacher=teacher), where="recipe.yaml")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("family", "extend", "teacher", "where", "words"),
    [
        ("gpt2", {}, {}, "stage large, extend.rope", "no rotary positions"),
        ("opt", {}, {}, "stage large, extend.rope", "no rotary positions"),
        ("phi3", {}, {"rope": {"theta": 5e5}}, "stage large, extend.rope, phi3", "does not take"),
        ("llama", {}, {}, "teacher.rope", "longer than the positions"),
        ("llama", {"rope": {}}, {}, "stage large, extend.rope", "longer than the positions"),
        (
            "llama",
            {"sequence_length": 128, "rope": {}},
            {"rope": {"theta": 5e5}},
            "teacher.rope",
            "stay as they are",
        ),
    ],
)
def test_planning_refuses_what_cannot_be_extended(
    family: str, extend: Tree, teacher: Tree, where: str, words: str
) -> None:
    """The tiny parents have 256 positions."""
    recipe = Recipe.model_validate(tree_with({**EXTEND, "sequence_length": 512, **extend}, teacher=teacher))
    with pytest.raises(InputError, match=words) as caught:
        require_extensions(recipe, decoder_of(tiny(family)), {})
    assert caught.value.where == where


def test_planning_accepts_what_can_and_asks_a_given_student_for_its_own_positions() -> None:
    parent, short = make_model("llama"), make_model("llama", max_position_embeddings=64)
    tree = tree_with({"sequence_length": 128, "tokens": 64})
    require_extensions(Recipe.model_validate(tree), decoder_of(parent), {})
    del tree["stages"][0]["prune"]
    tree["stages"][0] |= {"student": "given", "checkpoint": "short"}
    with pytest.raises(InputError, match="longer than the positions"):
        require_extensions(Recipe.model_validate(tree), decoder_of(parent), {"short": decoder_of(short)})


def test_settings_reach_the_config_through_a_jobs_section() -> None:
    branch = graph_of(EXTEND, teacher={"rope": {"theta": 5e5}}).extended[0]
    section = json.loads(json.dumps(branch.extended.section))
    config = make_model("llama", max_position_embeddings=64).config
    child = child_config(config, section["rope"])
    assert (child.rope_parameters["rope_type"], child.rope_parameters["factor"]) == ("yarn", 2.0)
    assert child.max_position_embeddings == 128
    teacher = teacher_config(config, section["teacher_rope"])
    assert teacher.rope_parameters == {"rope_type": "default", "rope_theta": 5e5}
    assert teacher_config(config, None) is config
    assert teacher_config(child, section["teacher_rope"]) is child


def test_a_pilot_has_no_branches() -> None:
    recipe = Recipe.model_validate(tree_with(EXTEND, teacher={"rope": {"theta": 5e5}}))
    small = pilot_recipe(recipe, 1, 1000)
    assert not any(stage.extends for stage in small.stages)
    assert Recipe.model_validate(small.model_dump())
