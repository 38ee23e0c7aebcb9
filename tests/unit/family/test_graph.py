"""The graph: what makes a key, what depends on what, and where artifacts lie."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cascade.errors import InputError
from cascade.family.graph import Graph, Node, StagePlan
from cascade.family.layout import build_graph
from cascade.family.pilot import pilot_recipe
from cascade.family.race import legs_of
from cascade.family.teachers import Parent
from cascade.kinds import Kind
from cascade.recipe import Recipe
from cascade.storage.locations import open_location
from tests.tiny_family import tiny_tree
from tests.unit.family.graphs import graph
from tests.unit.planning.shapes import TINY


def keys(graph: Graph) -> dict[str, str]:
    return {node.name: node.key for node in graph}


def changed(before: Graph, after: Graph) -> set[str]:
    old, new = keys(before), keys(after)
    return {name for name in old if old[name] != new.get(name)}


def with_stage(index: int, section: str, **values: Any) -> list[dict[str, Any]]:
    stages = tiny_tree(Path("parent"), Path("corpus.jsonl"))["stages"]
    stages[index][section] |= values
    return list(stages)


def test_every_node_comes_after_its_inputs_and_once() -> None:
    seen: set[str] = set()
    for node in graph():
        assert {source.key for source in node.inputs.values()} <= seen
        assert node.key not in seen
        seen.add(node.key)


def test_each_child_is_cut_from_the_one_before_and_taught_by_the_original_parent() -> None:
    family = graph()
    first, second = family.stages
    assert first.pruned.inputs["checkpoint"] is family.parent
    assert second.pruned.inputs["checkpoint"] is first.distilled
    assert second.importance.inputs["checkpoint"] is first.distilled
    assert [stage.distilled.inputs["parent"] for stage in family.stages] == [family.parent] * 2


def test_the_same_recipe_has_the_same_keys() -> None:
    assert keys(graph()) == keys(graph())


def test_changing_the_last_stage_rebuilds_only_it() -> None:
    after = graph(stages=with_stage(1, "distill", learning_rate=0.001))
    assert changed(graph(), after) == {"small/distilled", "small/evaluated"}


def test_changing_the_first_stage_rebuilds_what_follows_but_not_the_signals() -> None:
    after = graph(stages=with_stage(0, "prune", calibration_tokens=256))
    stages = {
        f"{stage}/{kind}" for stage in ("large", "small") for kind in ("importance", "pruned", "distilled")
    }
    assert changed(graph(), after) == stages | {"large/evaluated", "small/evaluated"}


def test_another_parent_or_corpus_changes_everything_it_feeds() -> None:
    everything = set(keys(graph()))
    assert changed(graph(), graph(fingerprint="c" * 64)) == everything
    assert changed(graph(), graph(source="c" * 64)) == everything - {"parent/parent"}


def test_what_does_not_change_the_result_stays_outside_the_key() -> None:
    assert changed(graph(), graph(parent="/elsewhere/parent")) == set()
    assert changed(graph(), graph(family="other")) == set()
    assert changed(graph(), graph(stages=with_stage(0, "distill", epochs=3))) == set()


def test_an_objective_and_its_weight_are_part_of_the_key_where_they_matter() -> None:
    taught = {"small/distilled", "small/evaluated"}
    plain, skewed, stated, other = (
        graph(stages=with_stage(1, "distill", **values))
        for values in (
            {},
            {"objective": "skew_kl"},
            {"objective": "skew_kl", "objective_weight": 0.1},
            {"objective": "skew_kl", "objective_weight": 0.2},
        )
    )
    assert "objective_weight" not in plain.stages[1].distilled.section["distill"]
    assert changed(plain, skewed) == taught
    assert changed(skewed, stated) == set()
    assert changed(skewed, other) == taught


def test_an_online_teacher_needs_no_signals() -> None:
    family = graph(teacher={"signals": "online"})
    assert Kind.SIGNALS not in {node.kind for node in family}
    assert "signals" not in family.stages[0].distilled.inputs


def test_the_signals_key_follows_what_is_stored_and_how() -> None:
    def key(seed: int = 0, **teacher: Any) -> str:
        signals = graph(teacher=teacher, seed=seed).signals
        assert signals is not None
        return signals.key

    different = [
        key(),
        key(precision="int8"),
        *(key(signals=name) for name in ("top_k", "sampled", "head_and_tail")),
        key(signals="head_and_tail", token_bytes=36),
        key(signals="head_and_tail", seed=1),
    ]
    assert len(set(different)) == len(different)
    section = graph().signals
    assert section is not None
    # What older stores hold stays found.
    assert section.section == {"codec": "hidden_bf16", "tokens": 20480, "held_out_tokens": 512}


def test_artifacts_lie_by_family_and_stage_and_shared_ones_apart() -> None:
    family, store = graph(), open_location("s3://bucket/prefix")

    def place(node: Node) -> str:
        return node.location(store).uri

    key = family.stages[0].distilled.key[:12]
    assert place(family.stages[0].distilled) == f"s3://bucket/prefix/tiny/large/distilled/{key}"
    assert place(family.corpus) == f"s3://bucket/prefix/shared/corpus/{family.corpus.key[:12]}"


ON_POLICY = {"tokens": 2048, "prompt_tokens": 8, "mixture": 0.25, "objective": "reverse_kl"}


def written(index: int, **values: Any) -> list[dict[str, Any]]:
    stages = tiny_tree(Path("parent"), Path("corpus.jsonl"))["stages"]
    stages[index]["on_policy"] = {**ON_POLICY, **values}
    return list(stages)


def test_what_a_child_writes_teaches_it_after_its_distillation() -> None:
    before, family = graph(), graph(stages=written(0))
    first, second = family.stages
    node = first.on_policy
    assert node
    assert node.name == "large/on_policy"
    assert node.inputs == {"student": first.distilled, "corpus": family.corpus, "parent": family.parent}
    assert node.section["writing"] == {"mixture": 0.25, "prompt_tokens": 8, "temperature": 1.0, "seed": 0}
    assert node.section["distill"]["objective"] == "reverse_kl"
    # It is what is measured, beside the child before it, and what the next child is cut from.
    assert (first.evaluated.inputs["distilled"], first.evaluated.inputs["on_policy"]) == (
        first.distilled,
        node,
    )
    assert (
        first.checkpoint
        is second.pruned.inputs["checkpoint"]
        is second.importance.inputs["checkpoint"]
        is node
    )
    assert second.on_policy is None
    assert second.checkpoint is second.distilled
    assert keys(family)["large/distilled"] == keys(before)["large/distilled"]
    assert keys(family)["parent/evaluated"] == keys(before)["parent/evaluated"]


def test_every_dial_of_the_writing_is_part_of_its_key_alone() -> None:
    before = graph(stages=written(1))
    dials = {
        "tokens": 4096,
        "mixture": 0.5,
        "prompt_tokens": 9,
        "sampling_temperature": 0.0,
        "objective": "jsd",
        "temperature": 2.0,
        "learning_rate": 0.5,
        "batch_tokens": 64,
    }
    for name, value in dials.items():
        after = graph(stages=written(1, **{name: value}))
        assert changed(before, after) == {"small/on_policy", "small/evaluated"}, name
    weighted = graph(stages=written(1, objective="jsd", objective_weight=0.9))
    assert changed(graph(stages=written(1, objective="jsd")), weighted) == {
        "small/on_policy",
        "small/evaluated",
    }


def test_an_on_policy_child_is_scored_by_its_own_teachers_running() -> None:
    models = [{"path": "parent", "weight": 0.5}, {"path": "previous", "weight": 0.5}]
    family = graph(stages=written(1), teacher={"policy": "mixture", "models": models})
    node = family.stages[1].on_policy
    assert node
    assert set(node.inputs) == {"student", "corpus", "teacher", "teacher-2"}
    assert node.inputs["teacher-2"] is family.stages[0].distilled
    assert node.section["weights"] == [0.5, 0.5]


def test_controls_are_trained_on_as_many_tokens_as_the_child_and_those_before() -> None:
    stages = written(1)
    stages[0]["on_policy"] = ON_POLICY | {"tokens": 1024}
    scratch, corpus_alone = graph(stages=stages, controls=["scratch", "ce_only"]).controls
    assert scratch.distilled.section["distill"]["tokens"] == 20480 + 1024 + 4096
    assert scratch.on_policy
    assert scratch.on_policy.section["distill"]["tokens"] == 2048
    assert corpus_alone.distilled.section["distill"]["tokens"] == 4096 + 2048
    assert corpus_alone.on_policy is None


def test_a_pilot_of_it_is_small_too() -> None:
    recipe = Recipe.model_validate({**tiny_tree(Path("p"), Path("c")), "stages": written(1)})
    stages = pilot_recipe(recipe, 1, 512).stages
    assert [stage.on_policy.tokens for stage in stages] == [0, 512]
    assert stages[1].on_policy.mixture == 0.25


def test_the_corpus_must_hold_the_prompts() -> None:
    stages = written(1, tokens=8_000_000)
    needs = graph(stages=stages).corpus.hints["needs"]
    assert {"stage": "small", "part": "on_policy", "tokens": 8_000_000, "epochs": 1} in needs


RACERS = (replace(TINY, layers=3), replace(TINY, ffn=88), replace(TINY, hidden=48))


def racing(winners: dict[str, int]) -> tuple[StagePlan, ...]:
    won = RACERS[winners.get("large", 0)]
    return StagePlan(RACERS, ()), StagePlan((replace(won, layers=2),), ())


def race_graph() -> Graph:
    recipe = Recipe.model_validate(tiny_tree(Path("parent"), Path("corpus.jsonl")))
    return build_graph(recipe, Parent("parent", "a" * 64, TINY), racing, ("b" * 64,))


def test_every_candidate_is_a_chain_of_nodes_that_share_one_calibration() -> None:
    stage = race_graph().stages[0]
    assert stage.open
    assert [candidate.architecture for candidate in stage.candidates] == list(RACERS)
    for candidate in stage.candidates:
        assert candidate.pruned.inputs["importance"] is stage.importance
        first, second = candidate.legs
        assert "raced" not in first.inputs
        assert second.inputs["raced"] is first
        assert second.section["part"] == 2 * first.section["part"]
    assert len({leg.key for candidate in stage.candidates for leg in candidate.legs}) == 6


def test_the_winner_goes_on_and_what_follows_is_planned_for_it() -> None:
    before = race_graph()
    after = before.decide("large", 2)
    stage, following = after.stages
    assert not stage.open
    assert stage.architecture == RACERS[2]
    assert stage.distilled.inputs["raced"] is stage.candidates[2].legs[-1]
    assert stage.distilled.inputs["student"] is stage.candidates[2].pruned
    assert following.architecture == replace(RACERS[2], layers=2)
    assert following.pruned.inputs["checkpoint"] is stage.distilled
    assert keys(before)["large/importance"] == keys(after)["large/importance"]
    assert {leg.key for c in before.stages[0].candidates for leg in c.legs} == {
        leg.key for c in stage.candidates for leg in c.legs
    }


def test_legs_double_and_eight_candidates_cost_less_than_a_quarter_of_training_all() -> None:
    assert legs_of(1, 1) == []
    assert legs_of(2, 4) == [0.25]
    assert legs_of(5, 16) == legs_of(8, 100) == [1 / 16, 1 / 8, 1 / 4]
    standing, spent, before = 8, 0.0, 0.0
    for part in legs_of(8, 16):
        spent, before, standing = spent + standing * (part - before), part, standing // 2
    assert standing == 1
    assert (spent + 1 - before) / 8 < 0.25


def test_a_training_too_short_for_its_legs_is_refused_with_the_steps_it_needs() -> None:
    with pytest.raises(InputError, match="needs a training of 16 steps") as caught:
        legs_of(8, 15)
    assert caught.value.value == "15 steps"
