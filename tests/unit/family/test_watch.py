"""A watched corpus in the graph: what it makes anew, what it leaves alone, and what it costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cascade.data.packing import pack_watched
from cascade.errors import InputError
from cascade.family.forecast import parent_cost, stage_cost, watch_flops
from cascade.family.graph import Graph, StagePlan
from cascade.family.layout import build_graph
from cascade.family.teachers import Parent
from cascade.kinds import Kind
from cascade.recipe import Recipe
from cascade.storage.locations import open_location
from cascade.tables.family import state_text
from tests.tiny import make_tokenizer
from tests.tiny_family import tiny_tree
from tests.unit.planning.shapes import TINY

PLANS = (replace(TINY, layers=3), replace(TINY, layers=2))
OTHER = {"sources": ["other.jsonl"]}


def graph(watch: dict[str, Any] | None = None, content: str = "c" * 64, **changes: Any) -> Graph:
    tree = tiny_tree(Path("parent"), Path("corpus.jsonl")) | changes
    tree |= {"watch": watch} if watch else {}
    return build_graph(
        Recipe.model_validate(tree),
        Parent("parent", "a" * 64, TINY),
        lambda _: tuple(StagePlan((shape,), ()) for shape in PLANS),
        ("b" * 64,),
        watched=(content,) if watch else (),
    )


def keys(graph: Graph) -> dict[str, str]:
    return {node.name: node.key for node in graph}


def changed(before: Graph, after: Graph) -> set[str]:
    old, new = keys(before), keys(after)
    return {name for name in old if old[name] != new.get(name)}


CHILDREN = {
    f"{stage}/{kind}"
    for stage, kind in (
        ("large", "distilled"),
        ("large", "evaluated"),
        *(("small", kind) for kind in ("importance", "pruned", "distilled", "evaluated")),
    )
}


def test_a_watch_makes_children_anew_and_what_follows_but_nothing_else() -> None:
    plain, watched = graph(), graph(OTHER)
    assert changed(plain, watched) == CHILDREN
    assert set(keys(watched)) - set(keys(plain)) == {"parent/watched"}
    nodes = list(watched)
    assert nodes.index(watched.watched) < nodes.index(watched.stages[0].distilled)
    assert watched.watched.kind is Kind.WATCHED
    assert "/shared/watched/" in watched.watched.location(open_location("/store")).uri
    assert "watched" not in watched.stages[0].evaluated.inputs


@pytest.mark.parametrize("dial", [{"every": 2}, {"patience": 5}, {"tokens": 128}], ids=str)
def test_every_dial_is_part_of_the_children_s_keys(dial: dict[str, Any]) -> None:
    assert changed(graph(OTHER), graph(OTHER | dial)) == CHILDREN


def test_other_text_is_packed_anew_and_its_place_does_not_matter() -> None:
    assert changed(graph(OTHER), graph(OTHER, content="d" * 64)) == CHILDREN | {"parent/watched"}
    assert changed(graph(OTHER), graph({"sources": ["elsewhere.jsonl"]})) == set()


def test_a_default_that_is_derived_is_the_number_itself() -> None:
    """20480 tokens in steps of 256 are 80 steps, 4096 are 16; a tenth of them, rounded up."""
    watched = graph(OTHER)
    sections = [stage.distilled.section["watch"] for stage in watched.stages]
    assert [section["every"] for section in sections] == [8, 2]
    assert {(section["tokens"], section["patience"]) for section in sections} == {(8192, 3)}
    assert changed(watched, graph(OTHER | {"every": 8})) == CHILDREN - {
        "large/distilled",
        "large/evaluated",
    } - {
        "small/importance",
        "small/pruned",
    }


def test_the_part_that_the_child_writes_is_watched_and_corrections_and_long_contexts_are_not() -> None:
    stages = tiny_tree(Path("parent"), Path("corpus.jsonl"))["stages"]
    stages[0]["extend"] = {"sequence_length": 128, "tokens": 2048}
    stages[1]["on_policy"] = {"tokens": 2048, "batch_tokens": 64}
    found = graph(OTHER, stages=stages, teacher={"correction_tokens": 64}, controls=["ce_only"])
    watched = {node.name for node in found if "watched" in node.inputs}
    assert watched == {"large/distilled", "small/distilled", "small/on_policy", "small-ce-only/distilled"}
    assert {node.name for node in found if "watch" in node.section} == watched
    assert found.extended
    assert found.stages[0].teaching.lessons
    assert found.stages[1].on_policy.section["watch"]["every"] == 4


def test_legs_of_a_race_are_not_watched_and_the_winner_is() -> None:
    stages = tiny_tree(Path("parent"), Path("corpus.jsonl"))["stages"]
    recipe = Recipe.model_validate(
        tiny_tree(Path("parent"), Path("corpus.jsonl")) | {"watch": OTHER, "stages": stages[:1]}
    )
    found = build_graph(
        recipe,
        Parent("parent", "a" * 64, TINY),
        lambda _: (StagePlan(PLANS, ()),),
        ("b" * 64,),
        watched=("c" * 64,),
    )
    assert [leg.kind for leg in found.stages[0].candidates[0].legs] == [Kind.RACED]
    assert {node.name for node in found if "watch" in node.section} == {"large/distilled"}


def test_a_plan_counts_the_measurements() -> None:
    plain, watched = graph(), graph(OTHER | {"tokens": 100, "every": 7})
    # 80 steps are measured 12 times on 4 rows of 32.
    expected = 12 * 128 * PLANS[0].forward_flops(32)
    assert watch_flops(watched.stages[0].distilled, PLANS[0], 32) == expected
    costs = [stage_cost(one.stages[0], TINY, one, set()).flops for one in (plain, watched)]
    assert costs[1] - costs[0] == expected
    assert parent_cost(plain) == parent_cost(watched)


def test_all_of_a_watched_corpus_is_held_out_and_the_seed_does_not_matter() -> None:
    packed = pack_watched(["abcdefg", "hijklmn", "opq"], make_tokenizer(), sequence_length=8)
    assert packed.train.shape == (0, 8)
    assert packed.held_out.shape == (2, 8)
    assert packed.facts()["held_out_documents"] == 3
    with pytest.raises(InputError, match="4 tokens do not fill one sequence of 8"):
        pack_watched(["opq"], make_tokenizer(), sequence_length=8)


def test_a_table_marks_an_early_end() -> None:
    found = {"stopped_early": True, "best_tokens": 4096}
    assert (
        state_text({"reused": False, "watched": {"distilled": found}}) == "made, stopped early: best at 4,096"
    )
    assert (
        state_text({"reused": True, "watched": {"distilled": found | {"stopped_early": False}}}) == "reused"
    )
    # An index from before there was a watch.
    assert state_text({"reused": True}) == "reused"
