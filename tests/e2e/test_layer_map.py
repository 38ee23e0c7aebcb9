"""Families whose children learn from several layers, or from relations: which ones, and to the same bits."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cascade.family.graph import Graph, Node
from cascade.family.origins import cuts_between
from cascade.family.plan import plan_family
from cascade.recipe import Recipe
from cascade.storage.artifacts import read_manifest
from cascade.storage.locations import open_location
from cascade.storage.manifest import Manifest
from tests.tiny import make_parent
from tests.tiny_family import tiny_tree, write_recipe
from tests.waiting import LONG, wait_until

LAYERS, TOKENS = 6, 2048
WAYS: dict[str, dict[str, Any]] = {
    "layers": {"hidden_states": "mse", "hidden_states_layers": 2},
    "relations": {"hidden_states": "relations"},
}


@pytest.fixture(scope="module")
def deep_parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parent(tmp_path_factory.mktemp("deep") / "parent", num_hidden_layers=LAYERS)


def tree_of(parent: Path, corpus: Path, **distill: Any) -> dict[str, Any]:
    """Two children, the second cut from the first, which lost layers and channels."""
    tree = tiny_tree(parent, corpus)
    tree["teacher"] = {"signals": "online"}
    shapes = {"large": {"layers": 5, "hidden": 48, "kv_groups": 1}, "small": {"layers": 3, "hidden": 32}}
    tree["stages"] = [
        {
            "name": name,
            "prune": {"shape": shape, "calibration_tokens": 512},
            "distill": {"tokens": TOKENS, "batch_tokens": 64, **distill},
        }
        for name, shape in shapes.items()
    ]
    return tree


def graph_of(tree: dict[str, Any], cache: Path) -> Graph:
    return plan_family(Recipe.model_validate(tree), cache)


def cut_stages(node: Node) -> list[str]:
    return [made.name for name, made in node.inputs.items() if name.startswith("cut")]


@pytest.mark.parametrize("way", WAYS)
def test_the_cuts_between_teacher_and_student_are_inputs(
    deep_parent: Path, tiny_corpus: Path, tmp_path: Path, way: str
) -> None:
    def graph(**changes: Any) -> Graph:
        return graph_of(tree_of(deep_parent, tiny_corpus, **WAYS[way]) | changes, tmp_path)

    by_parent = graph(controls=["scratch", "one_shot"])
    assert cut_stages(by_parent.stages[0].distilled) == ["large/pruned"]
    assert cut_stages(by_parent.stages[1].distilled) == ["small/pruned", "large/pruned"]
    scratch, one_shot = by_parent.controls
    assert cut_stages(scratch.distilled) == []
    assert cut_stages(one_shot.distilled) == ["small-one-shot/pruned"]
    before = graph(teacher={"signals": "online", "policy": "previous"})
    assert cut_stages(before.stages[1].distilled) == ["small/pruned"]
    corrected = graph(teacher={"signals": "online", "correction_tokens": 512})
    assert cut_stages(corrected.stages[1].distilled) == ["small/pruned", "large/pruned"]
    other = make_parent(tmp_path / "other", seed=4, num_hidden_layers=LAYERS + 1)
    by_other = graph(teacher={"signals": "online", "policy": "model", "models": [{"path": str(other)}]})
    assert cut_stages(by_other.stages[1].distilled) == []
    # What compares second-to-last layers alone asks for no cuts, and keeps the keys it had.
    plain = graph_of(tree_of(deep_parent, tiny_corpus, hidden_states="mse"), tmp_path)
    assert cut_stages(plain.stages[1].distilled) == []
    assert cuts_between(plain.stages[1].pruned, plain.parent) == [
        plain.stages[1].pruned,
        plain.stages[0].pruned,
    ]


@pytest.mark.parametrize("way", WAYS)
def test_a_race_and_a_long_context_stage_have_the_same_map(
    deep_parent: Path, tiny_corpus: Path, tmp_path: Path, way: str
) -> None:
    tree = tree_of(deep_parent, tiny_corpus, **WAYS[way])
    tree["stages"][1]["prune"] = {"ratio": 0.4, "candidates": 2, "axes": ["layers", "ffn"]}
    tree["stages"][1]["extend"] = {"sequence_length": 64, "tokens": 256}
    graph = graph_of(tree, tmp_path)
    expected = ["small/pruned", "large/pruned"]
    for candidate in graph.stages[1].candidates:
        assert [cut_stages(leg) for leg in candidate.legs] == [expected] * len(candidate.legs)
        assert candidate.legs[0].inputs["cut"] is candidate.pruned
    assert cut_stages(graph.extended[0].extended) == expected


def build_in_a_process(recipe: Path, store: Path, cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cascade.cli", "build", str(recipe), "--store", str(store), "--direct"]
    options = ["--cache", str(cache), "--checkpoint-seconds", "0"]
    return subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def index_of(store: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((store / "tiny" / "family.json").read_text())
    return found


def manifest(uri: str) -> Manifest:
    found = read_manifest(open_location(uri))
    assert found
    return found


@pytest.fixture(scope="module")
def built(deep_parent: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a recipe and of the store that it was built in, and what was said.

    The first child is taught by relations, the second by two layers.
    """
    folder = tmp_path_factory.mktemp("built")
    tree = tree_of(deep_parent, tiny_corpus)
    for stage, way in zip(tree["stages"], ("relations", "layers"), strict=True):
        stage["distill"] |= WAYS[way]
    recipe = write_recipe(folder / "recipe.yaml", tree)
    process = build_in_a_process(recipe, folder / "store", folder / "cache")
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    return folder, output


@pytest.mark.slow
def test_layers_meet_those_they_come_from(built: tuple[Path, str]) -> None:
    folder, output = built
    uris = {one["node"]: one["uri"] for one in index_of(folder / "store")["artifacts"]}
    large, kept = (manifest(uris[f"{name}/pruned"]).facts["kept"]["layers"] for name in ("large", "small"))
    origin = large[kept[0]]
    # By depth it would be another.
    assert origin != 1
    for named in (f"4 with {large[4]}", f"0 with {origin}, 1 with {LAYERS - 2}"):
        assert f"compares layers of student and teacher, counted from 0: {named}\n" in output


@pytest.mark.slow
def test_the_children_learn_them(built: tuple[Path, str]) -> None:
    stages = index_of(built[0] / "store")["stages"]
    for stage, cuts in zip(stages, ({"cut"}, {"cut", "cut-2"}), strict=True):
        lines = (Path(stage["checkpoint"]) / "steps.jsonl").read_text().splitlines()
        terms = [json.loads(line)["hidden_states"] for line in lines]
        assert 0 < sum(terms[-5:]) < 0.9 * sum(terms[:5])
        assert cuts == {name for name in manifest(stage["checkpoint"]).inputs if name.startswith("cut")}


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 1], ids=["relations", "layers"])
def test_a_build_that_is_stopped_ends_at_the_same_bits(
    built: tuple[Path, str], tmp_path: Path, place: int
) -> None:
    folder, _ = built
    store = tmp_path / "store"
    arguments = (folder / "recipe.yaml", store, tmp_path / "cache")
    stage = index_of(folder / "store")["stages"][place]
    process = build_in_a_process(*arguments)
    kept = f"tiny/{stage['name']}/training/{Path(stage['checkpoint']).name}/step-*"
    assert wait_until(lambda: any(store.glob(kept)) or process.poll() is not None, rest=0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=LONG)
    assert process.returncode == 143, output
    assert not list(store.glob(f"tiny/{stage['name']}/distilled/*/manifest.json"))
    process = build_in_a_process(*arguments)
    output, _ = process.communicate(timeout=LONG)
    assert process.returncode == 0, output
    assert "resumed after step" in output
    expected, found = (
        open_location(index_of(where)["stages"][place]["checkpoint"]) for where in (folder / "store", store)
    )
    for name in ("model.safetensors", "config.json"):
        assert (found / name).sha256() == (expected / name).sha256()
