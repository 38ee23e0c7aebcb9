"""Neurons of experts: seen in the products that transformers computes, against the formulas of one layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cascade.importance.agreement import doubts
from cascade.importance.calibration import calibrate
from cascade.importance.method import Scoring
from cascade.planning.axes import Axis
from tests.architectures import tiny


def tokens(rows: int = 3, length: int = 16) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_neurons_of_experts_are_scored_over_the_tokens_routed_to_them(name: str) -> None:
    """Layer 1's experts get the recorded states again; their products are taken apart by hand."""
    model, calls = tiny(name), list[tuple[Tensor, ...]]()
    experts = model.model.layers[1].mlp.experts
    experts.register_forward_pre_hook(
        lambda module, inputs, keywords: calls.append((*inputs, *keywords.values())), with_kwargs=True
    )
    found = calibrate(model, tokens()).statistics
    values_NEF = torch.zeros(48, 4, 128)
    states, chosen = (torch.cat([call[place] for call in calls]) for place in (0, 1))
    for expert in range(4):
        own = (chosen == expert).any(-1)
        assert own.any()
        weight = experts.gate_up_proj[expert].detach()
        if name == "gpt_oss":
            both = states[own] @ weight + experts.gate_up_proj_bias[expert].detach()
            gate, up = (
                both[:, ::2].clamp(max=experts.limit),
                both[:, 1::2].clamp(-experts.limit, experts.limit),
            )
            values_NEF[own, expert] = (up + 1) * gate * torch.sigmoid(gate * experts.alpha)
        else:
            gate, up = (states[own] @ weight.T).chunk(2, dim=-1)
            values_NEF[own, expert] = functional.silu(gate) * up
    rows = values_NEF.double().unflatten(0, (3, 16))
    expected = {
        "ffn.rms": rows.square().mean((0, 1)).sqrt(),
        "ffn.mean": rows.abs().mean((0, 1)),
        "ffn.l2_mean": rows.abs().mean(1).square().sum(0).sqrt(),
    }
    for key, values in expected.items():
        torch.testing.assert_close(found[key][1].double(), values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "over"), [("mixtral", 1), ("gpt_oss", 2)])
def test_an_expert_that_no_token_reaches_is_scored_by_its_weights(name: str, over: int) -> None:
    model = tiny(name)
    mlp = model.model.layers[2].mlp
    handle = mlp.experts.register_forward_pre_hook(
        lambda module, inputs, keywords: ((inputs[0], inputs[1].clamp(max=2), *inputs[2:]), keywords),
        with_kwargs=True,
    )
    found = calibrate(model, tokens()).statistics["ffn.mean"]
    handle.remove()
    norms = mlp.experts.down_proj.detach().norm(dim=over)
    torch.testing.assert_close(found[2, 3], norms[3])
    assert not torch.allclose(found[2, 2], norms[2])


def test_experts_of_an_implementation_that_is_not_recognised_are_scored_by_their_weights() -> None:
    model = tiny("mixtral")
    for layer in model.model.layers:
        vars(layer.mlp.experts)["forward"] = lambda states, *routing: states
    measured = calibrate(model, tokens())
    downs = torch.stack([layer.mlp.experts.down_proj.detach() for layer in model.model.layers])
    torch.testing.assert_close(measured.statistics["ffn.rms"], downs.norm(dim=2))
    assert measured.agreement["ffn.rms"] == 0.5
    assert "ffn" in doubts(measured.agreement, measured.tokens, Scoring(), [Axis.FFN])[0]


def test_the_experts_implementation_is_put_back() -> None:
    model = tiny("mixtral")
    before = model.config._experts_implementation
    inside = list[str]()
    model.model.layers[0].register_forward_hook(
        lambda *_: inside.append(model.config._experts_implementation)
    )
    model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        calibrate(model, tokens())
    assert inside == ["eager"]
    assert model.config._experts_implementation == before
    assert before != "eager"


def fail(*_: object) -> None:
    raise RuntimeError("on purpose")
