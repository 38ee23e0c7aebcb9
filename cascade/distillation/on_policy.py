"""On-policy rows: the student goes on from prompts of the corpus, and the teacher scores what it wrote.

Generalised knowledge distillation (GKD, Agarwal et al., 2306.13649, algorithm 1): a share of the rows is the
student's own, the others are the corpus's; the teacher's distribution is matched at every token; no gradient
flows through the sampling. B rows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import torch
from transformers import PreTrainedModel

from cascade.data.corpus import Corpus
from cascade.distillation.rows import StepRows
from cascade.distillation.signals import LiveTeacher, Part
from cascade.distillation.states import head_of
from cascade.errors import InputError
from cascade.generation.sampling import continued, draws


@dataclass(frozen=True)
class Writing:
    """How the student writes.

    mixture: share of the rows. prompt_tokens: of a row of the corpus, from its beginning, which it goes on
    from to the row's end. temperature: of the sampling; 0 takes the likeliest token.
    """

    mixture: float
    prompt_tokens: int
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises InputError for a value outside its range."""
        for name, valid, allowed in (
            ("mixture", 0 <= self.mixture <= 1, "0 to 1"),
            ("prompt_tokens", self.prompt_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (the likeliest token) or more"),
        ):
            if not valid:
                raise InputError(
                    "a setting of the on-policy stage is out of range",
                    value=getattr(self, name),
                    where=name,
                    remedy=f"set it to {allowed}",
                )

    def own_before(self, position: int) -> int:
        """How many of the first rows are the student's own: the share, rounded down."""
        return math.floor(position * self.mixture)

    def owns(self, position: int) -> bool:
        """Whether a row is the student's own; they are spread evenly."""
        return self.own_before(position + 1) > self.own_before(position)


@dataclass(frozen=True)
class OwnRows:
    """A `RowSource`: rows of the corpus, of which the student writes some anew."""

    student: PreTrainedModel
    teacher: LiveTeacher
    corpus: Corpus
    writing: Writing

    def __post_init__(self) -> None:
        """Raises InputError where a prompt leaves nothing to write."""
        if self.writing.prompt_tokens >= self.corpus.sequence_length:
            raise InputError(
                "a prompt must be shorter than a row, or the student has nothing to write",
                value=f"{self.writing.prompt_tokens} of {self.corpus.sequence_length} tokens",
                where="on_policy.prompt_tokens",
                remedy="ask for a shorter prompt, or longer rows with `corpus.sequence_length`",
            )

    @cached_property
    def vocabulary(self) -> int:
        """Entries that teacher and student both have; the student may write no others."""
        taught = self.teacher.targets(Part.TRAIN, [0]).vocabulary
        return min(head_of(self.student).vocabulary, taught)

    def rows(self, positions: Sequence[int], should_stop: Callable[[], bool]) -> StepRows | None:
        """See `RowSource.rows`."""
        named = [self.corpus.row(position) for position in positions]
        ids_BT = self.corpus.train[named].clone()
        own_B = torch.tensor([self.writing.owns(position) for position in positions])
        length, given = self.corpus.sequence_length, self.writing.prompt_tokens
        chosen = [position for position in positions if self.writing.owns(position)]
        written = continued(
            self.student,
            ids_BT[own_B, :given].long(),
            draws(self.writing.seed, chosen, length - given),
            temperature=self.writing.temperature,
            vocabulary=self.vocabulary,
            end_of_text=self.corpus.end_of_text,
            should_stop=should_stop,
        )
        if written is None:
            return None
        ids_BT[own_B] = written.to(ids_BT.device, ids_BT.dtype)
        corpus = replace(self.corpus, train=ids_BT)
        return StepRows(corpus, self.teacher.over(corpus), range(len(named)), named, own_B.long() * given)

    def record(self) -> dict[str, object]:
        """See `RowSource.record`."""
        return {"writing": asdict(self.writing)}
