"""Who teaches each stage: the nodes of its teachers, of their corrections and of their signals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cascade.architecture import Architecture
from cascade.distillation.settings import DistillSettings, derived_learning_rate
from cascade.family.graph import Lesson, Node, Nodes, Section, Teaching
from cascade.kinds import PARENT_STAGE, Kind
from cascade.recipe import Recipe
from cascade.roles import PARENT, PREVIOUS, Correction, Policy, TeacherModel
from cascade.teacher import Signals, StatePrecision

# Of the peak rate that a student of the teacher's size would get (Minitron, 2407.14679, section 3).
CORRECTION_RATE = 1 / 5
# LoRA wants about ten times the rate of full fine-tuning (Schulman et al., "LoRA Without Regret", 2025).
# Doubt: neither factor was measured here.
LORA_RATE = 10


@dataclass(frozen=True)
class Parent:
    """What the graph has to know about a model it is given; `fingerprint` identifies its content."""

    reference: str
    fingerprint: str
    architecture: Architecture

    @property
    def hints(self) -> Section:
        """Where a node finds it."""
        return {"parent": self.reference}


def role(name: str, place: int) -> str:
    """The name of an input of the teacher at this place, from 0: `teacher`, `teacher-2`, ..."""
    return f"{name}-{place + 1}" if place else name


def members(recipe: Recipe, index: int) -> tuple[TeacherModel, ...]:
    """Who teaches the stage at this index; before the first child there is only the parent."""
    teacher = recipe.teacher
    if teacher.policy is Policy.MIXTURE:
        found = teacher.models
    elif teacher.policy is Policy.MODEL:
        found = teacher.models[index : index + 1] if len(teacher.models) > 1 else teacher.models
    else:
        found = (TeacherModel(path=teacher.policy.value),)
    if index == 0:
        return tuple(
            TeacherModel(path=PARENT, weight=one.weight) if one.path == PREVIOUS else one for one in found
        )
    return found


def needed_tokens(recipe: Recipe, path: str, index: int) -> int:
    """Training tokens that this teacher of the stage at `index` answers for in the whole family."""
    if path == PREVIOUS:
        return recipe.stages[index].distill.tokens
    return max(
        stage.distill.tokens
        for place, stage in enumerate(recipe.stages)
        if path in [one.path for one in members(recipe, place)]
    )


def signals_section(recipe: Recipe, tokens: int) -> Section:
    """What is stored of a teacher, and of how many tokens; the seed only where entries are drawn."""
    teacher = recipe.teacher
    if teacher.signals.keeps_entries:
        codec: Section = {"codec": teacher.signals.value, "token_bytes": teacher.token_bytes}
        codec |= {"seed": recipe.seed} if teacher.signals is not Signals.TOP_K else {}
    else:
        codec = {"codec": STATE_CODECS[teacher.precision]}
    return codec | {"tokens": tokens, "held_out_tokens": recipe.corpus.held_out_tokens}


STATE_CODECS = {StatePrecision.BFLOAT16: "hidden_bf16", StatePrecision.INT8: "hidden_int8"}


def correction_section(recipe: Recipe, teacher: Architecture) -> Section:
    """Fine-tuning on the corpus: every number of it."""
    how = recipe.teacher.correction
    rate = derived_learning_rate(teacher.hidden) * CORRECTION_RATE
    settings = DistillSettings(
        tokens=recipe.teacher.correction_tokens,
        learning_rate=rate * (LORA_RATE if how is Correction.LORA else 1),
        cross_entropy_weight=1.0,
        seed=recipe.seed,
    )
    resolved = settings.resolved(teacher.hidden, recipe.corpus.sequence_length).settings
    return {"distill": resolved.record(), "correction": how.value, "seed": recipe.seed}


@dataclass(frozen=True)
class Faculty:
    """The teachers of a family. root: the parent's node and shape. given: other models, by reference."""

    recipe: Recipe
    nodes: Nodes
    root: tuple[Node, Architecture]
    corpus: Node
    given: Mapping[str, Parent]

    def parent_signals(self) -> Node | None:
        """Of the parent as it is, where it teaches any stage from what is stored."""
        places = range(len(self.recipe.stages))
        teaching = [place for place in places if PARENT in [one.path for one in members(self.recipe, place)]]
        stored = self.recipe.teacher.signals is not Signals.ONLINE
        if not teaching or not stored or self.recipe.teacher.correction_tokens:
            return None
        return self.signals(self.root[0], needed_tokens(self.recipe, PARENT, teaching[0]))

    def of(self, index: int, previous: tuple[Node, Architecture], tokens: int = 0) -> Teaching:
        """Who teaches the stage at `index` when `previous` is the child before; tokens: if it takes more
        than the stage does."""
        inputs: dict[str, Node] = {}
        lessons: list[Lesson] = []
        teachers: list[Architecture] = []
        found = members(self.recipe, index)
        stored = self.recipe.teacher.signals is not Signals.ONLINE
        for place, one in enumerate(found):
            own, model = self.lessons_of(one.path, previous)
            teacher = own[-1].node if own else (previous if one.path == PREVIOUS else self.root)[0]
            # The parent's own name is part of the keys of every family that it teaches alone.
            alone = teacher is self.root[0] and len(found) == 1
            inputs[PARENT if alone else role("teacher", place)] = teacher
            if stored:
                needed = max(tokens, needed_tokens(self.recipe, one.path, index))
                own = [*own, Lesson(self.signals(teacher, needed), model)]
                inputs[role("signals", place)] = own[-1].node
            lessons += own
            teachers.append(model)
        weights = tuple(one.weight for one in found) if len(found) > 1 else ()
        return Teaching(inputs, tuple(teachers), weights, stored, tuple(lessons))

    def lessons_of(self, path: str, previous: tuple[Node, Architecture]) -> tuple[list[Lesson], Architecture]:
        """What has to be made before this teacher is there, itself last; nothing if it is there already."""
        if path == PREVIOUS:
            return [], previous[1]
        lessons: list[Lesson] = []
        node, model = self.root
        if path != PARENT:
            model = self.given[path].architecture
            node = given_node(self.nodes, PARENT_STAGE, self.given[path])
            lessons.append(Lesson(node, model))
        if self.recipe.teacher.correction_tokens:
            section = correction_section(self.recipe, model)
            inputs = {"student": node, "corpus": self.corpus}
            lessons.append(Lesson(self.nodes.node(Kind.CORRECTED, PARENT_STAGE, section, inputs), model))
        return lessons, model

    def signals(self, teacher: Node, tokens: int) -> Node:
        """Once for all stages that this teacher teaches."""
        inputs = {"parent": teacher, "corpus": self.corpus}
        return self.nodes.node(Kind.SIGNALS, PARENT_STAGE, signals_section(self.recipe, tokens), inputs)


def given_node(nodes: Nodes, stage: str, model: Parent) -> Node:
    """The node that takes a given model into the store."""
    identity = {"fingerprint": model.fingerprint}
    return nodes.node(Kind.GIVEN, stage, identity, hints=model.hints)
