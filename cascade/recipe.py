"""The recipe: one validated tree that describes a whole family; the same models make the Prefect form.

No unions of models: Prefect's form submits a mix of the branches. A variant is an enum field plus the
optional fields it uses. Cross-field rules run again in the flow's first second, because a form checks
only what JSON schema can say.
"""

from __future__ import annotations

import difflib
import math
import re
from enum import StrEnum
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, ValidationError, model_validator

from cascade.dials import DIALS, Distill, Extend, OnPolicy, Prune, Rope, Shape
from cascade.distillation.objectives import Objective
from cascade.errors import InputError
from cascade.fields import Count, Section, setting
from cascade.roles import (
    PREVIOUS,
    Control,
    Correction,
    Policy,
    Student,
    TeacherModel,
    model_from_path,
)

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
    """How the teacher reaches the student: stored once for the whole family, or run beside every student.

    HIDDEN stores the teacher's last hidden states, which give back whole distributions; TOP_K the likeliest
    entries of a distribution and the mass of the others; SAMPLED counted draws from it; HEAD_AND_TAIL the
    likeliest entries and draws from the others. ONLINE stores nothing.
    """

    HIDDEN = "hidden"
    ONLINE = "online"
    TOP_K = "top_k"
    SAMPLED = "sampled"
    HEAD_AND_TAIL = "head_and_tail"

    @property
    def keeps_entries(self) -> bool:
        """Whether some entries of a distribution are stored instead of what gives all of them back."""
        return self in (Signals.TOP_K, Signals.SAMPLED, Signals.HEAD_AND_TAIL)


class StatePrecision(StrEnum):
    """Of stored hidden states."""

    BFLOAT16 = "bfloat16"
    INT8 = "int8"


class Teacher(Section):
    """Who teaches, from what its signals are, and whether it learns the corpus first."""

    signals: Signals = setting(
        Signals.HIDDEN,
        0,
        "Signals",
        "hidden: the last hidden states, computed once; head_and_tail, sampled, top_k: entries of the "
        "distributions, computed once; online: recomputed at every stage.",
    )
    precision: StatePrecision = setting(
        StatePrecision.BFLOAT16, 1, "Precision", "Of `hidden`: bfloat16, or int8 with one scale a token."
    )
    token_bytes: int = setting(
        24,
        2,
        "Token bytes",
        "Of head_and_tail, sampled and top_k: bytes that are stored for a training token.",
        ge=12,
        le=256,
    )

    policy: Policy = setting(
        Policy.PARENT,
        3,
        "Policy",
        "parent: the original; previous: the child before; model: of `models`; mixture: all of `models`.",
    )
    models: tuple[Annotated[TeacherModel, BeforeValidator(model_from_path)], ...] = setting(
        (),
        4,
        "Models",
        "Of `model`: one for all stages, or one for each; of `mixture`: two or more. All with the parent's "
        "tokenizer.",
    )
    correction_tokens: Count = setting(
        0, 5, "Correction tokens", "Tokens of the corpus that the teacher is fine-tuned on first; 0: none."
    )
    correction: Correction = setting(
        Correction.FULL,
        6,
        "Correction",
        "What is fine-tuned: full, every weight; lora, low-rank additions (needs the extra `lora`).",
    )
    rope: Rope = setting(
        Rope(),
        7,
        "RoPE",
        "The parent's rotary positions where rows of `extend` are longer than its config allows.",
    )

    @model_validator(mode="after")
    def dials_of_the_codec(self) -> Teacher:
        """Nothing is set that the codec does not have."""
        if self.precision is not StatePrecision.BFLOAT16 and self.signals is not Signals.HIDDEN:
            raise ValueError(f"`precision` belongs to signals hidden, not {self.signals.value}")
        default = type(self).model_fields["token_bytes"].default
        if self.token_bytes != default and not self.signals.keeps_entries:
            raise ValueError(
                f"`token_bytes` belongs to signals head_and_tail, sampled and top_k, not {self.signals.value}"
            )
        return self

    @model_validator(mode="after")
    def known_teachers(self) -> Teacher:
        """Models are there where the policy asks for them; weights of a mixture sum to 1."""
        policy, count = self.policy, len(self.models)
        if policy is Policy.MODEL and not count:
            raise ValueError("policy model needs `models`: one for all stages, or one for each")
        if policy is Policy.MIXTURE and count < 2:
            raise ValueError(f"policy mixture needs two or more `models`, not {count}")
        if policy in (Policy.PARENT, Policy.PREVIOUS) and count:
            raise ValueError(f"policy {policy.value} takes no `models`; set policy model or mixture")
        total = math.fsum(model.weight for model in self.models)
        if policy is Policy.MIXTURE and abs(total - 1) > 1e-6:
            raise ValueError(f"the weights of a mixture must sum to 1, not {total:g}")
        if policy is Policy.MODEL and any(model.weight != 1 for model in self.models):
            raise ValueError("policy model takes no weights; set policy mixture to teach by several at once")
        if policy is Policy.MIXTURE and self.signals.keeps_entries:
            raise ValueError(f"a mixture needs whole distributions: signals hidden, not {self.signals.value}")
        if self.correction_tokens and PREVIOUS in self.names:
            raise ValueError("`correction_tokens` is for given teachers: a child before has learned already")
        if self.correction is not Correction.FULL and not self.correction_tokens:
            raise ValueError("`correction` says how; `correction_tokens` says how long, and is 0")
        return self

    @property
    def names(self) -> list[str]:
        """What teaches, as the recipe writes it."""
        given = [model.path for model in self.models]
        return given or [self.policy.value]


class Stage(Section):
    """One child: it starts as a cut of the child before it (the first of the parent), as a given checkpoint
    or from scratch, and is distilled."""

    name: str = setting(
        ..., 0, "Name", "Lowercase letters, digits and dashes; names the folder.", pattern=NAME
    )
    student: Student = setting(
        Student.PRUNED,
        1,
        "Student",
        "Starts as: pruned, a cut of the model before; given, `checkpoint`; scratch, random weights.",
    )
    checkpoint: str | None = setting(
        None,
        2,
        "Checkpoint",
        "Of a given student: a model as a parent is given, smaller and with the parent's tokenizer.",
        min_length=1,
    )
    prune: Prune = setting(Prune(), 3, "Prune", "How small the child becomes; nothing for a given one.")
    distill: Distill = setting(..., 4, "Distill", "How the child is taught.")
    on_policy: OnPolicy = setting(
        OnPolicy(), 5, "On policy", "How it is then taught by what it writes itself; nothing by default."
    )
    extend: Extend = setting(Extend(), 6, "Extend", "How its context is extended, beside the next stages.")

    @model_validator(mode="after")
    def one_start(self) -> Stage:
        """A given student has a checkpoint and no dial; the others are the other way round."""
        given = self.student is Student.GIVEN
        if given != (self.checkpoint is not None):
            raise ValueError("`checkpoint` goes with `student: given`, and neither without the other")
        if given and self.prune != Prune():
            raise ValueError("a given student is taught as it is; leave `prune` out")
        if not given and not self.prune.stated:
            names = ", ".join(f"`{name}`" for name in DIALS)
            raise ValueError(f"prune: set exactly one of {names}, or sizes in `shape`")
        if self.student is Student.SCRATCH and (written := self.prune.of_the_cut):
            raise ValueError(f"a student from scratch is not cut; leave {written} out of `prune`")
        return self

    @property
    def extends(self) -> bool:
        """Whether it has a long-context stage."""
        return self.extend.sequence_length is not None


class Recipe(Section):
    """A family: one parent, one corpus, its teachers, and its stages from large to small."""

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
    teacher: Teacher = setting(Teacher(), 3, "Teacher", "Who teaches, and how.")
    stages: tuple[Stage, ...] = setting(..., 4, "Stages", "The children, from large to small.", min_length=1)
    controls: tuple[Control, ...] = setting(
        (),
        5,
        "Controls",
        "What the last child is compared with, in its shape: scratch, one_shot, ce_only, random_prune.",
    )
    seed: int = setting(0, 6, "Seed", "Fixes the order of the data and every draw.", ge=0, lt=2**31)
    trust_remote_code: bool = setting(
        False, 7, "Trust remote code", "Run Python code that ships with the parent. Read that code first."
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
        models = len(self.teacher.models)
        if self.teacher.policy is Policy.MODEL and models not in (1, len(self.stages)):
            raise ValueError(
                f"teacher.models: give one for all stages or one for each of {len(self.stages)}, not {models}"
            )
        return self

    @model_validator(mode="after")
    def longer_rows(self) -> Recipe:
        """Rows of a long-context stage are longer, and a teacher's RoPE settings are there for them."""
        short, stages = self.corpus.sequence_length, [stage for stage in self.stages if stage.extends]
        for stage in stages:
            if (length := stage.extend.sequence_length or 0) <= short:
                raise ValueError(
                    f"stage {stage.name}: extend.sequence_length must be more than corpus.sequence_length "
                    f"({short}), not {length}"
                )
        if self.teacher.rope != Rope() and not stages:
            raise ValueError("`teacher.rope` is for rows of `extend`, and no stage has it")
        return self

    @model_validator(mode="after")
    def fair_controls(self) -> Recipe:
        """Controls are different from each other, from the stages, and from the child they stand beside."""
        last = self.stages[-1]
        for control in self.controls:
            if self.controls.count(control) > 1:
                raise ValueError(f"controls: {control.value} is there twice")
            if control.name_of(last.name) in [stage.name for stage in self.stages]:
                raise ValueError(f"stage name {control.name_of(last.name)!r} is the name of a control")
            given = [stage.name for stage in self.stages if stage.student is Student.GIVEN]
            if given and control is not Control.CE_ONLY:
                raise ValueError(
                    f"control {control.value} needs a family cut from its parent, not {given[0]}"
                )
            if last.student is Student.SCRATCH and control in (Control.SCRATCH, Control.RANDOM_PRUNE):
                raise ValueError(f"control {control.value} would be the last stage itself, or nothing is cut")
        return self

    @model_validator(mode="after")
    def prompts_shorter_than_rows(self) -> Recipe:
        """A prompt leaves something to write."""
        length = self.corpus.sequence_length
        for stage in self.stages:
            prompt = stage.on_policy.prompt_tokens
            if prompt is not None and prompt >= length:
                raise ValueError(
                    f"stage {stage.name}: `on_policy.prompt_tokens` {prompt} must be less than "
                    f"`corpus.sequence_length` {length}, or the child has nothing to write"
                )
        return self

    @model_validator(mode="after")
    def objective_of_the_signals(self) -> Recipe:
        """Some entries of a distribution at temperature 1 do for no other divergence or temperature."""
        signals = self.teacher.signals
        for stage in self.stages if signals.keeps_entries else ():
            objective, temperature = stage.distill.objective, stage.distill.temperature
            if objective is not Objective.FORWARD_KL or temperature != 1:
                raise ValueError(
                    f"signals {signals.value} do for objective forward_kl at temperature 1, with or without "
                    f"cross-entropy; stage {stage.name} asks for {objective.value} at {temperature:g}: "
                    "set `teacher: {signals: hidden}`"
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
    models: list[type[Section]] = [Recipe, Corpus, Source, Teacher, TeacherModel]
    models += [Stage, Prune, Shape, Distill, OnPolicy, Extend, Rope]
    known = sorted({name for model in models for name in model.model_fields})
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean `{close[0]}`?" if close else ""
