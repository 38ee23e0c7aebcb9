"""Several teachers at once: the weighted mean of their distributions."""

from __future__ import annotations

from collections.abc import Sequence

from cascade.data.corpus import Corpus
from cascade.distillation.signals import LiveTeacher, Part, Teacher
from cascade.distillation.targets import MixedTargets, StateTargets
from cascade.errors import InputError


class MixedTeacher:
    """Asks every member, over the vocabulary that all have."""

    def __init__(self, members: Sequence[Teacher], weights: Sequence[float]) -> None:
        self.members, self.weights = tuple(members), tuple(weights)

    @property
    def waited(self) -> float:
        """See `Teacher.waited`."""
        return sum(member.waited for member in self.members)

    def over(self, corpus: Corpus) -> MixedTeacher:
        """See `LiveTeacher.over`. Raises InputError unless all members are live."""
        return MixedTeacher([live(member).over(corpus) for member in self.members], self.weights)

    def targets(self, part: Part, rows: Sequence[int]) -> MixedTargets:
        """See `Teacher.targets`. Raises InputError unless all members answer with whole distributions."""
        found = [member.targets(part, rows) for member in self.members]
        common = min(targets.vocabulary for targets in found)
        parts = [targets.narrowed(common) for targets in found]
        whole = [targets for targets in parts if isinstance(targets, StateTargets)]
        if len(whole) < len(parts):
            raise InputError(
                "a mixture of teachers needs whole distributions of each",
                value=", ".join(type(targets).__name__ for targets in parts),
                where="teacher.signals",
                remedy="set `signals: hidden` or `signals: online`",
            )
        return MixedTargets(tuple(whole), self.weights)


def live(teacher: Teacher) -> LiveTeacher:
    """The same; raises InputError for one that answers from what is stored."""
    if not isinstance(teacher, LiveTeacher):
        raise InputError(
            "stored signals cannot say what the teacher thinks of texts that a student writes",
            value=type(teacher).__name__,
            where="the teacher of an on-policy stage",
            remedy="give the teacher's model itself",
        )
    return teacher
