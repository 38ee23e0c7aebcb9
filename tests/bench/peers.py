"""The peers' own pruning, by their public functions; each changes the model that it is given."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from transformers import PreTrainedModel

Importance = Callable[[Any], Tensor]
BATCH = 4


class Passing(nn.Module):
    """What torch-pruning's graph sees in place of attention, at which it hangs (its issue #527)."""

    def forward(self, hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
        """Nothing happens: no group of FFN neurons reaches through attention."""
        return hidden_states, None


@contextmanager
def attention_aside(model: PreTrainedModel) -> Iterator[None]:
    """Every attention block is out of the graph inside."""
    layers = layers_of(model)
    blocks = [layer.self_attn for layer in layers]
    for layer in layers:
        layer.self_attn = Passing()
    try:
        yield
    finally:
        for layer, block in zip(layers, blocks, strict=True):
            layer.self_attn = block


def torch_pruning_ffn(model: PreTrainedModel, ffn: int, importance: Importance) -> PreTrainedModel:
    """torch-pruning's `BasePruner`, set up as in its examples/LLMs, for the FFN groups of all layers.

    What its other groups are rooted at is ignored, so that nothing is scored that is not cut.
    """
    model.config.use_cache = False
    blocks = [layer.mlp for layer in layers_of(model)]
    ratio = 1 - (ffn + 0.5) / blocks[0].gate_proj.out_features
    with attention_aside(model), warnings.catch_warnings():
        # Gains of norms are "unwrapped parameters" to it, of which it warns one by one.
        warnings.simplefilter("ignore")
        pruner = torch_pruning.pruner.BasePruner(
            model,
            example_inputs=torch.arange(8)[None],
            importance=importance,
            pruning_ratio=ratio,
            ignored_layers=[model.get_output_embeddings(), *(block.down_proj for block in blocks)],
            # Its defaults are shared by all pruners of a process.
            in_channel_groups={},
            out_channel_groups={},
            num_heads={},
        )
        pruner.step()
    model.config.intermediate_size = ffn
    return model


def layers_of(model: PreTrainedModel) -> list[Any]:
    """Of a Llama or Qwen2."""
    return list(model.get_submodule("model.layers").children())


def magnitude() -> Importance:
    """The importance of torch-pruning's examples/LLMs: L2 norms, the mean over a group."""
    return torch_pruning.importance.GroupMagnitudeImportance(p=2, group_reduction="mean")


def optipfair() -> Any:
    """The package, without the log lines that it switches on for the whole process."""
    package = import_module("optipfair")

    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("optipfair").setLevel(logging.WARNING)
    return package


def optipfair_ffn(model: PreTrainedModel, ffn: int, rows: Tensor) -> PreTrainedModel:
    """OptiPFair's GLU pruning by MAW (also called PPM), the one of its methods that looks at activations."""
    whole: int = model.config.intermediate_size
    # It rounds the count that goes down.
    percentage = 100 * (whole - ffn + 0.5) / whole
    pruned: PreTrainedModel = optipfair().prune_model(
        model,
        neuron_selection_method="MAW",
        pruning_percentage=percentage,
        dataloader=batches(rows),
        show_progress=False,
    )
    return pruned


def optipfair_depth(model: PreTrainedModel, layers: int, rows: Tensor) -> PreTrainedModel:
    """OptiPFair's depth pruning by its layer importance."""
    package, gone = optipfair(), model.config.num_hidden_layers - layers
    scores = package.analyze_layer_importance(model, batches(rows), show_progress=False)
    chosen = sorted(sorted(scores, key=lambda index: scores[index])[:gone])
    pruned: PreTrainedModel = package.prune_model(
        model, pruning_type="DEPTH", pruning_percentage=None, show_progress=False, layer_indices=chosen
    )
    return pruned


def batches(rows: Tensor) -> list[tuple[Tensor]]:
    """As a data loader would give them."""
    return [(batch.long(),) for batch in rows.split(BATCH)]
