"""Families of parents whose logits are capped or scaled, with other objectives than the default."""

from __future__ import annotations

from pathlib import Path

import pytest

from cascade.recipe import Recipe
from tests.building import build_directly, shared_host
from tests.tiny import make_parent
from tests.tiny_family import tiny_tree


@pytest.mark.parametrize(
    ("family", "logits", "objective"),
    [
        ("gemma2", {"final_logit_softcapping": 3.0}, {"objective": "jsd", "objective_weight": 0.3}),
        ("granite", {"logits_scaling": 0.25}, {"objective": "skew_kl"}),
    ],
)
def test_a_child_of_such_a_parent_learns(
    tiny_corpus: Path, tmp_path: Path, family: str, logits: dict[str, float], objective: dict[str, object]
) -> None:
    tree = tiny_tree(make_parent(tmp_path / "parent", family, **logits), tiny_corpus)
    tree["stages"] = tree["stages"][1:]
    tree["stages"][0]["distill"] |= objective
    index = build_directly(
        Recipe.model_validate(tree), tmp_path / "store", tmp_path / "cache", host=shared_host()
    )
    (stage,) = index["stages"]
    # A random parent predicts no text, so that only the distance to it must fall.
    assert 0 < stage["kl_to_parent"] < stage["pruned_kl_to_parent"]
