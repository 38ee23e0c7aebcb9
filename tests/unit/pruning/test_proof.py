"""The proof finds out a class that computes something else than its sizes suggest."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cascade.errors import InputError
from cascade.models.decoder import decoder_of
from cascade.models.entries import Entries
from cascade.planning.axes import Axis
from cascade.pruning import proof
from cascade.pruning.proof import proof_of
from cascade.pruning.prune import prune
from tests.architectures import ARCHITECTURES, EXPERTS, UNGROUPED, tiny


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that was proved before a class was changed."""
    monkeypatch.setattr(proof, "_known", {})


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_axis_that_an_architecture_has_is_proved(name: str) -> None:
    without = {Axis.EXPERTS} - ({Axis.EXPERTS} if name in EXPERTS else set())
    without |= {Axis.HEADS_PER_GROUP} if name in UNGROUPED else set()
    assert set(proof_of(decoder_of(tiny(name))).refused) == without


@pytest.mark.parametrize(
    ("name", "parameter", "order"),
    [
        ("phi3", "mlp.gate_up_proj.weight", Entries.FFN_HALVES),
        ("gpt_oss", "mlp.experts.gate_up_proj", Entries.FFN_PAIRS),
        ("phi3", "self_attn.qkv_proj.weight", Entries.QKV_BLOCKS),
        ("gpt_neox", "attention.query_key_value.weight", Entries.QKV_GROUPS),
    ],
)
def test_the_order_inside_fused_projections_is_found(name: str, parameter: str, order: Entries) -> None:
    assert order in proof_of(decoder_of(tiny(name))).anatomy.layer[parameter]


def test_neurons_that_meet_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    ffn = type(model.model.layers[0].mlp)

    def mixing(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        product = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(product - product.mean(-1, keepdim=True))

    monkeypatch.setattr(ffn, "forward", mixing)
    decoder = decoder_of(model)
    found = proof_of(decoder)
    assert set(found.refused) == {Axis.FFN, Axis.EXPERTS}
    target = replace(decoder.architecture, ffn=64)
    with pytest.raises(InputError, match=r"exactly on the axis ffn.*differs") as caught:
        prune(model, target, {})
    assert "kv_groups" in caught.value.remedy


def test_a_width_that_is_computed_with_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    layer = type(model.model.layers[0])
    plain = layer.forward

    def scaled(self: torch.nn.Module, hidden_states: torch.Tensor, *rest: object, **more: object) -> object:
        return plain(self, hidden_states * hidden_states.shape[-1] ** 0.1, *rest, **more)

    monkeypatch.setattr(layer, "forward", scaled)
    assert Axis.HIDDEN in proof_of(decoder_of(model)).refused


def test_a_layer_that_computes_with_its_number_is_refused() -> None:
    model = tiny("gpt2", scale_attn_by_inverse_layer_idx=True)
    assert Axis.LAYERS in proof_of(decoder_of(model)).refused
