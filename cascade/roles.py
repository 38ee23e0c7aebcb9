"""Who teaches, who learns, and what a family is compared with: the words a recipe uses for them."""

from __future__ import annotations

from enum import StrEnum

from cascade.fields import Section, setting

# In place of a path, among a teacher's models.
PARENT, PREVIOUS = "parent", "previous"


class Policy(StrEnum):
    """PARENT: the original parent at every stage (Ministral 3, 2601.08584, section 3). PREVIOUS: the child of
    the stage before, first the parent. MODEL: a given model, or one for each stage. MIXTURE: several at once.
    """

    PARENT = "parent"
    PREVIOUS = "previous"
    MODEL = "model"
    MIXTURE = "mixture"


class Correction(StrEnum):
    """How the teacher is fine-tuned on the corpus: every weight, or low-rank additions to the layers'
    matrices (LoRA, 2106.09685)."""

    FULL = "full"
    LORA = "lora"


class TeacherModel(Section):
    """One of the models that teach."""

    path: str = setting(
        ..., 0, "Path", "A model as a parent is given; or `parent`, or `previous`.", min_length=1
    )
    weight: float = setting(
        1.0, 1, "Weight", "Of a mixture: the share of this model's probabilities.", gt=0, le=1
    )


def model_from_path(value: object) -> object:
    """A plain string stands for a model with the default weight."""
    return {"path": value} if isinstance(value, str) else value


class Student(StrEnum):
    """What a stage's student starts as. PRUNED: a cut of the model before. GIVEN: a checkpoint that is
    there. SCRATCH: random weights."""

    PRUNED = "pruned"
    GIVEN = "given"
    SCRATCH = "scratch"


class Control(StrEnum):
    """What the last child is compared with, always in its shape.

    SCRATCH: random weights, all the family's tokens. ONE_SHOT: cut from the original parent at once, all the
    family's tokens. CE_ONLY: the same cut taught by the corpus alone. RANDOM_PRUNE: what is cut is drawn.
    """

    SCRATCH = "scratch"
    ONE_SHOT = "one_shot"
    CE_ONLY = "ce_only"
    RANDOM_PRUNE = "random_prune"

    def name_of(self, stage: str) -> str:
        """The folder of this control of a stage."""
        return f"{stage}-{self.value.replace('_', '-')}"
