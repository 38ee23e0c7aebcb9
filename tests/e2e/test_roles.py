"""Real builds with other students, other teachers and controls, and what their ledgers say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cascade.architecture import Architecture
from cascade.models.folders import load_folder
from cascade.recipe import Recipe
from cascade.storage.artifacts import read_manifest
from cascade.storage.locations import open_location
from cascade.storage.manifest import Manifest
from tests.building import build_directly, shared_host
from tests.e2e.conftest import Command
from tests.tiny import make_parent
from tests.tiny_family import tiny_tree

DISTILL = {"tokens": 2048, "batch_tokens": 256, "learning_rate": 0.003}
CUT = {"ratio": 0.6, "calibration_tokens": 512}
Index = dict[str, Any]


def tree_of(parent: Path, corpus: Path, *stages: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A recipe whose stages are `DISTILL` unless they say otherwise."""
    named = [{"name": f"s{place}", "distill": DISTILL, **stage} for place, stage in enumerate(stages, 1)]
    return {**tiny_tree(parent, corpus), "stages": named, **changes}


def built(tree: dict[str, Any], folder: Path) -> Index:
    return build_directly(Recipe.model_validate(tree), folder / "store", folder / "cache", host=shared_host())


def manifest(uri: str) -> Manifest:
    found = read_manifest(open_location(uri))
    assert found
    return found


def artifact(index: Index, node: str) -> Manifest:
    """The manifest of the only artifact of that name."""
    (uri,) = [one["uri"] for one in index["artifacts"] if one["node"] == node]
    return manifest(uri)


def names(index: Index) -> list[str]:
    return [one["node"] for one in index["artifacts"]]


def weights(uri: str) -> dict[str, torch.Tensor]:
    return load_file(Path(uri) / "model.safetensors")


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model with the tiny parent's tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "small"
    return make_parent(folder, seed=7, num_hidden_layers=2, intermediate_size=96)


def test_given_and_scratch_students_are_taught_and_cut_further(
    tiny_parent: Path, tiny_corpus: Path, small_model: Path, tmp_path: Path
) -> None:
    tree = tree_of(
        tiny_parent,
        tiny_corpus,
        {"student": "scratch", "prune": {"shape": {"layers": 3, "ffn": 96}}},
        {"student": "given", "checkpoint": str(small_model)},
        {"prune": {"shape": {"ffn": 64}, "calibration_tokens": 512}},
    )
    index = built(tree, tmp_path)
    scratch, given, cut = index["stages"]
    for stage in index["stages"]:
        assert stage["kl_to_parent"] < stage["pruned_kl_to_parent"]
    assert (scratch["architecture"]["layers"], scratch["architecture"]["ffn"]) == (3, 96)
    assert (given["architecture"]["layers"], given["architecture"]["ffn"]) == (2, 96)
    assert (cut["architecture"]["layers"], cut["architecture"]["ffn"]) == (2, 64)
    assert "s1/initialised" in names(index)
    assert not {"s1/importance", "s2/importance", "s2/pruned"} & set(names(index))
    taken = artifact(index, "s2/given")
    assert taken.facts["parameters"] == given["parameters"]
    assert artifact(index, "s3/pruned").inputs["checkpoint"].uri == given["checkpoint"]
    # The class's own initialisation, and nothing of the parent.
    start = artifact(index, "s1/distilled").inputs["student"].uri
    values = weights(start)["model.layers.0.mlp.up_proj.weight"]
    assert values.std().item() == pytest.approx(0.02, rel=0.1)
    assert built(tree, tmp_path)["stages"] == [{**stage, "reused": True} for stage in index["stages"]]


def test_the_child_before_teaches(tiny_parent: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    stages = ({"prune": {"ratio": 0.8, "calibration_tokens": 512}}, {"prune": CUT})
    tree = tree_of(tiny_parent, tiny_corpus, *stages, teacher={"policy": "previous"})
    index = built(tree, tmp_path)
    first, second = (manifest(stage["checkpoint"]) for stage in index["stages"])
    assert first.inputs["parent"].uri == index["parent"]["uri"]
    assert second.inputs["teacher"].uri == index["stages"][0]["checkpoint"]
    assert names(index).count("parent/signals") == 2
    signals = manifest(second.inputs["signals"].uri)
    assert signals.inputs["parent"].uri == index["stages"][0]["checkpoint"]
    # The distance is to the parent all the same.
    evaluated = artifact(index, "s2/evaluated")
    assert evaluated.inputs["parent"].uri == index["parent"]["uri"]
    assert evaluated.inputs["signals"].key == first.inputs["signals"].key
    # One pass of each teacher over its own stage is the floor of this policy.
    assert index["ledger"]["over_floor"] > 1


@pytest.mark.parametrize("signals", ["hidden", pytest.param("online", marks=pytest.mark.slow)])
def test_given_models_teach_alone_or_together(
    tiny_parent: Path, tiny_corpus: Path, small_model: Path, tmp_path: Path, signals: str
) -> None:
    half = [{"path": "parent", "weight": 0.25}, {"path": str(small_model), "weight": 0.75}]
    alone = tree_of(
        tiny_parent,
        tiny_corpus,
        {"prune": CUT},
        teacher={"policy": "model", "models": [str(small_model)], "signals": signals},
    )
    mixed = {**alone, "teacher": {"policy": "mixture", "models": half, "signals": signals}}
    one, both = built(alone, tmp_path), built(mixed, tmp_path)
    (first,), (second,) = (
        [manifest(stage["checkpoint"]) for stage in index["stages"]] for index in (one, both)
    )
    assert set(first.inputs) - {"signals"} == {"student", "corpus", "teacher"}
    assert set(second.inputs) - {"signals", "signals-2"} == {"student", "corpus", "teacher", "teacher-2"}
    assert second.inputs["teacher"].uri == both["parent"]["uri"]
    assert second.inputs["teacher-2"].uri == first.inputs["teacher"].uri
    assert ("signals-2" in second.inputs) == (signals == "hidden")
    # The parent has a say in one of them.
    assert both["stages"][0]["kl_to_parent"] < one["stages"][0]["kl_to_parent"]
    assert 0 < first.teacher_flops < second.teacher_flops < second.flops


@pytest.mark.slow
def test_a_chain_of_given_models_has_one_for_each_stage(
    tiny_parent: Path, tiny_corpus: Path, small_model: Path, tmp_path: Path
) -> None:
    stages = ({"prune": {"ratio": 0.8, "calibration_tokens": 512}}, {"prune": CUT})
    teacher = {"policy": "model", "models": ["parent", str(small_model)], "signals": "online"}
    index = built(tree_of(tiny_parent, tiny_corpus, *stages, teacher=teacher), tmp_path)
    first, second = (manifest(stage["checkpoint"]) for stage in index["stages"])
    assert first.inputs["parent"].uri == index["parent"]["uri"]
    assert second.inputs["teacher"].uri == artifact_uri(index, "parent/given")


def artifact_uri(index: Index, node: str) -> str:
    (uri,) = [one["uri"] for one in index["artifacts"] if one["node"] == node]
    return str(uri)


@pytest.mark.parametrize("how", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_corrected_teacher_knows_the_corpus_better_and_teaches(
    tiny_parent: Path, tiny_corpus: Path, tmp_path: Path, how: str
) -> None:
    if how == "lora":
        pytest.importorskip("peft")
    teacher = {"correction_tokens": 8192, "correction": how}
    index = built(tree_of(tiny_parent, tiny_corpus, {"prune": CUT}, teacher=teacher), tmp_path)
    corrected = artifact(index, "parent/corrected")
    assert corrected.facts["last"]["loss"] < corrected.facts["first"]["loss"]
    assert corrected.facts["last"]["loss"] == pytest.approx(corrected.facts["last"]["ce"])
    assert corrected.facts["gate"]["parameters"] == index["parent"]["parameters"]
    assert corrected.teacher_flops == corrected.flops > 0
    uri = artifact_uri(index, "parent/corrected")
    before, after = weights(index["parent"]["uri"]), weights(uri)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "model.layers.0.mlp.up_proj.weight" in moved
    assert ("model.embed_tokens.weight" in moved) == (how == "full")
    load_folder(Path(uri))
    child = manifest(index["stages"][0]["checkpoint"])
    assert child.inputs["teacher"].uri == uri
    assert manifest(child.inputs["signals"].uri).inputs["parent"].uri == uri
    # The student is cut from the original all the same.
    assert artifact(index, "s1/pruned").inputs["checkpoint"].uri == index["parent"]["uri"]


@pytest.fixture(scope="module")
def controlled(
    tiny_parent: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Index, Path]:
    """A family that was built and then got all controls."""
    folder = tmp_path_factory.mktemp("controls")
    stages = ({"prune": {"ratio": 0.8, "calibration_tokens": 512}}, {"prune": CUT})
    tree = tree_of(tiny_parent, tiny_corpus, *stages, seed=3)
    built(tree, folder)
    tree["controls"] = ["scratch", "one_shot", "ce_only", "random_prune"]
    return built(tree, folder), folder


def test_controls_add_to_a_family_and_change_nothing_of_it(controlled: tuple[Index, Path]) -> None:
    index, _ = controlled
    assert all(stage["reused"] for stage in index["stages"])
    made = {one["node"].partition("/")[0] for one in index["artifacts"] if not one["reused"]}
    # What takes the tokens of all stages asks the teacher about more of the corpus.
    assert made == {"parent", "s2-scratch", "s2-one-shot", "s2-ce-only", "s2-random-prune"}
    assert [one["node"] for one in index["artifacts"] if not one["reused"]].count("parent/signals") == 1


def test_controls_have_the_shape_of_the_last_child_and_differ_in_one_thing(
    controlled: tuple[Index, Path],
) -> None:
    index, _ = controlled
    child = index["stages"][-1]
    rows = {row["control"]: row for row in index["controls"]}
    assert list(rows) == ["scratch", "one_shot", "ce_only", "random_prune"]
    for row in rows.values():
        assert row["architecture"] == child["architecture"]
        assert (row["of"], row["seed"]) == ("s2", 3)
        difference = row["held_out_ce"] - child["held_out_ce"]
        assert row["held_out_ce_difference"] == pytest.approx(difference)
        assert row["checkpoint"] != child["checkpoint"]
    assert [rows[name]["tokens_trained"] for name in rows] == [4096, 4096, 2048, 2048]
    inputs = {name: manifest(row["checkpoint"]).inputs for name, row in rows.items()}
    assert "initialised" in inputs["scratch"]["student"].uri
    one_shot = manifest(inputs["one_shot"]["student"].uri)
    assert one_shot.inputs["checkpoint"].uri == index["parent"]["uri"]
    own = manifest(child["checkpoint"]).inputs
    assert inputs["ce_only"] == {name: own[name] for name in ("student", "corpus")}
    drawn = manifest(inputs["random_prune"]["student"].uri)
    assert drawn.inputs["checkpoint"].uri == index["stages"][0]["checkpoint"]
    assert manifest(drawn.inputs["importance"].uri).spec["method"] == "random"
    assert rows["ce_only"]["kl_to_parent"] > child["kl_to_parent"]
    last = manifest(rows["ce_only"]["checkpoint"]).facts["last"]
    assert last["loss"] == pytest.approx(last["ce"])


def test_build_and_show_print_controls_and_ledger(controlled: tuple[Index, Path], command: Command) -> None:
    index, folder = controlled
    uri = f"{folder}/store/tiny"
    code, said = command("show", uri)
    assert code == 0, said
    assert "controls of stage s2" in said
    assert "worse by" in said
    assert all(row["name"] in said for row in index["controls"])
    code, said = command("show", uri, "--ledger")
    assert code == 0, said
    assert "s2/distilled" in said
    assert "separate: each child with an online teacher" in said
    code, said = command("show", uri, "--json")
    assert json.loads(said)["ledger"]["floor_flops"] == index["ledger"]["floor_flops"]
    code, said = command("show", index["stages"][0]["checkpoint"], "--ledger")
    assert code == 2
    assert "no ledger" in said


def test_the_ledger_adds_up_and_its_bounds_are_what_they_say(controlled: tuple[Index, Path]) -> None:
    index, _ = controlled
    ledger, length = index["ledger"], 32
    lines = [node for entry in ledger["entries"] for node in entry["nodes"]]
    assert sorted(line["name"] for line in lines) == sorted(names(index))
    for figure in ("tokens", "flops", "teacher_flops", "bytes"):
        whole = sum(line[figure] for line in lines)
        assert ledger["family"][figure] + ledger["controls"][figure] == whole
    manifests = [manifest(one["uri"]) for one in index["artifacts"]]
    assert sum(line["flops"] for line in lines) == sum(one.flops for one in manifests)
    shapes = [Architecture.from_record(stage["architecture"]) for stage in index["stages"]]
    original = Architecture.from_record(manifest(index["parent"]["uri"]).facts["architecture"])
    students = sum(3 * 2048 * shape.forward_flops(length) for shape in shapes)
    once = 2048 * original.forward_flops(length)
    assert ledger["floor_flops"] == students + once
    assert ledger["separate_flops"] == students + 2 * once
    assert ledger["over_floor"] == ledger["family"]["flops"] / (students + once)
