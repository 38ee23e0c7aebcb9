"""A hidden-state loss from a recipe: a deep cut with an online teacher, and recipes that cannot have one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from cascade.family.cost import inner_flops, student_flops, teacher_flops
from cascade.family.forecast import extended_cost, stage_cost
from cascade.family.plan import plan_family
from cascade.models.decoder import decoder_of
from cascade.recipe import Recipe
from cascade.storage.artifacts import read_manifest
from cascade.storage.locations import open_location
from tests.e2e.conftest import Command
from tests.tiny_family import tiny_tree, write_recipe

TOKENS = 2048


def tree_of(parent: Path, corpus: Path, layers: int = 2, **distill: Any) -> dict[str, Any]:
    """A child of so many of the parent's layers and half of its channels, taught online."""
    tree = tiny_tree(parent, corpus)
    tree["teacher"] = {"signals": "online"}
    tree["stages"] = [
        {
            "name": "small",
            "prune": {"shape": {"layers": layers, "hidden": 32}, "calibration_tokens": 512},
            "distill": {"tokens": TOKENS, "batch_tokens": 256, **distill},
        }
    ]
    return tree


def section_of(tree: dict[str, Any], cache: Path) -> dict[str, Any]:
    """The settings of the child's training, as planned."""
    found: dict[str, Any] = plan_family(Recipe.model_validate(tree), cache).stages[0].distilled.section
    return {name: value for name, value in found["distill"].items() if "hidden" in name}


def test_it_is_on_by_itself_for_a_shallow_child_alone(
    tiny_parent: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    layers = AutoModelForCausalLM.from_pretrained(tiny_parent).config.num_hidden_layers
    cosine = {"hidden_states": "cosine", "hidden_states_weight": 1.0}
    assert section_of(tree_of(tiny_parent, tiny_corpus, layers // 2), tmp_path) == cosine
    assert section_of(tree_of(tiny_parent, tiny_corpus, layers // 2 + 1), tmp_path) == {}
    off = tree_of(tiny_parent, tiny_corpus, layers // 2, hidden_states=False)
    assert section_of(off, tmp_path) == {}
    stored = tree_of(tiny_parent, tiny_corpus, layers // 2)
    stored["teacher"] = {"signals": "hidden"}
    assert section_of(stored, tmp_path) == {}
    mse = {"hidden_states": "mse", "hidden_states_weight": 2.0}
    assert section_of(tree_of(tiny_parent, tiny_corpus, layers // 2 + 1, **mse), tmp_path) == mse
    several = {**mse, "hidden_states_layers": 2}
    assert section_of(tree_of(tiny_parent, tiny_corpus, layers // 2 + 1, **several), tmp_path) == several
    relations = {"hidden_states": "relations", "hidden_states_weight": 1.0}
    one = tree_of(tiny_parent, tiny_corpus, 1, hidden_states="relations")
    assert section_of(one, tmp_path) == relations


def test_an_extended_child_is_taught_as_its_short_one(
    tiny_parent: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    for dials in ({}, {"hidden_states": "cosine"}, {"hidden_states": "off"}):
        tree = tree_of(tiny_parent, tiny_corpus, **dials)
        tree["stages"][0]["extend"] = {"sequence_length": 64, "tokens": 256}
        graph = plan_family(Recipe.model_validate(tree), tmp_path)
        short, long = graph.stages[0].distilled.section, graph.extended[0].extended.section
        assert long["distill"].get("hidden_states") == short["distill"].get("hidden_states")


def test_auto_is_off_for_a_child_of_one_layer(tiny_parent: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    assert section_of(tree_of(tiny_parent, tiny_corpus, 1), tmp_path) == {}


def test_a_control_without_a_teacher_has_no_states_to_compare(
    tiny_parent: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    tree = tree_of(tiny_parent, tiny_corpus, hidden_states="cosine") | {"controls": ["ce_only"]}
    (control,) = plan_family(Recipe.model_validate(tree), tmp_path).controls
    assert "hidden_states" not in control.distilled.section["distill"]


def test_a_weight_of_a_loss_that_is_off_is_refused(tiny_parent: Path, tiny_corpus: Path) -> None:
    tree = tree_of(tiny_parent, tiny_corpus, hidden_states="off", hidden_states_weight=3)
    with pytest.raises(ValueError, match="`hidden_states_weight` has no effect"):
        Recipe.model_validate(tree)
    for kind in ("off", "relations"):
        tree = tree_of(tiny_parent, tiny_corpus, hidden_states=kind, hidden_states_layers=2)
        with pytest.raises(ValueError, match="`hidden_states_layers` has no effect"):
            Recipe.model_validate(tree)


def test_the_forecast_counts_the_map_as_the_manifest_does(
    tiny_parent: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    def costs(**dials: Any) -> tuple[int, int]:
        tree = tree_of(tiny_parent, tiny_corpus, 3, **dials)
        tree["stages"][0]["extend"] = {"sequence_length": 64, "tokens": 256}
        graph = plan_family(Recipe.model_validate(tree), tmp_path)
        stage, seed, branch = graph.stages[0], graph.original, graph.extended[0]
        return stage_cost(stage, seed, graph, set()).flops, extended_cost(branch, graph, set()).flops

    plain = costs(hidden_states="off")
    # Forward and backward through a map of 32 x 64, or 128 channels against those of half a row; the parent's
    # 128 only forward.
    for dials, tokens in (
        ({"hidden_states": "mse"}, (6 * 32 * 64, 6 * 32 * 64)),
        ({"hidden_states": "mse", "hidden_states_layers": 2}, (12 * 32 * 64, 12 * 32 * 64)),
        ({"hidden_states": "relations"}, (4 * 128 * 32, 4 * 128 * 64)),
    ):
        more = tuple(on - off for on, off in zip(costs(**dials), plain, strict=True))
        assert more == (TOKENS * tokens[0], 256 * tokens[1]), dials


def test_a_child_learns_the_states_inside_its_teacher(
    tiny_parent: Path, tiny_corpus: Path, tmp_path: Path, command: Command
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tree_of(tiny_parent, tiny_corpus))
    store = tmp_path / "store"
    done = command(
        "build", str(recipe), "--store", str(store), "--direct", "--cache", str(tmp_path / "cache")
    )
    assert done[0] == 0, done[1]
    stage = json.loads((store / "tiny" / "family.json").read_text())["stages"][0]
    folder = next(store.rglob("distilled/*/steps.jsonl")).parent
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert 0 < steps[-1]["hidden_states"] < steps[0]["hidden_states"]
    child = decoder_of(AutoModelForCausalLM.from_pretrained(folder)).architecture
    parent = decoder_of(AutoModelForCausalLM.from_pretrained(tiny_parent)).architecture
    made = read_manifest(open_location(str(folder)))
    assert made
    expected = student_flops(child, 32) + teacher_flops(parent, 32, stored=False)
    expected += 6 * child.hidden * parent.hidden
    assert inner_flops(child, parent, 32, {"hidden_states": "mse"}) == 6 * child.hidden * parent.hidden
    assert made.flops == TOKENS * expected
    assert stage["held_out_ce"] < stage["pruned_held_out_ce"]


@pytest.mark.parametrize(
    "teacher",
    [
        {"signals": "hidden"},
        {"signals": "top_k"},
        {
            "signals": "online",
            "policy": "mixture",
            "models": [{"path": "parent", "weight": 0.5}, {"path": "m", "weight": 0.5}],
        },
    ],
)
def test_a_teacher_that_cannot_show_its_states_is_refused(
    tiny_parent: Path, tiny_corpus: Path, tmp_path: Path, command: Command, teacher: dict[str, Any]
) -> None:
    tree = tree_of(tiny_parent, tiny_corpus, hidden_states="cosine") | {"teacher": teacher}
    recipe = write_recipe(tmp_path / "recipe.yaml", tree)
    done = command("build", str(recipe), "--store", str(tmp_path / "store"), "--direct")
    assert done[0] == 2
    assert "signals: online" in done[1]
    assert not (tmp_path / "store").exists()


def test_a_child_of_one_layer_is_refused(
    tiny_parent: Path, tiny_corpus: Path, tmp_path: Path, command: Command
) -> None:
    tree = tree_of(tiny_parent, tiny_corpus, layers=1, hidden_states="mse")
    recipe = write_recipe(tmp_path / "recipe.yaml", tree)
    done = command("plan", str(recipe))
    assert done[0] == 2
    assert "second-to-last" in done[1]


def test_more_pairs_than_a_child_has_layers_are_refused(
    tiny_parent: Path, tiny_corpus: Path, tmp_path: Path, command: Command
) -> None:
    tree = tree_of(tiny_parent, tiny_corpus, 3, hidden_states="mse", hidden_states_layers=3)
    done = command("plan", str(write_recipe(tmp_path / "recipe.yaml", tree)))
    assert done[0] == 2
    assert "stage small, distill.hidden_states_layers" in done[1]
    assert "ask for at most 2" in done[1]


def test_relations_of_a_class_without_known_queries_are_refused(
    tiny_parent: Path,
    tiny_corpus: Path,
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cascade.distillation.attention_parts.chosen", lambda found: ([], None))
    tree = tree_of(tiny_parent, tiny_corpus, hidden_states="relations")
    done = command("plan", str(write_recipe(tmp_path / "recipe.yaml", tree)))
    assert done[0] == 2
    assert "queries, keys and values cannot be told apart" in done[1]
    assert "distill.hidden_states" in done[1]
