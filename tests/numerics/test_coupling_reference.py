"""What is cut together, found by sizes, against torch-pruning's dependency graph, which follows autograd.

torch-pruning hangs on grouped queries, so one Linear(D, D) stands in for every attention block: it couples
the residual stream through attention, and the heads are left to the masking tests.
"""

from __future__ import annotations

import pytest
import torch
import torch_pruning
from torch import Tensor, nn
from transformers import PreTrainedModel

from cascade.models.decoder import decoder_of
from cascade.models.entries import Entries
from tests.architectures import tiny


class StandIn(nn.Module):
    """D channels in, D channels out, every one mixed with every other."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mix = nn.Linear(hidden, hidden)

    def forward(self, hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
        return self.mix(hidden_states), None


def traced(model: PreTrainedModel, root: nn.Module, size: int) -> set[tuple[str, int]]:
    """Name and dimension of every parameter that loses entries with the outputs of `root`."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    graph = torch_pruning.DependencyGraph().build_dependency(
        model,
        example_inputs=torch.zeros(1, 2, dtype=torch.long),
        forward_fn=lambda model, tokens: model(input_ids=tokens, use_cache=False).logits,
        verbose=False,
    )
    embedding = isinstance(root, nn.Embedding)
    how = torch_pruning.prune_embedding_out_channels if embedding else torch_pruning.prune_linear_out_channels
    found = set()
    for dependency, _ in graph.get_pruning_group(root, how, idxs=list(range(size))):
        target = dependency.target.module
        outputs = graph.is_out_channel_pruning_fn(dependency.handler)
        if isinstance(target, nn.Parameter):
            found.add((names[id(target)], 0))
        elif isinstance(target, nn.Embedding):
            found.add((names[id(target.weight)], 1))
        elif isinstance(target, nn.Linear):
            found.add((names[id(target.weight)], 0 if outputs else 1))
            if outputs and target.bias is not None:
                found.add((names[id(target.bias)], 0))
    return {(name, dimension) for name, dimension in found if ".mix." not in name}


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "smollm3"])
def test_channels_and_neurons_are_coupled_as_autograd_says(name: str) -> None:
    model = tiny(name)
    expected: dict[Entries, set[tuple[str, int]]] = {Entries.HIDDEN: set(), Entries.FFN: set()}
    for parameter, _, dimensions, layer in decoder_of(model).parameters():
        for dimension, entries in enumerate(dimensions):
            # The first layer's neurons stand for all, and attention is not in the graph.
            inside = entries is Entries.HIDDEN or layer == 0
            if entries in expected and inside and "self_attn" not in parameter:
                expected[entries].add((parameter, dimension))
    for layer in model.model.layers:
        layer.self_attn = StandIn(64)
    assert traced(model, model.get_input_embeddings(), 64) == expected[Entries.HIDDEN]
    assert traced(model, model.model.layers[0].mlp.gate_proj, 128) == expected[Entries.FFN]
