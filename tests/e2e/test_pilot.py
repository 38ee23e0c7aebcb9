"""A pilot through the command line: the same children, taught by two policies on a small budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Command
from tests.tiny_family import tiny_tree, write_recipe

Tree = dict[str, Any]


@pytest.fixture
def tree(tiny_parent: Path, tiny_corpus: Path) -> Tree:
    return tiny_tree(tiny_parent, tiny_corpus)


@pytest.mark.slow
def test_a_pilot_compares_policies_and_writes_a_table(tree: Tree, tmp_path: Path, command: Command) -> None:
    first = write_recipe(tmp_path / "parent.yaml", tree)
    tree["teacher"] = {"policy": "previous"}
    tree["stages"][1]["distill"]["objective"] = "reverse_kl"
    second = write_recipe(tmp_path / "previous.yaml", tree)
    store = tmp_path / "store"
    code, said = command("pilot", str(first), str(second), "--tokens", "1k", "--store", str(store))
    assert code == 0, said
    table = json.loads((store / "tiny-pilot" / "pilot.json").read_text())
    assert [policy["differs"] for policy in table["policies"]] == [
        {"teacher.policy": "parent", "stages.1.distill.objective": "forward_kl"},
        {"teacher.policy": "previous", "stages.1.distill.objective": "reverse_kl"},
    ]
    large, small = zip(*(policy["stages"] for policy in table["policies"]), strict=True)
    # The first child has the parent for a teacher either way.
    assert large[0]["held_out_ce"] == large[1]["held_out_ce"]
    assert small[0]["held_out_ce"] != small[1]["held_out_ce"]
    for stage in (*large, *small):
        assert stage["tokens_trained"] == 1024
    assert "stages.1.distill.objective" in said
    assert f"{small[1]['held_out_ce']:.3f}" in said
    # The family itself is not touched.
    assert not (store / "tiny").exists()
    code, said = command("verify", str(store))
    assert code == 0, said


def other_shape(tree: Tree) -> list[str]:
    tree["stages"][1]["prune"]["ratio"] = 0.4
    return ["other shapes", "recipes 1 and 2"]


def other_seed(tree: Tree) -> list[str]:
    tree["seed"] = 5
    return ["other corpus or seed"]


@pytest.mark.parametrize("change", [other_shape, other_seed])
def test_recipes_that_do_not_compare_are_refused(
    tree: Tree, tmp_path: Path, command: Command, change: Any
) -> None:
    first = write_recipe(tmp_path / "a.yaml", tree)
    words = change(tree)
    second = write_recipe(tmp_path / "b.yaml", tree)
    store = str(tmp_path / "store")
    code, said = command("pilot", str(first), str(second), "--tokens", "1k", "--store", store)
    assert code == 2
    assert [word for word in words if word not in said] == []
    code, said = command("pilot", str(first), "--tokens", "1k", "--store", store)
    assert (code, "two or more recipes" in said) == (2, True)
    code, said = command("pilot", str(first), str(first), "--tokens", "many", "--store", store)
    assert (code, "--tokens" in said) == (2, True)
