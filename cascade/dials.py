"""The dials of a cut: how small a child becomes, and how its parent is pruned."""

from __future__ import annotations

from enum import StrEnum

from pydantic import model_validator

from cascade.fields import Bytes, Count, Section, setting
from cascade.importance.method import Aggregation, LayerScore, Method, Scoring
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
