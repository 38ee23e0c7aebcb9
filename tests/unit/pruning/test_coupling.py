"""Which dimensions are cut together, against a list by hand, and structures that do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cascade.errors import CascadeError
from cascade.models.decoder import decoder_of
from cascade.pruning import coupling
from cascade.pruning.coupling import Unit, couple, trace
from tests.tiny import make_model

HIDDEN, FFN, QUERIES, KEYS = Unit.HIDDEN, Unit.FFN, Unit.QUERIES, Unit.KEYS
BY_HAND = {
    "self_attn.q_proj.weight": {0: QUERIES, 1: HIDDEN},
    "self_attn.q_proj.bias": {0: QUERIES},
    "self_attn.k_proj.weight": {0: KEYS, 1: HIDDEN},
    "self_attn.k_proj.bias": {0: KEYS},
    "self_attn.v_proj.weight": {0: KEYS, 1: HIDDEN},
    "self_attn.v_proj.bias": {0: KEYS},
    "self_attn.o_proj.weight": {0: HIDDEN, 1: QUERIES},
    "self_attn.o_proj.bias": {0: HIDDEN},
    "mlp.gate_proj.weight": {0: FFN, 1: HIDDEN},
    "mlp.gate_proj.bias": {0: FFN},
    "mlp.up_proj.weight": {0: FFN, 1: HIDDEN},
    "mlp.up_proj.bias": {0: FFN},
    "mlp.down_proj.weight": {0: HIDDEN, 1: FFN},
    "mlp.down_proj.bias": {0: HIDDEN},
    "input_layernorm.weight": {0: HIDDEN},
    "post_attention_layernorm.weight": {0: HIDDEN},
}


@pytest.mark.parametrize("tied", [True, False])
def test_every_dimension_of_a_llama_with_every_bias(tied: bool) -> None:
    model = make_model("llama", tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    expected = {
        f"model.layers.{layer}.{name}": dimensions
        for layer in range(4)
        for name, dimensions in BY_HAND.items()
    }
    expected |= {"model.embed_tokens.weight": {1: HIDDEN}, "model.norm.weight": {0: HIDDEN}}
    expected |= {"lm_head.weight": {1: HIDDEN}}
    assert couple(decoder_of(model)) == expected


def test_head_norms_are_never_cut() -> None:
    found = couple(decoder_of(make_model("qwen3")))
    assert not any("q_norm" in name or "k_norm" in name for name in found)


def test_the_model_keeps_its_attention() -> None:
    model = make_model("llama")
    modules = dict(model.named_modules())
    couple(decoder_of(model))
    assert dict(model.named_modules()) == modules


def test_attention_outside_the_stream_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that ignores its input stands for attention that reads something else."""

    def forward(self: nn.Module, hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
        return hidden_states.detach() * 0, None

    monkeypatch.setattr(coupling.StandIn, "forward", forward)
    with pytest.raises(CascadeError, match=r"does not run through model\.layers\.0\.self_attn"):
        trace(decoder_of(make_model("llama")))


def test_channels_that_change_their_order_are_refused() -> None:
    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.first(x).chunk(2, dim=-1)
            return self.second(torch.cat([right, left], dim=-1))

    model = Shuffled()
    graph = coupling.torch_pruning.DependencyGraph().build_dependency(model, torch.ones(1, 4))
    root = (model.first, coupling.torch_pruning.prune_linear_out_channels, 4)
    with pytest.raises(CascadeError, match="change their order"):
        coupling.collect({}, graph, root, HIDDEN)


def test_layers_of_another_kind_are_refused() -> None:
    with pytest.raises(CascadeError, match="BatchNorm1d is cut with its neighbours"):
        coupling.cut_dimensions(nn.BatchNorm1d(4), outputs=True)
