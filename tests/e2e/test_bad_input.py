"""Wrong input through the command line: exit code 2, four parts, nothing written, no secret printed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.conftest import Command
from tests.tiny import make_parent
from tests.tiny_family import tiny_tree, write_recipe

Tree = dict[str, Any]
# Longer than any file system takes.
NO_NAME = 5000 * "x"


def unknown_key(tree: Tree, folder: Path) -> list[str]:
    tree["corpus"]["sequence_lenght"] = 32
    return ["corpus.sequence_lenght", "did you mean `sequence_length`"]


def child_not_smaller(tree: Tree, folder: Path) -> list[str]:
    tree["stages"] = tree["stages"][:1]
    tree["stages"][0]["prune"] = {"parameters": 200_000}
    return ["200000", "164,544", "stage large"]


def budget_below_the_embeddings(tree: Tree, folder: Path) -> list[str]:
    tree["stages"] = tree["stages"][:1]
    tree["stages"][0]["prune"] = {"parameters": 100}
    return ["100", "stage large", "way out"]


def empty_corpus(tree: Tree, folder: Path) -> list[str]:
    (folder / "empty.jsonl").write_text("")
    tree["corpus"]["sources"] = [str(folder / "empty.jsonl")]
    return ["empty.jsonl"]


def no_such_corpus(tree: Tree, folder: Path) -> list[str]:
    tree["corpus"]["sources"] = [str(folder / "absent.jsonl")]
    return ["absent.jsonl"]


def corpus_with_no_name(tree: Tree, folder: Path) -> list[str]:
    tree["corpus"]["sources"] = [NO_NAME]
    return ["cannot be the name of a file", "xxx...xxx", "a path in the recipe"]


def parent_with_no_name(tree: Tree, folder: Path) -> list[str]:
    tree["parent"] = NO_NAME
    return ["cannot be the name of a file", "xxx...xxx"]


def no_such_field(tree: Tree, folder: Path) -> list[str]:
    (folder / "other.jsonl").write_text('{"body": "words"}\n')
    tree["corpus"]["sources"] = [str(folder / "other.jsonl")]
    return ["other.jsonl", "body"]


def short_corpus(tree: Tree, folder: Path) -> list[str]:
    tree["stages"][1]["distill"]["tokens"] = 1_000_000
    return ["1000000", "epochs: "]


def prompt_as_long_as_a_row(tree: Tree, folder: Path) -> list[str]:
    tree["stages"][1]["on_policy"] = {"tokens": 64, "prompt_tokens": 32}
    return ["stage small", "`on_policy.prompt_tokens` 32", "less than `corpus.sequence_length` 32"]


def all_is_mixture(tree: Tree, folder: Path) -> list[str]:
    tree["stages"][1]["on_policy"] = {"tokens": 64, "mixture": 1.25}
    return ["stages.1.on_policy.mixture", "less than or equal to 1", "1.25"]


def too_many_prompts(tree: Tree, folder: Path) -> list[str]:
    tree["stages"][1]["on_policy"] = {"tokens": 1_000_000}
    return ["1000000", "epochs: ", "stage small"]


def watch_without_sources(tree: Tree, folder: Path) -> list[str]:
    tree["watch"] = {"patience": 2}
    return ["watch", "`sources` says what is watched, and is empty", "`patience`"]


def watched_and_trained_on(tree: Tree, folder: Path) -> list[str]:
    again = folder / "again.jsonl"
    again.write_bytes(Path(tree["corpus"]["sources"][0]).read_bytes())
    tree["watch"] = {"sources": [str(again)]}
    return ["a watched source is trained on", "again.jsonl", "watch.sources"]


def one_of_the_watched_trained_on(tree: Tree, folder: Path) -> list[str]:
    (folder / "watched").mkdir()
    (folder / "watched" / "a.jsonl").write_bytes(Path(tree["corpus"]["sources"][0]).read_bytes())
    (folder / "watched" / "b.jsonl").write_text('{"text": "another"}\n')
    tree["watch"] = {"sources": [str(folder / "watched" / "*.jsonl")]}
    return ["a watched source is trained on", "*.jsonl", "watch.sources"]


def no_such_watched_file(tree: Tree, folder: Path) -> list[str]:
    tree["watch"] = {"sources": [str(folder / "absent.jsonl")]}
    return ["absent.jsonl", "where: watch.sources"]


def no_such_parent(tree: Tree, folder: Path) -> list[str]:
    tree["parent"] = str(folder / "absent")
    return ["absent"]


def not_a_causal_model(tree: Tree, folder: Path) -> list[str]:
    parent = folder / "bert"
    parent.mkdir()
    (parent / "config.json").write_text(
        json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]})
    )
    tree["parent"] = str(parent)
    return ["bert", "BertForMaskedLM"]


def pickled_parent(tree: Tree, folder: Path) -> list[str]:
    parent = folder / "pickled"
    parent.mkdir()
    (parent / "config.json").write_text((Path(tree["parent"]) / "config.json").read_text())
    torch.save({}, parent / "pytorch_model.bin")
    tree["parent"] = str(parent)
    return ["pytorch_model.bin", "safetensors"]


def scaled_otherwise(tree: Tree, folder: Path) -> list[str]:
    tree["parent"] = str(make_parent(folder / "hyperclovax", "hyperclovax", logits_scaling=4.0))
    return ["the LM head of hyperclovax", "logits_scaling"]


def absent_axis(tree: Tree, folder: Path) -> list[str]:
    tree["stages"][0]["prune"]["axes"] = ["experts"]
    return ["experts: it has none", "stage large"]


def odd_hidden_size(tree: Tree, folder: Path) -> list[str]:
    tree["stages"][0]["prune"] = {"shape": {"hidden": 50}}
    return ["hidden: 50", "the nearest legal sizes: 48, 52", "stage large"]


def rotated_layer_norms(tree: Tree, folder: Path) -> list[str]:
    parent = make_parent(folder / "stablelm", "starcoder2", tie_word_embeddings=False)
    tree["parent"] = str(parent)
    tree["stages"][0]["prune"] = {"ratio": 0.6, "preset": "ministral3", "axes": ["hidden"]}
    return ["LayerNorm", "starcoder2", "stage large"]


def contradicted_preset(tree: Tree, folder: Path) -> list[str]:
    tree["stages"][0]["prune"] |= {"preset": "minitron", "aggregation": "mean"}
    return ["preset minitron sets `aggregation` to l2_mean"]


def other_tokenizer(folder: Path) -> Path:
    """A small model whose tokenizer gives two tokens each other's ids."""
    model = make_parent(folder / "other", num_hidden_layers=2)
    words = json.loads((model / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (model / "tokenizer.json").write_text(json.dumps(words))
    return model


def student_with_another_tokenizer(tree: Tree, folder: Path) -> list[str]:
    model = str(other_tokenizer(folder))
    tree["stages"][1] = {"name": "b", "student": "given", "checkpoint": model, "distill": {"tokens": 64}}
    return ["different tokenizers", "2 of 258 tokens differ", model]


def teacher_with_another_tokenizer(tree: Tree, folder: Path) -> list[str]:
    model = str(other_tokenizer(folder))
    tree["teacher"] = {"policy": "model", "models": [model]}
    return ["different tokenizers", "2 of 258 tokens differ", model]


def student_no_smaller(tree: Tree, folder: Path) -> list[str]:
    tree["stages"][1] = {
        "name": "b",
        "student": "given",
        "checkpoint": tree["parent"],
        "distill": {"tokens": 64},
    }
    return ["must be smaller than the parent", "164,544", "stage b"]


def no_such_student(tree: Tree, folder: Path) -> list[str]:
    model = str(folder / "absent")
    tree["stages"][1] = {"name": "b", "student": "given", "checkpoint": model, "distill": {"tokens": 64}}
    return ["absent"]


def scratch_without_a_shape(tree: Tree, folder: Path) -> list[str]:
    tree["stages"][0] = {"name": "a", "student": "scratch", "distill": {"tokens": 64}}
    return ["stages.0", "exactly one of", "`shape`"]


def policy_model_without_one(tree: Tree, folder: Path) -> list[str]:
    tree["teacher"] = {"policy": "model"}
    return ["teacher", "policy model needs `models`"]


def correction_too_long_for_the_corpus(tree: Tree, folder: Path) -> list[str]:
    tree["teacher"] = {"correction_tokens": "2M"}
    return ["2000000", "stage teacher"]


CASES = [
    student_with_another_tokenizer,
    teacher_with_another_tokenizer,
    student_no_smaller,
    no_such_student,
    scratch_without_a_shape,
    policy_model_without_one,
    correction_too_long_for_the_corpus,
    absent_axis,
    odd_hidden_size,
    rotated_layer_norms,
    contradicted_preset,
    scaled_otherwise,
    unknown_key,
    child_not_smaller,
    budget_below_the_embeddings,
    empty_corpus,
    no_such_corpus,
    corpus_with_no_name,
    parent_with_no_name,
    no_such_field,
    short_corpus,
    prompt_as_long_as_a_row,
    all_is_mixture,
    too_many_prompts,
    watch_without_sources,
    watched_and_trained_on,
    one_of_the_watched_trained_on,
    no_such_watched_file,
    no_such_parent,
    not_a_causal_model,
    pickled_parent,
]


@pytest.mark.parametrize("spoil", CASES, ids=lambda spoil: spoil.__name__)
def test_a_wrong_recipe_is_refused_before_anything_is_written(
    spoil: Callable[[Tree, Path], list[str]],
    command: Command,
    tiny_parent: Path,
    tiny_corpus: Path,
    tmp_path: Path,
) -> None:
    tree = tiny_tree(tiny_parent, tiny_corpus)
    words = spoil(tree, tmp_path)
    recipe, store = write_recipe(tmp_path / "recipe.yaml", tree), tmp_path / "store"
    code, said = command("build", str(recipe), "--direct", "--store", str(store))
    assert code == 2, said
    # On a slow machine the corpus reports its progress first.
    assert re.search(r"^error: ", said, re.MULTILINE), said
    assert "way out: " in said
    assert "Traceback" not in said
    assert [word for word in words if word not in said] == [], said
    # A corpus is found too short by its node: the node's lease, and the build's record, were there first.
    stored = [path for path in store.rglob("*") if path.is_file() and path.parent.name != "builds"]
    assert [path for path in stored if not path.name.startswith("lease-")] == []


def closed_port(monkeypatch: pytest.MonkeyPatch, s3: str) -> tuple[str, list[str]]:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    return s3, ["127.0.0.1:9"]


def no_such_bucket(monkeypatch: pytest.MonkeyPatch, s3: str) -> tuple[str, list[str]]:
    return "s3://no-such-bucket/families", ["no-such-bucket"]


def wrong_secret(monkeypatch: pytest.MonkeyPatch, s3: str) -> tuple[str, list[str]]:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-and-wrong")
    return s3, ["credentials"]


@pytest.mark.parametrize(
    "spoil", [closed_port, no_such_bucket, wrong_secret], ids=lambda spoil: spoil.__name__
)
def test_a_store_that_cannot_be_used_is_named_at_once_and_without_secrets(
    spoil: Callable[[pytest.MonkeyPatch, str], tuple[str, list[str]]],
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    s3: str,
    tiny_parent: Path,
    tiny_corpus: Path,
    tmp_path: Path,
) -> None:
    store, words = spoil(monkeypatch, s3)
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_tree(tiny_parent, tiny_corpus))
    code, said = command("build", str(recipe), "--direct", "--store", store)
    assert code == 2, said
    assert "way out: " in said
    assert [word for word in words if word not in said] == [], said
    assert "planted-and-wrong" not in said


@pytest.mark.parametrize("name", ["show", "verify"])
def test_asking_for_what_is_not_there_is_wrong_input(name: str, command: Command, tmp_path: Path) -> None:
    code, said = command(name, str(tmp_path))
    assert code == 2
    assert str(tmp_path) in said


@pytest.mark.parametrize("name", ["show", "gc"])
def test_what_no_file_can_be_named_by_is_wrong_input(name: str, command: Command) -> None:
    code, said = command(name, NO_NAME)
    assert code == 2
    assert said.startswith("error: this cannot be the name of a file: ")
    assert "way out: choose another path" in said
    assert len(said) < 1000
