"""The shapes of a family's children: every stage's candidates, from its dial and what the parent allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from cascade.architecture import Architecture
from cascade.dials import Prune
from cascade.errors import InputError
from cascade.evaluation.latency import Bench, Latency
from cascade.family.graph import StagePlan
from cascade.models.decoder import Decoder
from cascade.planning.axes import DEFAULT_AXES, Axis
from cascade.planning.budget import (
    Budget,
    latency_budget,
    memory_budget,
    parameter_budget,
    ratio_budget,
)
from cascade.planning.explicit import chosen_child
from cascade.planning.plan import distinct, rank_children
from cascade.pruning.proof import Proof
from cascade.pruning.repair import Repair
from cascade.pruning.rotation import rotation_refusal
from cascade.recipe import Recipe

# Shapes of a stage that a plan prints beside the chosen one.
SHOWN = 4
# A prediction that was too low is corrected by what was measured, this often.
CORRECTIONS = 5
CPU = torch.device("cpu")


@dataclass(frozen=True)
class FamilyPlanner:
    """Plans every stage of a recipe.

    decoder: of the model that stages are cut from, at first the parent. latency_folder: where measurements
    are kept. device: what they are made on. given: planners of students that are given, by their checkpoint;
    what follows is cut from them. original: the parent's shape, which ratios are shares of; by default the
    decoder's.
    """

    recipe: Recipe
    decoder: Decoder
    proof: Proof
    latency_folder: Path
    device: torch.device = CPU
    given: Mapping[str, FamilyPlanner] = field(default_factory=dict)
    original: Architecture | None = None

    def __call__(self, winners: dict[str, int]) -> tuple[StagePlan, ...]:
        """The candidates of every stage, each no larger than the winner of the stage before on any axis.

        winners: by stage, of races that are over; an open one is taken to be won by its first candidate.
        """
        planner, seed, plans = self, self.decoder.architecture, []
        for stage in self.recipe.stages:
            try:
                if stage.checkpoint:
                    planner = self.given[stage.checkpoint]
                    plan = StagePlan((planner.as_given(stage.checkpoint),), ())
                else:
                    plan = planner.stage(stage.prune, seed)
            except InputError as error:
                error.where = f"stage {stage.name}, {error.where}"
                raise
            plans.append(plan)
            seed = plan.candidates[winners.get(stage.name, 0)]
        return tuple(plans)

    def as_given(self, checkpoint: str) -> Architecture:
        """The shape of a student that is taught as it is; raises InputError if it is no smaller."""
        shape, original = self.decoder.architecture, self.original or self.decoder.architecture
        if shape.parameters < original.parameters:
            return shape
        raise InputError(
            f"a given student must be smaller than the parent, which has {original.parameters:,} parameters",
            value=f"{checkpoint}: {shape.parameters:,} parameters",
            where="checkpoint",
            remedy="give a smaller checkpoint, or make this model the parent",
        )

    def stage(self, prune: Prune, seed: Architecture) -> StagePlan:
        """The candidates of one stage, and the shapes ranked after them."""
        if sizes := prune.shape.sizes():
            axes = allowed_axes(tuple(sizes), (), self.proof)
            rotates = prune.resolved.rotate
            child = chosen_child(self.decoder.architecture, seed, sizes, axes=axes, rotates=rotates)
            self.require_rotation(prune, seed, [child])
            return StagePlan((child,), ())
        axes = allowed_axes(prune.axes, self.preset_axes(prune), self.proof)
        count = max(prune.candidates, SHOWN)
        found = (
            self.fast_enough(prune, seed, axes) if prune.latency else self.ranked(prune, seed, axes, count)
        )
        candidates, others = found[: prune.candidates], found[prune.candidates :]
        self.require_rotation(prune, seed, candidates)
        return StagePlan(tuple(candidates), tuple(others))

    def ranked(
        self, prune: Prune, seed: Architecture, axes: tuple[Axis, ...], count: int, strictness: float = 1.0
    ) -> list[Architecture]:
        """Legal shapes within the dial's budget, cheapest cuts first, no near twins; maybe too few."""
        original, rotates = self.decoder.architecture, prune.resolved.rotate
        budget, fitted = self.budget(prune, strictness), prune.resolved.repair is Repair.LEAST_SQUARES
        ranked = rank_children(original, seed, budget, axes, rotates=rotates, fitted=fitted)
        return distinct(ranked, original, count)

    def budget(self, prune: Prune, strictness: float) -> Budget:
        """What the dial allows; strictness: how much slower than predicted shapes were measured to be."""
        if prune.parameters:
            return parameter_budget(prune.parameters)
        if prune.ratio:
            return ratio_budget(self.original or self.decoder.architecture, prune.ratio)
        if prune.memory:
            return memory_budget(prune.memory, prune.memory_context, prune.memory_precision.bytes)
        rates = self.latency.rates(self.decoder.architecture)
        return latency_budget(prune.latency or 0.0, lambda shape: strictness * rates.predict(shape))

    @cached_property
    def latency(self) -> Latency:
        """Measurements on this machine, kept: planning again must not choose another shape."""
        decoder, length = self.decoder, self.recipe.corpus.sequence_length
        bench = Bench(type(decoder.model), decoder.model.config, decoder.anatomy, length, self.device)
        return Latency(bench, self.latency_folder / f"{bench.name}.json")

    def fast_enough(self, prune: Prune, seed: Architecture, axes: tuple[Axis, ...]) -> list[Architecture]:
        """Shapes whose measured latency meets the dial, of those that the rates predict to meet it."""
        limit, rates = prune.latency or 0.0, self.latency.rates(self.decoder.architecture)
        strictness = max(1.0, self.latency.milliseconds(seed) / rates.predict(seed))
        for _ in range(CORRECTIONS):
            # Some may turn out too slow.
            ranked = self.ranked(prune, seed, axes, 2 * prune.candidates - 1, strictness)
            measured = [self.latency.milliseconds(shape) for shape in ranked]
            if met := [shape for shape, found in zip(ranked, measured, strict=True) if found <= limit]:
                return met
            strictness *= min(measured) / limit
        raise InputError(
            f"no shape was measured to be that fast; the nearest took {min(measured):.4g} ms",
            value=f"latency: {limit:g}",
            where="prune",
            remedy=f"ask for more, or delete {self.latency.path} and plan again on an idle machine",
        )

    def preset_axes(self, prune: Prune) -> tuple[Axis, ...]:
        """The axes of the preset; where every query head has a key of its own, heads are KV groups."""
        ungrouped = self.decoder.architecture.heads_per_group == 1
        heads = Axis.KV_GROUPS if ungrouped else Axis.HEADS_PER_GROUP
        return tuple(heads if axis is Axis.HEADS_PER_GROUP else axis for axis in prune.preset_axes)

    def require_rotation(self, prune: Prune, seed: Architecture, shapes: list[Architecture]) -> None:
        """Raise InputError if hidden channels are to be rotated and the parent's class does not allow it."""
        if not prune.resolved.rotate or all(shape.hidden == seed.hidden for shape in shapes):
            return
        if reason := rotation_refusal(self.decoder):
            raise InputError(
                f"the parent's hidden channels cannot be rotated exactly: {reason}",
                value=self.decoder.model.config.model_type,
                where="prune.rotate",
                remedy="leave `rotate` and the preset out, or cut other axes than hidden",
            )


def allowed_axes(asked: tuple[Axis, ...], preset: tuple[Axis, ...], proof: Proof) -> tuple[Axis, ...]:
    """The axes asked for, or those of the preset or the default that the parent allows.

    Raises InputError for one that was asked for and is not allowed, or if none is, with the reason.
    """
    wanted = asked or preset or DEFAULT_AXES
    refused = [axis for axis in wanted if axis in proof.refused]
    allowed = tuple(axis for axis in wanted if axis not in proof.refused)
    if allowed and not (asked and refused):
        return allowed
    reasons = "; ".join(f"{axis}: {proof.refused[axis]}" for axis in refused)
    raise InputError(
        f"the parent cannot be cut exactly: {reasons}",
        value=", ".join(refused),
        where="prune.axes",
        remedy=f"cut other axes: {proof.others()}",
    )
