"""The trainings of a stage: by its teacher, on what the child writes, and on longer rows."""

from __future__ import annotations

from enum import StrEnum

from pydantic import model_validator

from cascade.distillation.objectives import Objective, check_weight
from cascade.distillation.schedules import Schedule, WeightSchedule
from cascade.fields import Count, Section, setting
from cascade.models.positions import RopeSettings, RopeType


class HiddenStates(StrEnum):
    """Of the hidden-state loss."""

    AUTO = "auto"
    OFF = "off"
    COSINE = "cosine"
    MSE = "mse"
    RELATIONS = "relations"


class Distill(Section):
    """How the cut model learns to imitate the teacher."""

    tokens: Count = setting(..., 0, "Tokens", "Training tokens, rounded up to whole sequences.", ge=1)
    epochs: int = setting(
        1, 1, "Epochs", "How often the corpus may be repeated to reach `tokens`.", ge=1, le=1000
    )
    objective: Objective = setting(
        Objective.FORWARD_KL,
        2,
        "Objective",
        "forward_kl, reverse_kl, jsd, skew_kl, skew_reverse_kl or total_variation of teacher and student.",
    )
    objective_weight: float | None = setting(
        None,
        7,
        "Objective weight",
        "beta of jsd (0.5 when empty) or alpha of skew_kl and skew_reverse_kl (0.1 when empty).",
        gt=0,
        lt=1,
    )
    temperature: float = setting(1.0, 3, "Temperature", "Both logits are divided by it.", gt=0, le=100)
    cross_entropy_weight: float = setting(
        0.0, 4, "Cross-entropy weight", "Share w of the corpus loss: (1-w) * divergence + w * CE.", ge=0, le=1
    )
    learning_rate: float | None = setting(
        None, 5, "Learning rate", "Peak learning rate; derived from the child's size when empty.", gt=0, le=1
    )
    batch_tokens: Count | None = setting(
        None, 6, "Batch tokens", "Tokens of one optimiser step; derived when empty.", ge=8
    )
    schedule: Schedule = setting(
        Schedule.LINEAR,
        8,
        "Learning rate schedule",
        "After the warm-up: linear or cosine decay, or wsd: stable, then decay over the last 20 %.",
    )
    cross_entropy_schedule: WeightSchedule = setting(
        WeightSchedule.CONSTANT,
        9,
        "Cross-entropy schedule",
        "Of its weight: constant; linear, from 0 to the weight; wsd: from 0 to the weight and back to 0.",
    )

    hidden_states: HiddenStates = setting(
        HiddenStates.AUTO,
        10,
        "Hidden states",
        "Loss between second-to-last layers: cosine, mse, off; relations of queries, keys and values "
        "(MiniLMv2); auto: cosine for a child of at most half of its one online teacher's layers, off with "
        "stored signals.",
    )
    hidden_states_weight: float = setting(
        1.0, 11, "Hidden states weight", "Of that loss, beside the others' weight of 1 in all.", gt=0, le=100
    )
    hidden_states_layers: int = setting(
        1,
        12,
        "Hidden states layers",
        "Pairs of layers that cosine or mse compares; beside the second-to-last ones evenly spread, each "
        "with the teacher's layer that it comes from or that is as deep.",
        ge=1,
        le=1000,
    )

    @model_validator(mode="before")
    @classmethod
    def off_is_a_word(cls, tree: object) -> object:
        """YAML reads a bare `off` as false."""
        if isinstance(tree, dict) and tree.get("hidden_states") is False:
            return {**tree, "hidden_states": HiddenStates.OFF}
        return tree

    @model_validator(mode="after")
    def no_weight_without_a_loss(self) -> Distill:
        """A dial without an effect is a mistake."""
        kind = self.hidden_states
        if kind is HiddenStates.OFF and self.hidden_states_weight != 1:
            raise ValueError("`hidden_states_weight` has no effect with `hidden_states: off`")
        if kind in (HiddenStates.OFF, HiddenStates.RELATIONS) and self.hidden_states_layers != 1:
            raise ValueError(f"`hidden_states_layers` has no effect with `hidden_states: {kind.value}`")
        return self

    @model_validator(mode="after")
    def weight_of_its_objective(self) -> Distill:
        """A weight is for an objective that has one."""
        check_weight(self.objective, self.objective_weight)
        return self


class OnPolicy(Section):
    """After its distillation the child writes texts itself, and the teacher says what it would have written
    at every token of them (GKD, 2306.13649)."""

    tokens: Count = setting(0, 0, "Tokens", "Training tokens, rounded up to whole sequences; 0: none.", ge=0)
    mixture: float = setting(
        0.5,
        1,
        "Mixture",
        "Share of the sequences that the child writes; the corpus's are the rest.",
        ge=0,
        le=1,
    )
    prompt_tokens: Count | None = setting(
        None,
        2,
        "Prompt tokens",
        "Beginning of a corpus sequence that the child goes on from, to its end; half of it when empty.",
        ge=1,
    )
    sampling_temperature: float = setting(
        1.0,
        3,
        "Sampling temperature",
        "The child's logits are divided by it when it writes; 0: always the likeliest token.",
        ge=0,
        le=100,
    )
    objective: Objective = setting(
        Objective.JSD, 4, "Objective", "As in `distill`, of teacher and child at every token that is learned."
    )
    objective_weight: float | None = setting(
        None,
        5,
        "Objective weight",
        "As in `distill`: beta of jsd, or alpha of the skew divergences.",
        gt=0,
        lt=1,
    )
    temperature: float = setting(
        1.0, 6, "Temperature", "Both logits are divided by it in the objective.", gt=0, le=100
    )
    learning_rate: float | None = setting(
        None, 7, "Learning rate", "Peak learning rate; derived from the child's size when empty.", gt=0, le=1
    )
    batch_tokens: Count | None = setting(
        None, 8, "Batch tokens", "Tokens of one optimiser step; derived when empty.", ge=8
    )

    @model_validator(mode="after")
    def nothing_without_tokens(self) -> OnPolicy:
        """What says how is of no use where nothing is done; a weight is for an objective that has one."""
        written = [
            name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default
        ]
        if written and not self.tokens:
            raise ValueError(
                f"`tokens` says how long, and is 0; leave out {', '.join(map('`{}`'.format, written))}"
            )
        check_weight(self.objective, self.objective_weight)
        return self

    def prompt_of(self, sequence_length: int) -> int:
        """Tokens of the prompt in rows of this length."""
        return self.prompt_tokens or max(1, sequence_length // 2)


class Rope(Section):
    """What of a decoder's rotary positions (RoPE) changes for long rows; what is left empty stays."""

    theta: float | None = setting(
        None, 0, "Theta", "Base of the frequencies (`rope_theta`); as it is when empty.", gt=1
    )
    type: RopeType = setting(
        RopeType.NONE,
        1,
        "Type",
        "Scaling of the frequencies: linear, yarn, llama3; none: as it is.",
    )
    factor: float | None = setting(
        None,
        2,
        "Factor",
        "Of the scaling; when empty the rows' length over `original_length`.",
        gt=1,
        le=1024,
    )
    original_length: Count | None = setting(
        None,
        3,
        "Original length",
        "Of the scaling: tokens that the decoder was made for; when empty its config says so.",
        ge=1,
    )

    @model_validator(mode="after")
    def dials_of_the_scaling(self) -> Rope:
        """Nothing is set that only a scaling has."""
        for name in ("factor", "original_length"):
            if self.type is RopeType.NONE and getattr(self, name) is not None:
                raise ValueError(f"`{name}` belongs to a `type`: linear, yarn or llama3")
        return self

    @property
    def settings(self) -> RopeSettings:
        """Plain values."""
        return RopeSettings(self.theta, self.type, self.factor, self.original_length)


class Extend(Section):
    """The long-context stage: the distilled child is taught on longer rows, beside the family's trunk."""

    sequence_length: int | None = setting(
        None,
        0,
        "Sequence length",
        "Tokens of a long row, more than `corpus.sequence_length`; empty: no long-context stage.",
        ge=8,
        le=1_048_576,
    )
    tokens: Count = setting(0, 1, "Tokens", "Training tokens of long rows, rounded up to whole ones.", ge=0)
    epochs: int = setting(
        1, 2, "Epochs", "How often the long rows may be repeated to reach `tokens`.", ge=1, le=1000
    )
    rope: Rope = setting(Rope(), 3, "RoPE", "The child's rotary positions.")
    learning_rate: float | None = setting(
        None, 4, "Learning rate", "Peak learning rate; as in `distill` when empty.", gt=0, le=1
    )
    batch_tokens: Count | None = setting(
        None, 5, "Batch tokens", "Tokens of one optimiser step; as in `distill` when empty.", ge=8
    )

    @model_validator(mode="after")
    def rows_and_tokens(self) -> Extend:
        """A length and tokens go together; without them nothing else is set."""
        if self.sequence_length is None and self != Extend.model_construct():
            raise ValueError("`extend` needs a `sequence_length`")
        if self.sequence_length is not None and not self.tokens:
            raise ValueError("`extend` needs `tokens`, 1 or more")
        return self
