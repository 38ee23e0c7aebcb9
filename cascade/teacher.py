"""The teacher of a recipe: who it is, and how its signals reach the students."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Annotated

from pydantic import BeforeValidator, model_validator

from cascade.fields import Count, Section, setting
from cascade.roles import PREVIOUS, Correction, Policy, TeacherModel, model_from_path
from cascade.trainings import Rope


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
        0,
        5,
        "Correction tokens",
        "Tokens of the corpus that the teacher is fine-tuned on first; 0: none.",
        ge=0,
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
