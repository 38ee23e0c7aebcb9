"""The recipe: one validated tree that describes a whole family; the same models make the Prefect form.

No unions of models: Prefect's form submits a mix of the branches. A variant is an enum field plus the
optional fields it uses. Cross-field rules run again in the flow's first second, because a form checks
only what JSON schema can say.
"""

from __future__ import annotations

from enum import StrEnum
from itertools import pairwise

from pydantic import model_validator

from cascade.dials import DIALS, Prune
from cascade.distillation.objectives import Objective
from cascade.fields import Section, setting
from cascade.kinds import PARENT_STAGE, SHARED_FOLDER
from cascade.quality import Gate
from cascade.roles import Control, Policy, Student
from cascade.teacher import Signals, Teacher
from cascade.texts import Corpus, Watch
from cascade.trainings import Distill, Extend, HiddenStates, OnPolicy, Rope

NAME = r"^[a-z0-9][a-z0-9-]{0,62}$"
# The parent's own folder and others beside the stages'; what stands for a stage in the keys of Prefect's
# artifacts; and `shared`, the folder of a store.
RESERVED_STAGES = (PARENT_STAGE, "aliases", "builds", "family", "approval", SHARED_FOLDER)


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
    gate: Gate = setting(
        Gate(), 7, "Gate", "Limits that it has to keep before the family becomes `stable`; none by default."
    )

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
    watch: Watch = setting(
        Watch(),
        6,
        "Watch",
        "A second corpus that ends a child's training, not that of `extend`, when it over-fits; none by "
        "default.",
    )
    seed: int = setting(0, 7, "Seed", "Fixes the order of the data and every draw.", ge=0, lt=2**31)
    trust_remote_code: bool = setting(
        False, 8, "Trust remote code", "Run Python code that ships with the parent. Read that code first."
    )

    @model_validator(mode="after")
    def falling_stages(self) -> Recipe:
        """Stage names are unique and free, and dials of the same kind fall from stage to stage."""
        if self.family == SHARED_FOLDER:
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
    def hidden_states_of_one_online_teacher(self) -> Recipe:
        """Stored signals hold no intermediate states, and a mixture has several."""
        online = self.teacher.signals is Signals.ONLINE and self.teacher.policy is not Policy.MIXTURE
        for stage in self.stages:
            asked = stage.distill.hidden_states
            if asked not in (HiddenStates.AUTO, HiddenStates.OFF) and not online:
                raise ValueError(
                    f"stage {stage.name}: `hidden_states: {asked.value}` needs the states of one teacher: "
                    "set `teacher: {signals: online}` and no policy mixture, or `hidden_states: off`"
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


class Approval(StrEnum):
    """What a person is asked before: nothing, the first training of a run, or the first of every stage."""

    NEVER = "never"
    BEFORE_FIRST_TRAINING = "before_first_training"
    EACH_STAGE = "each_stage"


class Options(Section):
    """How a build runs: none of it changes a result by more than rounding, so none is part of a key."""

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
    compile: bool = setting(
        False,
        4,
        "Compile",
        "Compile the student's layers and the loss with torch.compile: a minute or more at the start of "
        "every training, then faster steps; rounding differs. Needs a C++ compiler, on a GPU Triton.",
    )
    approval: Approval = setting(
        Approval.NEVER,
        5,
        "Approval",
        "When the run is suspended, without a machine, until a person resumes it: never, "
        "before_first_training, each_stage. What is trained already needs none.",
    )
    credentials: str = setting(
        "",
        6,
        "Credentials",
        "Name of a Prefect block of type Secret with a JSON object of AWS_... variables (and HF_TOKEN); the "
        "worker's own environment when empty.",
    )
