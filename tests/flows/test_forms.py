"""The forms that Prefect makes of the flows: described, bounded, and taking exactly what the YAML gives."""

from __future__ import annotations

from typing import Any

import pytest
from prefect import Flow
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools import validate

from cascade.recipe import Options
from cascade.recipe_files import load_recipe, packaged_recipes, validate_recipe
from flows.family import build_family
from flows.operations import collect_garbage, evaluate_family, promote, rebuild_stage
from tests.schemas import nodes

FLOWS: list[Flow[..., Any]] = [build_family, rebuild_stage, evaluate_family, promote, collect_garbage]


def form(flow: Flow[..., Any]) -> dict[str, Any]:
    """The schema that a deployment of the flow gets."""
    schema: dict[str, Any] = parameter_schema(flow).model_dump_for_openapi()
    return schema


@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.name)
def test_every_parameter_is_described_and_in_order(flow: Flow[..., Any]) -> None:
    fields = form(flow)["properties"]
    assert [field["position"] for field in fields.values()] == list(range(len(fields)))
    for name, field in fields.items():
        assert field.get("description"), name
    for name in set(form(flow)["properties"]) - set(form(flow).get("required", [])):
        assert "default" in fields[name], name
    assert flow.description


def test_every_choice_is_a_list_to_choose_from_and_no_field_takes_anything() -> None:
    definitions = form(build_family)["definitions"]
    assert {"Approval", "Gate", "Objective", "Options", "Recipe", "Stage"} <= set(definitions)
    for name, definition in definitions.items():
        if "enum" in definition:
            # A list of one value loses its drop-down.
            assert len(definition["enum"]) > 1, name
            continue
        assert definition["additionalProperties"] is False, name
        assert definition.get("description"), name
        for key, field in definition["properties"].items():
            assert {"$ref", "type", "anyOf"} & field.keys(), f"{name}.{key} takes anything"
    for union in (node["anyOf"] for node in nodes(definitions) if "anyOf" in node):
        assert [one.get("type") for one in union][1:] == ["null"]


@pytest.mark.parametrize("name", packaged_recipes())
def test_a_form_that_is_filled_with_a_recipe_submits_that_recipe(name: str) -> None:
    recipe = load_recipe(name)
    tree = recipe.model_dump(mode="json")
    parameters = {"recipe": tree, "store": "families", "options": Options().model_dump(mode="json")}
    # As the server checks what a form submits.
    assert validate(parameters, form(build_family), raise_on_error=False) == []
    assert validate_recipe(tree, where="test") == recipe


@pytest.mark.parametrize(
    ("flow", "change"),
    [
        (build_family, {"recipe": {"seed": -1}}),
        (build_family, {"recipe": {"family": "Not A Name"}}),
        (build_family, {"recipe": {"stages": []}}),
        (build_family, {"recipe": {"unheard": 1}}),
        (build_family, {"options": {"approval": "sometimes"}}),
        (build_family, {"options": {"checkpoint_seconds": -1}}),
        (collect_garbage, {"keep_days": -1}),
    ],
)
def test_what_a_schema_can_refuse_never_becomes_a_run(flow: Flow[..., Any], change: dict[str, Any]) -> None:
    parameters: dict[str, Any] = {"store": "families"}
    if flow is build_family:
        parameters |= {"recipe": load_recipe("smoke").model_dump(mode="json"), "options": {}}
    assert validate(parameters, form(flow), raise_on_error=False) == []
    for name, value in change.items():
        parameters[name] = {**parameters[name], **value} if isinstance(value, dict) else value
    assert len(validate(parameters, form(flow), raise_on_error=False)) == 1


def test_a_batch_too_small_is_refused_by_the_form() -> None:
    """A bound of a field that may be empty, and that people write as 8k in YAML."""
    tree = load_recipe("smoke").model_dump(mode="json")
    tree["stages"][0]["distill"]["batch_tokens"] = 7
    parameters = {"recipe": tree, "store": "families"}
    assert len(validate(parameters, form(build_family), raise_on_error=False)) == 1
