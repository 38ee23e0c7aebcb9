"""A family whose teacher's signals are a head and a sampled tail, from the recipe to the evaluated child."""

from __future__ import annotations

from pathlib import Path

import pytest

from cascade.family.index import read_index
from cascade.recipe import Recipe
from cascade.storage.artifacts import require_manifest
from cascade.storage.locations import Location, open_location
from tests.building import build_directly
from tests.e2e.conftest import Command
from tests.tiny_family import tiny_tree, write_recipe


def build_into(recipe: Recipe, store: str, cache: Path) -> dict[str, str]:
    """Digests of the child's files, but for what holds times."""
    build_directly(recipe, store, cache)
    (stage,) = read_index(open_location(f"{store}/tiny"))["stages"]
    child = open_location(stage["checkpoint"])
    return {name: (child / name).sha256() for name in child.walk() if name.endswith(".safetensors")}


def signals_in(store: Location) -> Location:
    (name,) = (store / "shared" / "signals").children()
    return store / "shared" / "signals" / name


@pytest.fixture
def tree(tiny_parent: Path, tiny_corpus: Path) -> dict[str, object]:
    found = tiny_tree(tiny_parent, tiny_corpus)
    return {**found, "teacher": {"signals": "head_and_tail"}, "stages": found["stages"][:1]}


@pytest.mark.slow
def test_a_bucket_and_a_folder_hold_the_same_child_and_the_facts(
    s3: str, tree: dict[str, object], tmp_path: Path, command: Command
) -> None:
    recipe = Recipe.model_validate(tree)
    children = [
        build_into(recipe, store, tmp_path / name)
        for name, store in (("one", s3), ("two", str(tmp_path / "store")))
    ]
    assert children[0] == children[1]
    place = signals_in(open_location(s3))
    facts = require_manifest(place).facts
    assert facts["codec"] == "head_and_tail"
    # The header of a tiny shard is a part of its bytes.
    assert 20 < facts["bytes_per_token"] < 25
    assert 0 < facts["weights_rms"] < 1
    # Training reads shards from the bucket one by one; nothing but them and the manifest is left there.
    copies = {path.name for path in (tmp_path / "one").glob("signals-*/*")}
    assert copies == set(place.walk()) - {"manifest.json"}
    assert not open_location(f"{s3}/tiny/parent/training").exists()
    code, said = command("verify", s3)
    assert code == 0, said


def test_plan_prints_the_bytes_before_anything_runs(
    tree: dict[str, object], tmp_path: Path, command: Command
) -> None:
    code, said = command("plan", str(write_recipe(tmp_path / "recipe.yaml", dict(tree))))
    assert code == 0, said
    assert "teacher signals: head_and_tail, 23 bytes a token" in " ".join(said.split())
