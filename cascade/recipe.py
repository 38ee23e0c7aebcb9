"""The recipe: one validated tree that describes a whole family; the same models make the Prefect form.

No unions of models: Prefect's form submits a mix of the branches. A variant is an enum field plus the
optional fields it uses. Cross-field rules run again in the flow's first second, because a form checks
only what JSON schema can say.
"""

from __future__ import annotations

import difflib
import re
from enum import StrEnum
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, ValidationError, model_validator

from cascade.dials import DIALS, Distill, Prune, Shape
from cascade.errors import InputError
from cascade.fields import Count, Section, setting

NAME = r"^[a-z0-9][a-z0-9-]{0,62}$"
RESERVED_STAGES = ("parent", "aliases")
RESERVED_FAMILY = "shared"


class Source(Section):
    """Where documents come from."""

    path: str = setting(
        ..., 0, "Path", "`embedded`, a .jsonl, .parquet or .txt file or URL, or a hub data set.", min_length=1
    )
    field: str = setting("text", 1, "Field", "The column that holds the text of a document.", min_length=1)
    split: str = setting("train", 2, "Split", "The split of a hub data set.", min_length=1)
    config: str | None = setting(
        None, 3, "Configuration", "The configuration of a hub data set, if it has several."
    )


def source_from_path(value: object) -> object:
    """A plain string stands for a source with the default field and split."""
    return {"path": value} if isinstance(value, str) else value


class Corpus(Section):
    """The text that calibrates, teaches and measures every stage."""

    sources: tuple[Annotated[Source, BeforeValidator(source_from_path)], ...] = setting(
        ..., 0, "Sources", "One or more sources of documents.", min_length=1
    )
    sequence_length: int = setting(
        512, 1, "Sequence length", "Tokens in a packed sequence.", ge=8, le=1_048_576
    )
    held_out: float = setting(
        0.02,
        2,
        "Held-out share",
        "Share of documents kept out of training, chosen by document hash.",
        gt=0,
        lt=1,
    )
    held_out_tokens: Count = setting(
        8192,
        3,
        "Evaluated tokens",
        "Held-out tokens that are evaluated, rounded up to whole sequences.",
        ge=64,
    )
    separate_documents: bool = setting(
        True,
        4,
        "Separate documents",
        "No token sees another document of its sequence; false: a sequence is read as one text.",
    )


class Signals(StrEnum):
    """How the teacher reaches the student.

    HIDDEN stores the teacher's last hidden states once for the whole family; ONLINE runs the teacher
    beside every student and stores nothing.
    """

    HIDDEN = "hidden"
    ONLINE = "online"


class Teacher(Section):
    """The teacher is the original parent at every stage (Ministral 3, 2601.08584, section 3)."""

    signals: Signals = setting(
        Signals.HIDDEN,
        0,
        "Signals",
        "hidden: computed once, stored in 2 bytes x hidden size a token; online: recomputed at every stage.",
    )


class Stage(Section):
    """One child: cut from the child before it (the first from the parent), then distilled."""

    name: str = setting(
        ..., 0, "Name", "Lowercase letters, digits and dashes; names the folder.", pattern=NAME
    )
    prune: Prune = setting(..., 1, "Prune", "How small the child becomes.")
    distill: Distill = setting(..., 2, "Distill", "How the child is taught.")


class Recipe(Section):
    """A family: one parent, one corpus, one teacher, and its stages from large to small."""

    family: str = setting(
        ..., 0, "Family", "Lowercase letters, digits and dashes; names the folder.", pattern=NAME
    )
    parent: str = setting(
        ...,
        1,
        "Parent",
        "A hub id, a Hugging Face folder, a .gguf file, an s3:// folder or an artifact.",
        min_length=1,
    )
    corpus: Corpus = setting(..., 2, "Corpus", "The text that calibrates, teaches and measures.")
    teacher: Teacher = setting(Teacher(), 3, "Teacher", "How the parent teaches.")
    stages: tuple[Stage, ...] = setting(..., 4, "Stages", "The children, from large to small.", min_length=1)
    seed: int = setting(0, 5, "Seed", "Fixes the order of the data and every draw.", ge=0, lt=2**31)
    trust_remote_code: bool = setting(
        False, 6, "Trust remote code", "Run Python code that ships with the parent. Read that code first."
    )

    @model_validator(mode="after")
    def falling_stages(self) -> Recipe:
        """Stage names are unique and free, and dials of the same kind fall from stage to stage."""
        if self.family == RESERVED_FAMILY:
            raise ValueError(f"family name {self.family!r} is reserved for what families share")
        names = [stage.name for stage in self.stages]
        for name in names:
            if names.count(name) > 1 or name in RESERVED_STAGES:
                raise ValueError(
                    f"stage name {name!r} is {'reserved' if name in RESERVED_STAGES else 'used twice'}"
                )
        for dial in DIALS:
            values = [getattr(stage.prune, dial) for stage in self.stages]
            stated = [value for value in values if value is not None]
            if any(later >= earlier for earlier, later in pairwise(stated)):
                raise ValueError(
                    f"`{dial}` must fall from stage to stage (each is cut from the one before), not {stated}"
                )
        return self


class Options(Section):
    """How a build runs: none of it changes a result, so none of it is part of an artifact's key."""

    device: str = setting("", 0, "Device", "A torch device such as `cuda:0`; chosen when empty.")
    checkpoint_seconds: float = setting(
        60.0, 1, "Checkpoint interval", "Seconds between two snapshots of the training state.", ge=0
    )
    cache: str = setting(
        "",
        2,
        "Cache",
        "Folder on the worker for scratch files and verified copies; ~/.cache/cascade when empty.",
    )
    gradient_checkpointing: bool = setting(
        False,
        3,
        "Gradient checkpointing",
        "Compute a layer's activations again for its gradients: less memory, about a third more time.",
    )


def load_recipe(name: str) -> Recipe:
    """Read a recipe from a YAML file, or by the name of a packaged one such as `quickstart`.

    Raises InputError that names the file, the key and the value.
    """
    path = Path(name)
    packaged = resources.files("cascade") / "recipes" / f"{name}.yaml"
    source = packaged if re.match(NAME, name) and packaged.is_file() and not path.is_file() else path
    try:
        tree = yaml.safe_load(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"cannot read the recipe: {error.strerror}",
            value=name,
            where="RECIPE",
            remedy=f"give a YAML file or one of the packaged recipes: {', '.join(packaged_recipes())}",
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(
            "the recipe is not valid YAML",
            value=" ".join(str(error).split()),
            where=name,
            remedy="mend the line",
        ) from error
    return validate_recipe(tree, where=name)


def packaged_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("cascade") / "recipes"
    return sorted(
        entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )


def validate_recipe(tree: object, *, where: str) -> Recipe:
    """Check a parsed tree; raises InputError with one line for each wrong key."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        found = error.errors(include_url=False)
        # A list whose items are wrong is called too short as well.
        problems = [
            describe_problem(problem)
            for problem in found
            if problem["type"] != "too_short" or not any(is_within(other, problem) for other in found)
        ]
        raise InputError(
            "the recipe is wrong:\n" + "\n".join(f"    {problem}" for problem in problems),
            where=where,
            remedy="mend these keys; the recipe reference in README.md lists every key with its unit",
        ) from error


def is_within(inner: Any, outer: Any) -> bool:
    """Whether a pydantic problem lies deeper in the tree, in the same branch."""
    depth = len(outer["loc"])
    return len(inner["loc"]) > depth and inner["loc"][:depth] == outer["loc"]


def describe_problem(problem: Any) -> str:
    """One line for one pydantic problem: the key's path, what is wrong, the value, a near miss."""
    path = ".".join(str(part) for part in problem["loc"]) or "recipe"
    if problem["type"] == "extra_forbidden":
        return f"{path}: unknown key{suggestion(str(problem['loc'][-1]))}"
    if problem["type"] == "missing":
        return f"{path}: required, but missing"
    if problem["type"] == "int_parsing":
        return f"{path}: a count such as 8000, 8k, 1.5M or 3B is needed (got {problem['input']!r})"
    message = problem["msg"].removeprefix("Value error, ")
    value = problem["input"]
    return f"{path}: {message}" + ("" if isinstance(value, dict | list) else f" (got {value!r})")


def suggestion(key: str) -> str:
    """The known key that looks most like `key`, ready to be appended to a message."""
    models = (Recipe, Corpus, Source, Teacher, Stage, Prune, Shape, Distill)
    known = sorted({name for model in models for name in model.model_fields})
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean `{close[0]}`?" if close else ""
