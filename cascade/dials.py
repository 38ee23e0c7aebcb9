"""The dials of a stage: how its child is cut, how it is taught, and how its context is extended."""

from __future__ import annotations

from enum import StrEnum

from pydantic import model_validator

from cascade.distillation.objectives import Objective, check_weight
from cascade.distillation.schedules import Schedule, WeightSchedule
from cascade.fields import Bytes, Count, Section, setting
from cascade.importance.method import Aggregation, LayerScore, Method, Scoring
from cascade.models.positions import RopeSettings, RopeType
from cascade.planning.axes import Axis
from cascade.presets import AXES, FIELDS, Preset
from cascade.pruning.repair import Repair


class Precision(StrEnum):
    """Of weights and KV cache in a memory budget."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"

    @property
    def bytes(self) -> int:
        """Of one value."""
        return {Precision.FLOAT32: 4, Precision.BFLOAT16: 2, Precision.INT8: 1}[self]


class Shape(Section):
    """Sizes chosen by hand; what is left empty stays as it is in the model before."""

    layers: int | None = setting(None, 0, "Layers", "Decoder layers.", ge=1)
    hidden: int | None = setting(None, 1, "Hidden size", "Channels of the residual stream.", ge=1)
    ffn: int | None = setting(None, 2, "FFN size", "Neurons of a layer's FFN, or of each expert.", ge=1)
    kv_groups: int | None = setting(
        None, 3, "KV groups", "Groups of heads with a common key and value.", ge=1
    )
    heads_per_group: int | None = setting(None, 4, "Heads per group", "Query heads of each KV group.", ge=1)
    experts: int | None = setting(None, 5, "Experts", "Experts of a layer.", ge=1)

    def sizes(self) -> dict[Axis, int]:
        """What is set, by axis."""
        return {axis: size for axis in Axis if (size := getattr(self, axis.value)) is not None}


DIALS = ("parameters", "ratio", "memory", "latency")


class Prune(Section):
    """One dial: `parameters`, `ratio`, `memory` or `latency`; or the sizes themselves in `shape`."""

    parameters: Count | None = setting(
        None, 0, "Parameters", "The child's parameters in total, embeddings included, such as 100M.", ge=1
    )
    ratio: float | None = setting(
        None,
        1,
        "Ratio",
        "Share of the ORIGINAL parent's non-embedding parameters that the child keeps.",
        gt=0,
        lt=1,
    )
    memory: Bytes | None = setting(
        None, 2, "Memory", "Bytes of the child's weights and one KV cache, such as 300MB.", ge=1
    )
    latency: float | None = setting(
        None,
        3,
        "Latency",
        "Milliseconds of a forward pass over one row of the corpus, measured on this machine.",
        gt=0,
    )
    shape: Shape = setting(Shape(), 4, "Shape", "Sizes chosen by hand, in place of a dial.")
    preset: Preset = setting(
        Preset.NONE,
        5,
        "Preset",
        "ministral3 or minitron: prune as published; replaces the defaults from `axes` to `repair`.",
    )
    axes: tuple[Axis, ...] = setting(
        (),
        6,
        "Axes",
        "What the planner may cut; empty: those of the preset, or of layers, hidden, ffn, kv_groups, "
        "that the parent allows.",
    )
    importance: Method = setting(
        Method.ACTIVATION,
        7,
        "Importance",
        "How units are scored: activation, taylor (gradients), magnitude (weights), random (the control).",
    )
    layer_score: LayerScore = setting(
        LayerScore.BLOCK_INFLUENCE,
        8,
        "Layer score",
        "Of `activation`: block_influence, norm_ratio, or perplexity or logit_mse when the layer is dropped.",
    )
    contiguous_layers: bool = setting(
        False,
        9,
        "Contiguous layers",
        "Of `activation`: drop the least important block of layers.",
    )
    aggregation: Aggregation = setting(
        Aggregation.RMS,
        10,
        "Aggregation",
        "Of `activation`: rms, mean (of absolute values), or l2_mean (mean over a sequence, then L2).",
    )
    rotate: bool = setting(
        False, 11, "Rotate", "Cut hidden channels after a PCA rotation; the child's embeddings come untied."
    )
    repair: Repair = setting(
        Repair.LEAST_SQUARES,
        12,
        "Repair",
        "least_squares: fit what reads cut neurons or heads anew; fold_heads: residual folding; none.",
    )
    calibration_tokens: Count = setting(
        32_768,
        13,
        "Calibration tokens",
        "Tokens that score what to keep, and that repairs are fitted to.",
        ge=64,
    )
    candidates: int = setting(
        1,
        14,
        "Candidates",
        "Shapes that race: each is taught briefly, the better half goes on.",
        ge=1,
        le=64,
    )
    memory_context: Count = setting(
        4096, 15, "Memory context", "Tokens of the KV cache that `memory` counts.", ge=1
    )
    memory_precision: Precision = setting(
        Precision.BFLOAT16, 16, "Memory precision", "Of weights and KV cache that `memory` counts."
    )

    @model_validator(mode="after")
    def one_dial(self) -> Prune:
        """No two dials say how small the child is, and nothing contradicts the preset."""
        if len(self.stated) > 1:
            names = ", ".join(f"`{name}`" for name in DIALS)
            raise ValueError(f"set exactly one of {names}, or sizes in `shape`")
        if self.shape.sizes() and self.candidates > 1:
            raise ValueError("`candidates` are shapes that meet a dial; `shape` leaves only one")
        for name in ("layer_score", "contiguous_layers", "aggregation"):
            given = getattr(self, name)
            if self.importance is not Method.ACTIVATION and given != type(self).model_fields[name].default:
                raise ValueError(f"`{name}` belongs to importance activation, not {self.importance.value}")
        for name, value in FIELDS[self.preset].items():
            given, default = getattr(self, name), type(self).model_fields[name].default
            if given not in (default, value):
                raise ValueError(
                    f"preset {self.preset.value} sets `{name}` to {value}; leave it out, not {given}"
                )
        return self

    @property
    def stated(self) -> list[str]:
        """The dials that are set, `shape` among them."""
        return [name for name in DIALS if getattr(self, name) is not None] + ["shape"] * bool(
            self.shape.sizes()
        )

    @property
    def of_the_cut(self) -> str:
        """What is set and says how to cut rather than how small the child becomes."""
        names = ("preset", *FIELDS[Preset.MINISTRAL3], "calibration_tokens")
        fields = type(self).model_fields
        return ", ".join(f"`{name}`" for name in names if getattr(self, name) != fields[name].default)

    @property
    def resolved(self) -> Prune:
        """With what the preset sets, and the preset's name gone: equal cuts have equal keys."""
        return self.model_copy(update={**FIELDS[self.preset], "preset": Preset.NONE})

    @property
    def preset_axes(self) -> tuple[Axis, ...]:
        """What the preset would cut; empty without one."""
        return AXES.get(self.preset, ())

    @property
    def scoring(self) -> Scoring:
        """Which of the measured statistics decide."""
        dials = self.resolved
        return Scoring(dials.layer_score, dials.contiguous_layers, dials.aggregation)


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
