"""The parameters of a flow, checked in its first second: what is wrong becomes the run's message.

Prefect would check them itself before the flow begins, and report them in pydantic's words; so the flows turn
that off, and keep the types from which Prefect makes the form.
"""

from __future__ import annotations

from typing import Any

from prefect import runtime

from cascade.recipe import Options, Recipe
from cascade.recipe_files import validate_options, validate_recipe


def checked_recipe(recipe: Recipe | dict[str, Any]) -> Recipe:
    """The recipe that a form, an API call or a caller gave; raises InputError."""
    return validate_recipe(recipe, where="the run's parameter `recipe`")


def checked_options(options: Options | dict[str, Any]) -> Options:
    """The options; raises InputError."""
    return validate_options(options, where="the run's parameter `options`")


def run_name() -> str:
    """The family's name, whatever form the parameters have."""
    parameters = runtime.flow_run.parameters
    recipe = parameters.get("recipe")
    named = recipe.get("family") if isinstance(recipe, dict) else getattr(recipe, "family", None)
    name = str(parameters.get("family") or named or "no family")
    return f"{name}/{parameters['stage']}" if parameters.get("stage") else name
