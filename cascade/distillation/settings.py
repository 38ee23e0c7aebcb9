"""The dials of one distillation, what is derived from the student when they are left empty, the schedule."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from cascade.distillation.objectives import DEFAULT_WEIGHTS, Objective, check_weight
from cascade.distillation.schedules import Schedule, WeightSchedule, rate_share, weight_share
from cascade.errors import InputError

# Kinds of `hidden_states`: of the residual stream, and of attention.
OF_STATES, RELATIONS = ("cosine", "mse"), "relations"
# A dial added to a recipe leaves the keys of all that does not use it as they were.
LATER = ("schedule", "cross_entropy_schedule", "hidden_states_layers")


@dataclass(frozen=True)
class DistillSettings:
    """Plain values; `None` means derived by `resolved`.

    tokens: training tokens, rounded up to whole rows. batch_rows: rows of one optimiser step.
    micro_rows: rows of one forward and backward pass (bounds memory, changes nothing but rounding).
    learning_rate: the peak. warmup and final: shares, of the steps and of the peak (usual values; others
    were not compared). clip: largest gradient norm. objective_weight: beta or alpha of an
    objective that has one. hidden_states: the kind of `cascade.distillation.intermediate`, added to the
    others with its weight, and of how many pairs of layers; None: no such term. Schedules: see
    `cascade.distillation.schedules`.
    """

    tokens: int
    batch_rows: int | None = None
    micro_rows: int | None = None
    learning_rate: float | None = None
    warmup: float = 0.1
    final: float = 0.1
    clip: float = 1.0
    weight_decay: float = 0.1
    cross_entropy_weight: float = 0.0
    objective: Objective = Objective.FORWARD_KL
    objective_weight: float | None = None
    temperature: float = 1.0
    seed: int = 0
    schedule: Schedule = Schedule.LINEAR
    cross_entropy_schedule: WeightSchedule = WeightSchedule.CONSTANT
    hidden_states: str | None = None
    hidden_states_weight: float | None = None
    hidden_states_layers: int = 1

    def __post_init__(self) -> None:
        """Raises InputError for a value outside its range."""
        for name, valid, allowed in (
            ("tokens", self.tokens >= 1, "1 or more"),
            ("batch_rows", self.batch_rows is None or self.batch_rows >= 1, "1 or more"),
            ("micro_rows", self.micro_rows is None or self.micro_rows >= 1, "1 or more"),
            ("learning_rate", self.learning_rate is None or self.learning_rate > 0, "more than 0"),
            ("warmup", 0 <= self.warmup <= 1, "0 to 1"),
            ("final", 0 <= self.final <= 1, "0 to 1"),
            ("clip", self.clip > 0, "more than 0"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("cross_entropy_weight", 0 <= self.cross_entropy_weight <= 1, "0 to 1"),
            ("temperature", self.temperature > 0, "more than 0"),
            (
                "hidden_states",
                self.hidden_states in (None, *OF_STATES, RELATIONS),
                "cosine, mse or relations",
            ),
            (
                "hidden_states_weight",
                (self.hidden_states_weight or 0) > 0 if self.hidden_states else not self.hidden_states_weight,
                "more than 0 with `hidden_states`, and to nothing without",
            ),
            (
                "hidden_states_layers",
                self.hidden_states_layers == 1
                or (self.hidden_states_layers > 1 and self.hidden_states in OF_STATES),
                "1 or more with cosine or mse, and to 1 without",
            ),
        ):
            if not valid:
                raise InputError(
                    "a distillation setting is out of range",
                    value=getattr(self, name),
                    where=name,
                    remedy=f"set it to {allowed}",
                )
        try:
            check_weight(self.objective, self.objective_weight)
        except ValueError as error:
            raise InputError(
                str(error),
                value=self.objective_weight,
                where="objective_weight",
                remedy="leave it out, or give one that the objective takes",
            ) from error

    def record(self) -> dict[str, object]:
        """Plain JSON that makes equal settings again; without what is off, or came later and is at rest."""
        return {
            name: value
            for name, value in asdict(self).items()
            if value is not None and (name not in LATER or value != getattr(DistillSettings, name))
        }

    def resolved(self, hidden: int, sequence_length: int) -> Plan:
        """Every number of the run, for a student of that width on rows of that length."""
        rows = rows_of(self.tokens, sequence_length)
        batch = min(self.batch_rows or derived_batch_rows(self.tokens, sequence_length), rows)
        micro = min(self.micro_rows or max(1, MICRO_TOKENS // sequence_length), batch)
        rate = self.learning_rate or derived_learning_rate(hidden)
        weight = self.objective_weight or DEFAULT_WEIGHTS.get(self.objective)
        settings = replace(
            self, batch_rows=batch, micro_rows=micro, learning_rate=rate, objective_weight=weight
        )
        return Plan(settings, rows, batch, micro, rate, sequence_length)


@dataclass(frozen=True)
class Plan:
    """Settings with every number filled in. rows: all training rows; a step's last batch may be short.

    compiled: whether the loss is; it changes rounding alone, and is no part of the record.
    """

    settings: DistillSettings
    rows: int
    batch_rows: int
    micro_rows: int
    peak_rate: float
    sequence_length: int
    compiled: bool = False

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return -(-self.rows // self.batch_rows)

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return self.rows * self.sequence_length

    def positions(self, step: int) -> range:
        """Training positions of the rows of `step` (from 0)."""
        return range(step * self.batch_rows, min((step + 1) * self.batch_rows, self.rows))

    def learning_rate(self, step: int) -> float:
        """Of `step` (from 0)."""
        made = self.settings
        share = rate_share(made.schedule, step, self.steps, warmup=made.warmup, final=made.final)
        return self.peak_rate * share

    def cross_entropy_weight(self, step: int) -> float:
        """Of `step` (from 0)."""
        made = self.settings
        share = weight_share(made.cross_entropy_schedule, step, self.steps, warmup=made.warmup)
        return made.cross_entropy_weight * share

    def record(self) -> dict[str, object]:
        """Plain JSON; two runs with equal records (and data) do the same arithmetic."""
        return {**self.settings.record(), "rows": self.rows, "sequence_length": self.sequence_length}


def rows_of(tokens: int, sequence_length: int) -> int:
    """Whole rows that hold at least `tokens` tokens."""
    return -(-tokens // sequence_length)


MICRO_TOKENS = 512
"""Tokens of one forward and backward pass. SmolLM2-135M cut to 85 %, float32, per second of one busy
core: 76 tokens in passes of 256, 92 in passes of 512, 84 in passes of 1024. A GPU wants larger ones:
unmeasured."""

BATCH_TOKENS, BATCH_AT, BATCH_EXPONENT = 512, 20_000, 0.383


def derived_batch_rows(tokens: int, sequence_length: int) -> int:
    """Rows of a step of 512 * (tokens / 20000)^0.383 tokens, at least one row.

    Exponent: Bergsma et al., 2505.13738 (optimal batch against training tokens, for pretraining).
    Anchor: the SmolLM2 child of `derived_learning_rate` after 6144 tokens, held-out KL to the parent
    with steps of 256 tokens 0.258, of 512 tokens 0.262: the same within noise, and AdamW with its
    gradient clipping costs 0.3 s per step whatever the batch, so the larger. Doubt: the exponent was
    not tested on distillation, whose gradients carry less noise than those of sampled labels.
    """
    return max(1, round(BATCH_TOKENS * (tokens / BATCH_AT) ** BATCH_EXPONENT / sequence_length))


def derived_learning_rate(hidden: int) -> float:
    """Peak rate 1.5e-4 * sqrt(576 / D).

    SmolLM2-135M (D = 576) without its weakest layer and 17 % of its FFN neurons, 6144 tokens of
    speeches in steps of 512, held-out KL to the parent on 1530 targets (0.314 before training):
    4e-4 0.314, 2e-4 0.266, 1e-4 0.262, 5e-5 0.270 nats; cross-entropy 3.791 before, 3.682, 3.668,
    3.681, 3.692. At 4e-4 the KL does not improve: the first steps seem to undo more than a short run
    repairs. Doubt: one seed, one width; the square root is nanochat's practice for AdamW, not measured here.
    """
    return 1.5e-4 * (576 / hidden) ** 0.5
