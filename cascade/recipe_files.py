"""Recipes as YAML: read from a file or the package, checked, with one line for each wrong key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

from pydantic import ValidationError

from cascade.dials import Prune, Shape
from cascade.errors import InputError
from cascade.fields import Section
from cascade.parsing import LARGEST, parse_yaml
from cascade.quality import Gate
from cascade.recipe import NAME, Options, Recipe, Stage
from cascade.roles import TeacherModel
from cascade.teacher import Teacher
from cascade.texts import Corpus, Source, Watch
from cascade.trainings import Distill, Extend, OnPolicy, Rope
from cascade.wording import problem_lines


def load_recipe(name: str) -> Recipe:
    """Read a recipe from a YAML file, here or in a bucket, or by the name of a packaged one: `quickstart`.

    Raises InputError that names the file, the key and the value; of a bucket's also what `Location` raises.
    """
    try:
        data = stored_bytes(name) if name.startswith("s3://") else local_bytes(name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot read the recipe: {getattr(error, 'strerror', None) or error}",
            value=name,
            where="RECIPE",
            remedy=f"give a YAML file or one of the packaged recipes: {', '.join(packaged_recipes())}",
        ) from error
    try:
        tree = parse_yaml(data)
    except ValueError as error:
        raise InputError(
            "the recipe is not valid YAML", value=error, where=name, remedy="mend the line"
        ) from error
    return validate_recipe(tree, where=name)


def local_bytes(name: str) -> bytes:
    """Of a file, or of a packaged recipe."""
    path = Path(name)
    packaged = resources.files("cascade") / "recipes" / f"{name}.yaml"
    source = packaged if re.match(NAME, name) and packaged.is_file() and not path.is_file() else path
    with source.open("rb") as stream:
        return stream.read(LARGEST + 1)


def stored_bytes(uri: str) -> bytes:
    """Of a file in a bucket, as every build leaves one: `<root>/<family>/recipe.yaml`."""
    # Takes seconds to load, and most recipes are files.
    from cascade.storage.locations import open_location

    place = open_location(uri)
    if place.size() > LARGEST:
        raise ValueError(f"it is larger than {LARGEST:,} bytes")
    return place.read_bytes()


def packaged_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("cascade") / "recipes"
    return sorted(
        entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )


def validate_recipe(tree: object, *, where: str) -> Recipe:
    """Check a parsed tree; raises InputError with one line for each wrong key."""
    with in_our_words("the recipe", where, "the recipe reference in README.md lists every key with its unit"):
        return Recipe.model_validate(tree)


def validate_options(tree: object, *, where: str) -> Options:
    """Check how a build is to be run; raises InputError as `validate_recipe`."""
    with in_our_words("how to run it", where, f"the keys are {', '.join(Options.model_fields)}"):
        return Options.model_validate(tree)


@contextmanager
def in_our_words(subject: str, where: str, reference: str) -> Iterator[None]:
    """Whatever pydantic finds wrong becomes an InputError."""
    try:
        yield
    except ValidationError as error:
        problems = problem_lines(error, known_keys())
        raise InputError(
            f"{subject} is wrong:\n" + "\n".join(f"    {problem}" for problem in problems),
            where=where,
            remedy=f"mend these keys; {reference}",
        ) from error


def known_keys() -> set[str]:
    """Every key that a recipe may have somewhere."""
    models: list[type[Section]] = [Recipe, Options, Corpus, Source, Watch, Teacher, TeacherModel]
    models += [Stage, Prune, Shape, Distill, OnPolicy, Extend, Rope, Gate]
    return {name for model in models for name in model.model_fields}
