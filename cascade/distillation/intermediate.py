"""A term of the loss that compares what student and teacher compute inside.

Of the residual stream after chosen layers (see `cascade.distillation.layer_map`): where widths differ, linear
maps from student to teacher are trained along and thrown away afterwards. Or of the relations among queries,
keys and values of one layer (see `cascade.distillation.relations`), which need no map.
N tokens, D student and E teacher hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from cascade.distillation.attention_parts import AttentionParts, attention_parts
from cascade.distillation.batches import Batch
from cascade.distillation.fused import IGNORED
from cascade.distillation.layer_map import Pairs, relation_pair, state_pairs
from cascade.distillation.maps import fitted
from cascade.distillation.relations import Sight, documents_of, relation_heads, relation_loss
from cascade.distillation.settings import RELATIONS, Plan
from cascade.distillation.signals import OnlineTeacher, Teacher
from cascade.distillation.states import Inner, head_of, of_targets
from cascade.distillation.targets import StateTargets, Targets
from cascade.errors import InputError
from cascade.models.decoder import Decoder, decoder_of


class HiddenLoss(StrEnum):
    """COSINE: 1 - cos. MSE: the squared distance, over the squared length of the teacher's state, because
    the scale of a residual stream is arbitrary and a few tokens' states are hundreds of times longer."""

    COSINE = "cosine"
    MSE = "mse"


def hidden_loss(
    student_ND: Tensor, teacher_NE: Tensor, labels_N: Tensor, kind: HiddenLoss, projection_DE: Tensor | None
) -> Tensor:
    """The sum over tokens that have a label, float32 or wider; no gradients flow to the teacher."""
    told_N = labels_N != IGNORED
    wide = torch.promote_types(student_ND.dtype, torch.float32)
    student, teacher = student_ND[told_N].to(wide), teacher_NE[told_N].detach().to(wide)
    if projection_DE is not None:
        student = student @ projection_DE.to(wide)
    if kind is HiddenLoss.COSINE:
        return (1 - cosine_similarity(student, teacher, dim=-1)).sum()
    scale_N = teacher.square().sum(-1).clamp_min(torch.finfo(wide).tiny)
    return ((student - teacher).square().sum(-1) / scale_N).sum()


class Intermediate(Protocol):
    """The term of a training.

    weight: of the whole. pairs: layers of student and teacher, counted from 0. places: the student's modules
    that it looks at. projections: trained along.
    """

    @property
    def weight(self) -> float: ...
    @property
    def pairs(self) -> Pairs: ...
    @property
    def places(self) -> tuple[nn.Module, ...]: ...
    @property
    def projections(self) -> tuple[nn.Parameter, ...]: ...

    def parts(self, student: Inner, teacher: Inner, batch: Batch) -> list[Tensor]:
        """What the term is the sum of, each a sum over the tokens told; both sides are [N, ..]."""

    def itself(self, teacher: Inner, batch: Batch) -> Tensor:
        """The term if the teacher were its own student."""

    def reached(self, student: PreTrainedModel) -> list[set[str]]:
        """Names of parameters that each part depends on."""


@dataclass(frozen=True)
class StateTerm:
    """Of residual streams, the mean over pairs of layers. projections, each [D, E]: none for equal widths."""

    weight: float
    kind: HiddenLoss
    pairs: Pairs
    places: tuple[nn.Module, ...]
    projections: tuple[nn.Parameter, ...] = ()

    def parts(self, student: Inner, teacher: Inner, batch: Batch) -> list[Tensor]:
        """One for each pair of layers."""
        maps = self.projections or (None,) * len(student)
        return [
            hidden_loss(ours, theirs, batch.labels, self.kind, projection) / len(student)
            for ours, theirs, projection in zip(student, teacher, maps, strict=True)
        ]

    def itself(self, teacher: Inner, batch: Batch) -> Tensor:
        """See `Intermediate.itself`."""
        found = [hidden_loss(states, states, batch.labels, self.kind, None) for states in teacher]
        return torch.stack(found).mean()

    def reached(self, student: PreTrainedModel) -> list[set[str]]:
        """Up to the layer of each pair."""
        return [up_to(student, own + 1) for own, _ in self.pairs]


@dataclass(frozen=True)
class RelationTerm:
    """Of the relations of one pair of layers: the sum of those among queries, among keys, among values."""

    weight: float
    pairs: Pairs
    own: AttentionParts
    others: AttentionParts
    projections: tuple[nn.Parameter, ...] = ()

    @property
    def places(self) -> tuple[nn.Module, ...]:
        """See `Intermediate.places`."""
        return self.own.modules

    def parts(self, student: Inner, teacher: Inner, batch: Batch) -> list[Tensor]:
        """Queries, keys, values."""
        return self._parts(self.own.split(student), self.others.split(teacher), batch)

    def itself(self, teacher: Inner, batch: Batch) -> Tensor:
        """See `Intermediate.itself`."""
        theirs = self.others.split(teacher)
        return torch.stack(self._parts(theirs, theirs, batch)).sum()

    def _parts(self, ours: Inner, theirs: Inner, batch: Batch) -> list[Tensor]:
        rows, length = batch.ids.shape
        positions_BT = None if batch.positions is None else batch.positions[:, :-1]
        shape = (rows, length - 1)
        sight = Sight(documents_of(positions_BT, shape, batch.ids.device))
        told_BT = (batch.labels != IGNORED).view(shape)
        heads = map(relation_heads, self.own.channels, self.others.channels)
        return [
            relation_loss(one.unflatten(0, shape), other.unflatten(0, shape), told_BT, sight, count)
            for one, other, count in zip(ours, theirs, heads, strict=True)
        ]

    def reached(self, student: PreTrainedModel) -> list[set[str]]:
        """What makes each kind, and all below its layer."""
        below = up_to(student, self.pairs[0][0])
        makers = self.own.modules * (3 if self.own.fused else 1)
        names = {id(parameter): name for name, parameter in student.named_parameters()}
        return [below | {names[id(parameter)] for parameter in maker.parameters()} for maker in makers]


def loss_of(term: Intermediate, seen: Inner, targets: Targets, batch: Batch) -> Tensor:
    """The unweighted sum over the tokens that are targets; seen: at the term's places, [B, T, ..] each."""
    return torch.stack(parts_of(term, seen, targets, batch)).sum()


def parts_of(term: Intermediate, seen: Inner, targets: Targets, batch: Batch) -> list[Tensor]:
    """The parts of `loss_of`."""
    ours = tuple(of_targets(one) for one in seen)
    with torch.autocast(batch.ids.device.type, enabled=False):
        return term.parts(ours, inside(targets), batch)


def inside(targets: Targets) -> Inner:
    """What the teacher computes inside, [N, ..] each; raises InputError for answers without it."""
    found = targets.inner if isinstance(targets, StateTargets) else ()
    if not found:
        raise InputError(
            "the teacher's answers hold no intermediate states",
            value=type(targets).__name__,
            where="distill.hidden_states",
            remedy="let the rows come from the corpus, or set `hidden_states: off`",
        )
    return found


def intermediate_of(
    student: PreTrainedModel, teacher: Teacher, plan: Plan, origins: Sequence[int] | None = None
) -> tuple[OnlineTeacher, Intermediate]:
    """The term that a plan asks for, and the teacher, answering with what it needs too.

    origins: see `cascade.distillation.layer_map`. Raises InputError where there is nothing to compare.
    """
    if not isinstance(teacher, OnlineTeacher):
        raise InputError(
            "a hidden-state loss needs one teacher that runs beside the student",
            value=type(teacher).__name__,
            where="distill.hidden_states",
            remedy="set `teacher: {signals: online}` with one teacher, or `hidden_states: off`",
        )
    own, others = decoder_of(student), decoder_of(teacher.model)
    settings = plan.settings
    weight, depths = settings.hidden_states_weight or 0.0, (len(own.layers), len(others.layers))
    if settings.hidden_states == RELATIONS:
        pair = relation_pair(*depths, origins)
        ours, theirs = attention_parts(own, pair[0]), attention_parts(others, pair[1])
        shown = OnlineTeacher(teacher.model, teacher.corpus, theirs.modules)
        return shown, RelationTerm(weight, (pair,), ours, theirs)
    for name, decoder in (("student", own), ("teacher", others)):
        require_two_layers(name, decoder)
    pairs = state_pairs(*depths, settings.hidden_states_layers, origins)
    shown = OnlineTeacher(teacher.model, teacher.corpus, [others.layers[layer] for _, layer in pairs])
    places = tuple(own.layers[layer] for layer, _ in pairs)
    maps: tuple[nn.Parameter, ...] = ()
    if head_of(student).width != teacher.head.width:
        maps = tuple(map(nn.Parameter, fitted(student, places, shown, plan)))
    return shown, StateTerm(weight, HiddenLoss(str(settings.hidden_states)), pairs, places, maps)


def require_two_layers(name: str, decoder: Decoder) -> None:
    """Raise InputError for a model without a second-to-last layer."""
    if len(decoder.layers) < 2:
        raise InputError(
            f"the {name} has no second-to-last layer",
            value="1 layer",
            where="distill.hidden_states",
            remedy="set `hidden_states: off`, or keep two layers or more",
        )


def up_to(student: PreTrainedModel, count: int) -> set[str]:
    """Names of the parameters that the output of the first `count` layers depends on."""
    decoder = decoder_of(student)
    above = {id(parameter) for layer in decoder.layers[count:] for parameter in layer.parameters()}
    inside = {id(parameter) for layer in decoder.layers[:count] for parameter in layer.parameters()}
    inside.add(id(decoder.embeddings.weight))
    return {name for name, parameter in student.named_parameters() if id(parameter) in inside - above}
