"""Published pruning recipes by name: each sets many fields of `prune` at once.

ministral3: Mistral AI, "Ministral 3", 2601.08584, section 3 and Algorithm 2. Layers by mean
|output| / |input|, hidden channels by one global PCA rotation, FFN neurons by mean |silu(W1 x) * W3 x|; heads
are never cut. minitron: Muralidharan et al., 2407.14679, sections 2.2 and 2.3, with its best practices: width
before depth, aggregation over batch by L2 and over the sequence by mean, pruned query heads folded into the
kept ones. Where the paper would retrain candidate shapes, set `candidates`. Both distil with forward KL on
logits alone at temperature 1 from the original parent, which is the default here.

Where a child differs from a literal reading, and why:

- minitron trims the gains of the norms, here they are also multiplied by sqrt(D / D') (see
  `cascade.pruning.rescaling`): a trimmed RMSNorm divides by the mean square of fewer channels, and only with
  the factor is a child its parent with the channels masked. SmolLM2-135M cut from 576 channels alone, scored
  on 4096 and measured on the next 2048 tokens of WikiText-2 validation, parent 3.380 nats: 558, 504, 432, 360
  channels 3.509 4.163 5.271 6.917 with the factor and 3.519 4.381 5.960 7.717 without. A gain can learn it.
- minitron's folding is read as `cascade.pruning.folding` says; ministral3's PCA is about zero and fitted in
  the uncut model, over the layers that stay, as `cascade.pruning.principal` says.
- All scores are measured once, in the uncut model: neurons of ministral3 are not scored again after layers
  and hidden channels went, and minitron's hidden channels count the norms of layers that go as well.
- A tied parent comes out of a rotation untied, because the final norm's gain does not commute with it.
- Every size obeys the planner's legal steps, and the KV groups of a class with one head each are its heads.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from cascade.importance.method import Aggregation, LayerScore, Method
from cascade.planning.axes import Axis
from cascade.pruning.repair import Repair


class Preset(StrEnum):
    """NONE leaves every field as it is written."""

    NONE = "none"
    MINISTRAL3 = "ministral3"
    MINITRON = "minitron"


FIELDS: dict[Preset, dict[str, Any]] = {
    Preset.NONE: {},
    Preset.MINISTRAL3: {
        "importance": Method.ACTIVATION,
        "layer_score": LayerScore.NORM_RATIO,
        "contiguous_layers": False,
        "aggregation": Aggregation.MEAN,
        "rotate": True,
        "repair": Repair.NONE,
    },
    Preset.MINITRON: {
        "importance": Method.ACTIVATION,
        "layer_score": LayerScore.PERPLEXITY,
        "contiguous_layers": False,
        "aggregation": Aggregation.L2_MEAN,
        "rotate": False,
        "repair": Repair.FOLD_HEADS,
    },
}
# What a preset cuts where a recipe names no axes, as far as the parent has them.
AXES: dict[Preset, tuple[Axis, ...]] = {
    Preset.MINISTRAL3: (Axis.LAYERS, Axis.HIDDEN, Axis.FFN),
    Preset.MINITRON: (Axis.HIDDEN, Axis.FFN, Axis.HEADS_PER_GROUP),
}
