"""A real build with a long-context branch: what it starts from, what it reads, whether it helped."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cascade.errors import Interrupted
from cascade.family.build import build, run_options
from cascade.family.index import read_index
from cascade.family.job import Job
from cascade.family.plan import plan_family
from cascade.family.runner import Outcome
from cascade.recipe import Options, Recipe
from cascade.report import SILENT
from cascade.storage.artifacts import read_manifest
from cascade.storage.locations import open_location
from tests.building import shared_host
from tests.e2e.conftest import Command
from tests.tiny import make_parent
from tests.tiny_family import tiny_tree, write_recipe

Tree = dict[str, Any]
YARN = {"type": "yarn"}


@pytest.fixture(scope="module")
def short_parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent that was made for rows of 64 tokens."""
    return make_parent(tmp_path_factory.mktemp("short") / "parent", max_position_embeddings=64)


def extended_tree(parent: Path, corpus: Path) -> Tree:
    """Two children of rows of 64 tokens; both are extended to rows of 256, the second in another way."""
    tree = tiny_tree(parent, corpus)
    tree["corpus"]["sequence_length"] = 64
    tree["teacher"] = {"rope": YARN}
    for stage, rope in zip(tree["stages"], (YARN, {"theta": 80_000}), strict=True):
        stage["distill"] = {"tokens": 4096, "batch_tokens": 256, "learning_rate": 0.003}
        stage["extend"] = {"sequence_length": 256, "tokens": 8192, "batch_tokens": 512, "rope": rope}
    return tree


def built(tree: Tree, folder: Path, stop_at: str = "") -> Tree:
    """Build without Prefect; stop_at: a node at which the build is interrupted."""
    recipe = Recipe.model_validate(tree)
    run = run_options(recipe, str(folder / "store"), Options(cache=str(folder / "cache")))

    def make(job: Job) -> Outcome:
        if job.name == stop_at:
            raise Interrupted("stopped", where="here", remedy="none")
        return shared_host().run(job, SILENT)

    return build(plan_family(recipe, folder / "cache"), run, make)


def test_a_family_with_long_contexts(
    short_parent: Path, tiny_corpus: Path, tmp_path: Path, command: Command
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", extended_tree(short_parent, tiny_corpus))
    store = str(tmp_path / "store")
    code, said = command("plan", str(recipe))
    assert code == 0
    assert "large extended" in said
    assert "to 256, yarn" in said
    assert "to 256, theta 80,000" in said
    assert "rows of 256" in said
    assert "rows of 64" in said
    code, said = command("build", str(recipe), "--direct", "--store", store)
    assert code == 0, said
    assert "long contexts of family tiny" in said
    index = read_index(open_location(store) / "tiny")
    names = [artifact["node"] for artifact in index["artifacts"]]
    # The trunk comes first, and its next stage is cut from the short child.
    assert names.index("small/evaluated") < names.index("large/extended") < names.index("small/extended")
    first, second = index["extended"]
    short = index["stages"][0]["checkpoint"]
    manifest = read_manifest(open_location(first["checkpoint"]))
    assert manifest
    assert manifest.inputs["student"].uri == short
    small = read_manifest(open_location(index["stages"][1]["checkpoint"]))
    cut = read_manifest(open_location(small.inputs["student"].uri)) if small else None
    assert cut
    assert cut.inputs["checkpoint"].uri == short
    # One pass of the teacher over the long rows serves both branches.
    assert names.count("large/signals") == names.count("large/corpus") == 1
    assert "small/signals" not in names
    for branch in index["extended"]:
        assert branch["sequence_length"] == branch["max_position_embeddings"] == 256
        assert branch["kl_to_parent"] < branch["before_kl_to_parent"]
        assert branch["tokens_trained"] == 8192
    assert first["rope_parameters"]["rope_type"] == "yarn"
    assert second["rope_parameters"] == {"rope_type": "default", "rope_theta": 80_000}
    config = AutoConfig.from_pretrained(first["checkpoint"])
    assert config.rope_parameters == first["rope_parameters"]
    assert AutoConfig.from_pretrained(short).max_position_embeddings == 64
    entries = [entry["name"] for entry in index["ledger"]["entries"]]
    assert entries == ["shared", "large", "small", "large extended", "small extended"]
    assert index["ledger"]["over_floor"] > 1
    code, said = command("show", f"{store}/tiny")
    assert code == 0
    assert "yarn x 4" in said
    assert "CE extended" in said
    code, said = command("show", f"{store}/tiny", "--json")
    assert json.loads(said)["extended"] == index["extended"]
    again = built(extended_tree(short_parent, tiny_corpus), tmp_path)
    assert all(artifact["reused"] for artifact in again["artifacts"])
    assert all(branch["reused"] for branch in again["extended"])


def test_figures_are_what_stock_transformers_computes_on_long_rows(
    short_parent: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    """Of the extended child as stored, and of the parent with the recipe's settings written in by hand."""
    tree = extended_tree(short_parent, tiny_corpus)
    tree["stages"] = tree["stages"][:1]
    tree["corpus"] |= {"held_out_tokens": 1024, "separate_documents": False}
    tree["teacher"]["signals"] = "online"
    index = built(tree, tmp_path)
    (branch,) = index["extended"]
    manifest = read_manifest(open_location(branch["checkpoint"]))
    assert manifest
    assert "signals" not in manifest.inputs
    rows = load_file(Path(manifest.inputs["corpus"].uri) / "held_out.safetensors")["tokens"][:4].long()
    yarn = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 10_000.0,
    }
    for folder, changed, figure in (
        (branch["checkpoint"], {}, "held_out_ce"),
        (index["stages"][0]["checkpoint"], yarn, "before_held_out_ce"),
        (str(short_parent), yarn, "parent_held_out_ce"),
    ):
        config = AutoConfig.from_pretrained(folder)
        if changed:
            config.rope_parameters, config.max_position_embeddings = dict(changed), 256
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float64)
        with torch.no_grad():
            logits = model(input_ids=rows).logits[:, :-1].flatten(0, 1)
        ce = torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten())
        assert math.isclose(ce.item(), branch[figure], rel_tol=1e-5), figure
    assert AutoTokenizer.from_pretrained(branch["checkpoint"]).model_max_length >= 256


@pytest.mark.slow
def test_a_branch_is_resumed_after_the_trunk(short_parent: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    tree = extended_tree(short_parent, tiny_corpus)
    with pytest.raises(Interrupted):
        built(tree, tmp_path, stop_at="large/extended")
    index = read_index(open_location(str(tmp_path / "store")) / "tiny")
    assert [stage["name"] for stage in index["stages"]] == ["large", "small"]
    assert index["extended"] == []
    index = built(tree, tmp_path)
    assert len(index["extended"]) == 2
    made = {artifact["node"] for artifact in index["artifacts"] if not artifact["reused"]}
    assert made == {
        "large/extended",
        "large/evaluated-long",
        "small/extended",
        "small/evaluated-long",
    }
    # Another length makes other branches, and nothing else.
    for stage in tree["stages"]:
        stage["extend"] |= {"sequence_length": 128}
    made = {artifact["node"] for artifact in built(tree, tmp_path)["artifacts"] if not artifact["reused"]}
    assert {"large/corpus", "large/signals", "large/extended", "small/extended"} <= made
    assert not {"large/distilled", "small/distilled", "parent/corpus"} & made
