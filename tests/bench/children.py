"""Every way to make a child of one parent at one budget, ours and the peers', by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from cascade.architecture import Architecture
from cascade.dials import Prune
from cascade.distillation.settings import rows_of
from cascade.family.planner import allowed_axes
from cascade.importance.method import Method
from cascade.importance.scores import score
from cascade.importance.scoring import scores_of
from cascade.models.decoder import decoder_of
from cascade.planning.axes import Axis
from cascade.planning.budget import ratio_budget
from cascade.planning.plan import plan_child
from cascade.presets import Preset
from cascade.pruning.proof import proof_of
from cascade.pruning.prune import Surgery, prune
from cascade.pruning.repair import Repair
from tests.bench.parents import Text
from tests.bench.peers import magnitude, optipfair_depth, optipfair_ffn, torch_pruning_ffn

DEFAULT = "cascade, default"
# One layer of a parent is a coarse step: a peer that drops whole layers may pass the budget by this share.
LENIENCE = 1e-3


@dataclass(frozen=True)
class Task:
    """What all children share. rows: calibration tokens [N, T], at least those of every calibration."""

    parent: PreTrainedModel
    ratio: float
    rows: Tensor
    measured: dict[tuple[Any, ...], dict[str, Tensor]] = field(default_factory=dict)

    @cached_property
    def source(self) -> Architecture:
        """The parent's shape."""
        return decoder_of(self.parent).architecture

    def statistics(self, method: Method, drops: tuple[int, ...], draw: int) -> dict[str, Tensor]:
        """Measured once for all children that decide by them."""
        key = (method, drops, draw)
        if key not in self.measured:
            found = score(self.parent, self.rows, method, drops=drops, seed=draw)
            self.measured[key] = found.statistics
        return self.measured[key]

    def shape(self, dials: Prune) -> Architecture:
        """What the planner gives for the dials."""
        axes = allowed_axes(dials.axes, dials.preset_axes, proof_of(decoder_of(self.parent)))
        budget = ratio_budget(self.source, self.ratio)
        fitted = dials.resolved.repair is Repair.LEAST_SQUARES
        return plan_child(
            self.source, self.source, budget, axes, rotates=dials.resolved.rotate, fitted=fitted
        )

    @property
    def ffn(self) -> int:
        """The width at which a cut of the FFN alone meets the budget."""
        return self.shape(self.dials(axes=(Axis.FFN,))).ffn

    @property
    def depth(self) -> int:
        """The layers at which a cut of layers alone meets the budget, nearly."""
        limit = self.ratio * (1 + LENIENCE) * self.source.non_embedding_parameters
        outer = self.source.non_embedding_parameters - self.source.layers * self.source.layer_parameters
        return int((limit - outer) / self.source.layer_parameters)

    def dials(self, **fields: Any) -> Prune:
        """A recipe's `prune` with the task's budget and what else is said."""
        return Prune(ratio=self.ratio, **fields)


Maker = Callable[[Task], PreTrainedModel]


def cascade_child(
    task: Task, *, draw: int = 0, target: Architecture | None = None, **fields: Any
) -> PreTrainedModel:
    """As a stage of a family would cut it by default, to the planner's shape unless one is given."""
    dials = task.dials(**fields)
    target, resolved = task.shape(dials) if target is None else target, dials.resolved
    dropped = task.source.layers - target.layers
    statistics = task.statistics(resolved.importance, dials.scoring.drops(dropped), draw)
    surgery = Surgery(resolved.rotate, resolved.repair)
    scores = scores_of(statistics, dials.scoring, dropped)
    return prune(task.parent, target, scores, surgery=surgery, rows=task.rows)[0]


def unrepaired_child(task: Task) -> PreTrainedModel:
    """The default's shape and scores without its repair."""
    return cascade_child(task, target=task.shape(task.dials()), repair=Repair.NONE)


def calibration_rows(text: Text) -> Tensor:
    """As many as a recipe takes by default."""
    tokens = Prune(ratio=0.5).calibration_tokens
    return text.corpus.train[: rows_of(tokens, text.corpus.sequence_length)]


def peer_child(task: Task, make: Callable[[PreTrainedModel], PreTrainedModel]) -> PreTrainedModel:
    """Peers change the model that they are given, so each gets a copy."""
    return make(copy.deepcopy(task.parent))


def makers(draws: Iterable[int]) -> Iterator[tuple[str, Maker]]:
    """Name and maker of every child; those with random scores, one for each of `draws`, have one name."""
    yield DEFAULT, cascade_child
    yield "the same shape, repair none", unrepaired_child
    for preset in (Preset.MINISTRAL3, Preset.MINITRON):
        yield f"preset {preset}", partial(cascade_child, preset=preset)
    yield "torch-pruning, FFN by magnitude", torch_pruning_child
    yield "OptiPFair, FFN by MAW and data", optipfair_child
    yield "OptiPFair, least important layers", optipfair_shallow
    for draw in draws:
        yield "random scores", partial(cascade_child, importance=Method.RANDOM, draw=draw)


def torch_pruning_child(task: Task) -> PreTrainedModel:
    """By its own pruner and importance."""
    return peer_child(task, lambda model: torch_pruning_ffn(model, task.ffn, magnitude()))


def optipfair_child(task: Task) -> PreTrainedModel:
    """Its FFN pruning by weights and activations over our calibration rows."""
    return peer_child(task, lambda model: optipfair_ffn(model, task.ffn, task.rows))


def optipfair_shallow(task: Task) -> PreTrainedModel:
    """Its depth pruning by its importance of layers over our calibration rows."""
    return peer_child(task, lambda model: optipfair_depth(model, task.depth, task.rows))
