"""A race of candidates in a real build, and stages that are cut by presets, rotations and repairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cascade.recipe import Recipe
from cascade.storage.artifacts import read_manifest
from cascade.storage.locations import open_location
from cascade.tables.races import race_rows
from tests.building import build_directly, shared_host
from tests.e2e.conftest import Command
from tests.tiny_family import tiny_tree, write_recipe

DISTILL = {"tokens": 4096, "batch_tokens": 256}


def recipe_of(parent: Path, corpus: Path, stages: dict[str, dict[str, Any]]) -> Recipe:
    tree = tiny_tree(parent, corpus)
    tree["stages"] = [
        {"name": name, "prune": {"calibration_tokens": 512, **prune}, "distill": DISTILL}
        for name, prune in stages.items()
    ]
    return Recipe.model_validate(tree)


def weights_of(index: dict[str, Any], stage: int) -> str:
    return (open_location(index["stages"][stage]["checkpoint"]) / "model.safetensors").sha256()


@pytest.fixture(scope="module")
def raced(
    tiny_parent: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    """The index of a family whose first stage races, and its store."""
    folder = tmp_path_factory.mktemp("race")
    recipe = recipe_of(
        tiny_parent, tiny_corpus, {"large": {"ratio": 0.75, "candidates": 4}, "small": {"ratio": 0.5}}
    )
    return build_directly(recipe, folder / "store", folder / "cache", host=shared_host()), folder / "store"


def test_the_race_halves_its_candidates_and_shows_their_curves(raced: tuple[dict[str, Any], Path]) -> None:
    stage, following = raced[0]["stages"]
    curves = [candidate["curve"] for candidate in stage["race"]]
    assert sorted(len(curve) for curve in curves) == [1, 1, 2, 2]
    assert {tuple(end["tokens"] for end in curve) for curve in curves} == {(512,), (512, 1024)}
    (winner,) = [candidate for candidate in stage["race"] if candidate["won"]]
    finalists = [curve[-1]["ce"] for curve in curves if len(curve) == 2]
    assert winner["curve"][-1]["ce"] == min(finalists)
    assert winner["architecture"] == stage["architecture"]
    assert following["architecture"]["layers"] <= stage["architecture"]["layers"]
    assert following["race"] == []
    assert race_rows(stage)[0][-1] == "won"
    made = [artifact["node"] for artifact in raced[0]["artifacts"]]
    assert made.count("large/importance") == 1
    assert made.count("large/pruned") == 4
    assert made.count("large/raced") == 6


def test_the_winner_ends_at_the_bits_it_would_have_had_without_a_race(
    raced: tuple[dict[str, Any], Path], tiny_parent: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    sizes = raced[0]["stages"][0]["architecture"]
    shape = {axis: sizes[axis] for axis in ("layers", "hidden", "ffn", "kv_groups", "heads_per_group")}
    changed = {axis: size for axis, size in shape.items() if size < raced_parent(raced)[axis]}
    alone = recipe_of(tiny_parent, tiny_corpus, {"large": {"shape": changed}})
    index = build_directly(alone, tmp_path / "store", tmp_path / "cache", host=shared_host())
    assert index["stages"][0]["architecture"] == sizes
    assert weights_of(index, 0) == weights_of(raced[0], 0)


def raced_parent(raced: tuple[dict[str, Any], Path]) -> dict[str, int]:
    """Sizes of the parent."""
    manifest = read_manifest(open_location(raced[0]["parent"]["uri"]))
    assert manifest
    sizes: dict[str, int] = manifest.facts["architecture"]
    return sizes


def test_show_prints_the_race(raced: tuple[dict[str, Any], Path], command: Command) -> None:
    code, said = command("show", str(raced[1] / "tiny"))
    assert code == 0, said
    assert "race of stage large" in said
    assert "CE at 512 tokens" in said
    assert "won" in said


def test_a_second_build_finds_the_race_decided(
    raced: tuple[dict[str, Any], Path], tiny_parent: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(
        tiny_parent, tiny_corpus, {"large": {"ratio": 0.75, "candidates": 4}, "small": {"ratio": 0.5}}
    )
    again = build_directly(recipe, raced[1], tmp_path / "cache")
    assert all(artifact["reused"] for artifact in again["artifacts"])
    assert again["stages"][0]["race"] == raced[0]["stages"][0]["race"]


def test_plan_prints_who_races_and_who_comes_next(
    tiny_parent: Path, tiny_corpus: Path, tmp_path: Path, command: Command
) -> None:
    tree = tiny_tree(tiny_parent, tiny_corpus)
    tree["stages"][0]["prune"]["candidates"] = 2
    code, said = command("plan", str(write_recipe(tmp_path / "race.yaml", tree)), "--cache", str(tmp_path))
    assert code == 0, said
    assert said.count("races") == 2
    assert "expected rise" in said


@pytest.mark.slow
def test_presets_rotations_and_repairs_make_children_that_pass_the_gate(
    tiny_parent: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    stages = {
        "turned": {"shape": {"hidden": 48, "ffn": 96}, "preset": "ministral3"},
        "fitted": {
            "ratio": 0.6,
            "repair": "least_squares",
            "layer_score": "logit_mse",
            "contiguous_layers": True,
        },
        "folded": {"shape": {"heads_per_group": 1, "ffn": 64}, "preset": "minitron"},
    }
    recipe = recipe_of(tiny_parent, tiny_corpus, stages)
    index = build_directly(recipe, tmp_path / "store", tmp_path / "cache", host=shared_host())
    turned, fitted, folded = index["stages"]
    assert turned["architecture"]["hidden"] < 64
    assert not turned["architecture"]["counts"]["tied"]
    assert folded["architecture"]["heads_per_group"] == 1
    for stage in (turned, fitted, folded):
        manifest = read_manifest(open_location(stage["checkpoint"]))
        assert manifest
        assert manifest.facts["gate"]["parameters"] == stage["parameters"]
        assert stage["kl_to_parent"] < stage["pruned_kl_to_parent"]


def test_memory_and_latency_are_dials_too(
    tiny_parent: Path, tiny_corpus: Path, tmp_path: Path, command: Command
) -> None:
    tree = tiny_tree(tiny_parent, tiny_corpus)
    dials = {"memory": "600kB", "memory_context": 256, "memory_precision": "float32"}
    tree["stages"] = [
        {"name": "small", "prune": dials, "distill": {"tokens": 64}},
        {"name": "fast", "prune": {"latency": 1e-6}, "distill": {"tokens": 64}},
    ]
    path = write_recipe(tmp_path / "dials.yaml", tree)
    code, said = command("plan", str(path), "--cache", str(tmp_path))
    assert code == 2
    assert "stage fast" in said
    assert "latency" in said
    tree["stages"].pop()
    code, said = command("plan", str(write_recipe(path, tree)), "--cache", str(tmp_path))
    assert code == 0, said
    assert "1 MB" in said
