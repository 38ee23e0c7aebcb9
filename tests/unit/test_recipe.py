"""The recipe: what it accepts, how it refuses, and the schema that Prefect's form is made of."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from cascade.dials import Prune
from cascade.errors import InputError
from cascade.fields import parse_count
from cascade.importance.method import Aggregation, LayerScore, Scoring
from cascade.presets import Preset
from cascade.recipe import Options, Recipe
from cascade.recipe_files import load_recipe, validate_recipe
from tests.schemas import nodes
from tests.tiny_family import tiny_tree, write_recipe


def tree(**changes: Any) -> dict[str, Any]:
    return {**tiny_tree(Path("parent"), Path("corpus.jsonl")), **changes}


def stage(name: str, prune: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "prune": prune, "distill": {"tokens": 64}}


def taught(**distill: Any) -> dict[str, Any]:
    return {**stage("a", {"ratio": 0.5}), "distill": {"tokens": 64, **distill}}


@pytest.mark.parametrize("signals", ["top_k", "sampled", "head_and_tail"])
def test_kept_entries_do_for_forward_kl_with_cross_entropy(signals: str) -> None:
    stages = [taught(cross_entropy_weight=0.5)]
    recipe = validate_recipe(tree(teacher={"signals": signals, "token_bytes": 36}, stages=stages), where="t")
    assert recipe.teacher.token_bytes == 36


def on_policy(**dials: Any) -> dict[str, Any]:
    return {"stages": [{**stage("a", {"ratio": 0.5}), "on_policy": {"tokens": 64, **dials}}]}


@pytest.mark.parametrize(
    ("text", "count"), [("20k", 20_000), ("1.5M", 1_500_000), ("3B", 3 * 10**9), ("1T", 10**12), ("7", 7)]
)
def test_counts_take_decimal_multiples(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["20K", "k", "-5k", "1e6k", ""])
def test_other_counts_are_left_for_the_validator_to_refuse(text: str) -> None:
    assert parse_count(text) == text
    with pytest.raises(InputError, match=r"tokens: a count such as 8000, 8k") as caught:
        validate_recipe(
            tree(stages=[{**stage("a", {"ratio": 0.5}), "distill": {"tokens": text}}]), where="test"
        )
    # The list of stages is not called too short as well.
    assert len(caught.value.what.splitlines()) == 2


def test_a_source_may_be_a_plain_path() -> None:
    recipe = validate_recipe(
        tree(corpus={"sources": ["embedded", {"path": "x.jsonl", "field": "body"}]}), where="t"
    )
    assert [(source.path, source.field) for source in recipe.corpus.sources] == [
        ("embedded", "text"),
        ("x.jsonl", "body"),
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"famly": "x"}, ["famly: unknown key", "did you mean `family`"]),
        ({"family": "Has Spaces"}, ["family:", "Has Spaces"]),
        ({"family": "shared"}, ["'shared' is reserved"]),
        ({"stages": []}, ["stages:"]),
        ({"stages": [stage("a", {})]}, ["exactly one of `parameters`, `ratio`, `memory`, `latency`"]),
        ({"stages": [stage("a", {"ratio": 0.5, "parameters": 5})]}, ["exactly one"]),
        ({"stages": [stage("a", {"latency": float("inf")})]}, ["prune.latency: a finite number is needed"]),
        ({"stages": [stage("a", {"ratio": 0.5, "shape": {"ffn": 64}})]}, ["exactly one"]),
        ({"stages": [stage("a", {"shape": {"ffn": 64}, "candidates": 4})]}, ["leaves only one"]),
        (
            {"stages": [stage("a", {"ratio": 0.5, "importance": "taylor", "layer_score": "norm_ratio"})]},
            ["`layer_score` belongs to importance activation"],
        ),
        ({"stages": [stage("a", {"memory": "300MBit"})]}, ["memory"]),
        (
            {"stages": [stage("a", {"ratio": 0.5, "preset": "ministral3", "aggregation": "l2_mean"})]},
            ["preset ministral3 sets `aggregation` to mean"],
        ),
        ({"stages": [stage("a", {"memory": 9}), stage("b", {"memory": 9})]}, ["`memory` must fall"]),
        ({"stages": [stage("a", {"ratio": 1.0})]}, ["ratio", "less than 1"]),
        ({"stages": [stage("a", {"ratio": 0.5, "axes": ["depth"]})]}, ["axes", "depth"]),
        ({"stages": [stage("a", {"ratio": 0.5}), stage("b", {"ratio": 0.6})]}, ["must fall", "0.6"]),
        ({"stages": [stage("a", {"ratio": 0.5}), stage("a", {"ratio": 0.4})]}, ["'a' is used twice"]),
        *(
            ({"stages": [stage(name, {"ratio": 0.5})]}, [f"{name!r} is reserved"])
            for name in ("parent", "aliases", "builds", "family", "approval", "shared")
        ),
        (
            {"stages": [{**stage("a", {"ratio": 0.5}), "gate": {"speed_of_stable": math.inf}}]},
            ["gate.speed_of_stable", "inf"],
        ),
        ({"stages": [taught(objective_weight=0.5)]}, ["`objective_weight` belongs to jsd", "forward_kl"]),
        ({"stages": [taught(objective="jsd", objective_weight=1)]}, ["objective_weight", "less than 1"]),
        ({"stages": [taught(objective="kl")]}, ["objective", "'kl'"]),
        (on_policy(mixture=1.5), ["stages.0.on_policy.mixture", "less than or equal to 1", "1.5"]),
        (on_policy(mixture=-0.5), ["on_policy.mixture", "-0.5"]),
        (on_policy(sampling_temperature=-1), ["on_policy.sampling_temperature", "-1"]),
        (on_policy(prompt_tokens=0), ["on_policy.prompt_tokens", "0"]),
        (on_policy(prompt_tokens=32), ["`on_policy.prompt_tokens` 32", "less than", "32", "stage a"]),
        (on_policy(objective="gkd"), ["on_policy.objective", "gkd"]),
        (on_policy(objective_weight=0.5, objective="reverse_kl"), ["on_policy", "reverse_kl"]),
        (on_policy(tokens=0, mixture=0.25), ["`tokens` says how long", "`mixture`"]),
        (on_policy(mixtur=0.5), ["on_policy.mixtur", "did you mean `mixture`"]),
        ({"corpus": {"sources": []}}, ["corpus.sources"]),
        ({"teacher": {"signals": "top_p"}}, ["teacher.signals", "head_and_tail"]),
        ({"teacher": {"signals": "online", "precision": "int8"}}, ["`precision` belongs to signals hidden"]),
        ({"teacher": {"token_bytes": 36}}, ["`token_bytes` belongs to signals head_and_tail"]),
        ({"teacher": {"signals": "top_k", "token_bytes": 4}}, ["token_bytes", "12"]),
        (
            {"teacher": {"signals": "head_and_tail"}, "stages": [taught(objective="reverse_kl")]},
            ["head_and_tail do for objective forward_kl", "stage a asks for reverse_kl", "signals: hidden"],
        ),
        (
            {"teacher": {"signals": "top_k"}, "stages": [taught(temperature=2)]},
            ["stage a asks for forward_kl at 2"],
        ),
        ({"stages": [{**stage("a", {}), "student": "given"}]}, ["`checkpoint` goes with"]),
        ({"stages": [{**stage("a", {"ratio": 0.5}), "checkpoint": "x"}]}, ["`checkpoint` goes with"]),
        (
            {"stages": [{**stage("a", {"ratio": 0.5}), "student": "given", "checkpoint": "x"}]},
            ["leave `prune` out"],
        ),
        (
            {"stages": [{**stage("a", {"ratio": 0.5, "repair": "fold_heads"}), "student": "scratch"}]},
            ["is not cut", "`repair`"],
        ),
        ({"teacher": {"policy": "mixture", "models": ["x"]}}, ["two or more `models`, not 1"]),
        ({"teacher": {"policy": "mixture", "models": ["x", "y"]}}, ["must sum to 1, not 2"]),
        ({"teacher": {"models": ["x"]}}, ["policy parent takes no `models`"]),
        ({"teacher": {"policy": "model", "models": ["x", "y", "z"]}}, ["one for each of 2, not 3"]),
        (
            {"teacher": {"policy": "model", "models": [{"path": "x", "weight": 0.5}]}},
            ["policy model takes no weights"],
        ),
        ({"teacher": {"policy": "previous", "correction_tokens": 9}}, ["has learned already"]),
        ({"teacher": {"correction": "lora"}}, ["`correction_tokens` says how long"]),
        (
            {
                "teacher": {
                    "policy": "mixture",
                    "models": [{"path": "parent", "weight": 0.5}, {"path": "x", "weight": 0.5}],
                    "signals": "top_k",
                }
            },
            ["whole distributions", "top_k"],
        ),
        ({"controls": ["scratch", "scratch"]}, ["scratch is there twice"]),
        (
            {
                "controls": ["one_shot"],
                "stages": [stage("a-one-shot", {"ratio": 0.5}), stage("a", {"ratio": 0.4})],
            },
            ["'a-one-shot' is the name of a control"],
        ),
        (
            {
                "controls": ["scratch"],
                "stages": [{"name": "a", "student": "given", "checkpoint": "x", "distill": {"tokens": 9}}],
            },
            ["cut from its parent, not a"],
        ),
        (
            {
                "controls": ["random_prune"],
                "stages": [{**stage("a", {"ratio": 0.5}), "student": "scratch"}],
            },
            ["random_prune would be the last stage itself"],
        ),
        ({"seed": -1}, ["seed", "-1"]),
    ],
)
def test_wrong_recipes_name_the_key_and_the_value(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        validate_recipe(tree(**changes), where="recipe.yaml")
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert "recipe.yaml" in message
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize(("text", "count"), [("300MB", 300_000_000), ("1.5GB", 1_500_000_000), ("12B", 12)])
def test_memory_takes_decimal_bytes(text: str, count: int) -> None:
    recipe = validate_recipe(tree(stages=[stage("a", {"memory": text})]), where="t")
    assert recipe.stages[0].prune.memory == count


def test_a_preset_sets_its_fields_and_a_form_may_repeat_the_defaults() -> None:
    plain = Prune(ratio=0.5, preset=Preset.MINISTRAL3)
    filled = Prune(**{**Prune(ratio=0.5).model_dump(), "preset": "ministral3"})
    assert plain.resolved == filled.resolved
    assert plain.resolved.rotate
    assert plain.resolved.preset is Preset.NONE
    assert plain.scoring == Scoring(LayerScore.NORM_RATIO, False, Aggregation.MEAN)
    assert Prune(ratio=0.5).resolved == Prune(ratio=0.5)


def test_every_wrong_key_is_named_at_once() -> None:
    with pytest.raises(InputError) as caught:
        validate_recipe(tree(seed=-1, family="A"), where="t")
    assert "seed" in caught.value.what
    assert "family" in caught.value.what


def test_files_and_packaged_recipes_load(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", tree())
    assert load_recipe(str(path)) == validate_recipe(tree(), where="t")
    assert load_recipe("quickstart").family == "quickstart"


def test_a_recipe_that_does_not_exist_lists_the_packaged_ones() -> None:
    with pytest.raises(InputError, match="quickstart") as caught:
        load_recipe("no-such-recipe")
    assert caught.value.value == "no-such-recipe"


@pytest.mark.parametrize(
    "text", ["family: [", "!!python/object/apply:os.system ['true']", "just words", "- a"]
)
def test_broken_yaml_is_wrong_input_and_runs_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"broken\.yaml"):
        load_recipe(str(path))


def test_a_recipe_survives_json() -> None:
    recipe = load_recipe("quickstart")
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


@pytest.mark.parametrize("model", [Recipe, Options])
def test_the_form_has_no_unions_of_models_and_explains_every_field(model: type[Recipe]) -> None:
    schema = model.model_json_schema()
    assert [node for node in nodes(schema) if {"ge", "gt", "le", "lt"} & set(node)] == []
    assert [node for node in nodes(schema) if "oneOf" in node or "const" in node] == []
    for union in (node["anyOf"] for node in nodes(schema) if "anyOf" in node):
        assert {"type": "null"} in union
        assert len(union) == 2
    for definition in [schema, *schema.get("$defs", {}).values()]:
        for name, field in definition.get("properties", {}).items():
            assert {"description", "position"} <= field.keys(), name
            # A section's title is its own, one reference away.
            assert "title" in field or "$ref" in field, name
