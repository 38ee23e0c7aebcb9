"""The methods beside activations, against sums by hand and on every architecture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cascade.errors import InputError
from cascade.importance.method import Method, Scoring
from cascade.importance.scores import score
from cascade.importance.scoring import scores_of
from cascade.models.decoder import decoder_of
from cascade.planning.axes import Axis
from cascade.pruning.selection import score_shapes
from tests.architectures import ARCHITECTURES, EXPERTS, UNGROUPED, tiny


def tokens(rows: int = 3) -> Tensor:
    return torch.randint(0, 256, (rows, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_axis_has_a_finite_score_for_every_unit(name: str, method: Method) -> None:
    model = tiny(name)
    shapes = score_shapes(decoder_of(model).architecture)
    scores = scores_of(score(model, tokens(), method).statistics, Scoring(), dropped=2)
    needed = {"layers", "hidden", "ffn", "kv_groups"}
    needed |= set() if name in UNGROUPED else {"heads_per_group"}
    needed |= {"experts"} if name in EXPERTS else set()
    assert needed <= scores.keys()
    for axis in needed:
        assert tuple(scores[axis].shape) == shapes[Axis(axis)]
        assert scores[axis].isfinite().all()
        assert len(scores[axis].unique()) > scores[axis].numel() // 2
    assert all(parameter.grad is None for parameter in model.parameters())


def test_activations_of_a_class_that_flattens_its_tokens() -> None:
    """OPT's second norm of a layer sees [B*T, D]; its channels count one by one all the same."""
    model, outputs = tiny("opt"), list[Tensor]()
    norms = [
        n
        for layer in model.model.decoder.layers
        for n in (layer.self_attn_layer_norm, layer.final_layer_norm)
    ]
    for norm in [*norms, model.model.decoder.final_layer_norm]:
        norm.register_forward_hook(lambda module, inputs, output: outputs.append(output.reshape(-1, 64)))
    scores = score(model, tokens(), Method.ACTIVATION).statistics
    expected = sum(output.double().square().mean(0).sqrt() for output in outputs)
    torch.testing.assert_close(scores["hidden.rms"].double(), expected, rtol=1e-5, atol=1e-7)


def test_experts_are_scored_by_their_mean_router_probability() -> None:
    model, states = tiny("qwen3_moe"), list[Tensor]()
    router = model.model.layers[1].mlp.gate
    router.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
    scores = score(model, tokens(), Method.ACTIVATION).statistics
    probabilities = (torch.cat(states).reshape(-1, 64) @ router.weight.T).softmax(-1).mean(0)
    torch.testing.assert_close(scores["experts.probability"][1], probabilities.detach(), rtol=1e-5, atol=1e-7)


def test_taylor_is_the_sum_of_weight_times_gradient_over_a_unit() -> None:
    model = tiny("llama")
    scores = score(model, tokens(), Method.TAYLOR).statistics
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    product = {name: (p * p.grad).abs().detach() for name, p in model.named_parameters()}
    layer = "model.layers.2."
    by_rows = [product[f"{layer}mlp.{name}_proj.weight"].sum(1) for name in ("gate", "up")]
    neurons = torch.stack([*by_rows, product[f"{layer}mlp.down_proj.weight"].sum(0)]).mean(0)
    torch.testing.assert_close(scores["ffn"][2], neurons, rtol=1e-3, atol=1e-7)
    q, o = product[f"{layer}self_attn.q_proj.weight"], product[f"{layer}self_attn.o_proj.weight"]
    heads = torch.stack([q.reshape(4, -1).sum(1), o.T.reshape(4, -1).sum(1)]).mean(0)
    torch.testing.assert_close(scores["heads_per_group"][2].flatten(), heads, rtol=1e-3, atol=1e-7)
    names = [name for name in product if name.startswith(layer)]
    whole = torch.stack([product[name].sum() for name in names]).mean()
    torch.testing.assert_close(scores["layers"][2], whole, rtol=1e-3, atol=1e-7)


def test_magnitude_is_the_squared_norm_of_a_units_weights_also_where_they_are_fused() -> None:
    model = tiny("phi3")
    mlp = model.model.layers[1].mlp
    halves = mlp.gate_up_proj.weight.square().sum(1)
    expected = (halves[:128] + halves[128:] + mlp.down_proj.weight.square().sum(0)) / 2
    found = score(model, tokens(), Method.MAGNITUDE).statistics["ffn"][1]
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-6)

    model = tiny("gpt_oss")
    experts = model.model.layers[1].mlp.experts
    pairs, biases = experts.gate_up_proj.square().sum(1), experts.gate_up_proj_bias.square()
    expected = pairs[:, ::2] + pairs[:, 1::2] + biases[:, ::2] + biases[:, 1::2]
    expected = (expected + experts.down_proj.square().sum(2)) / 3
    found = score(model, tokens(), Method.MAGNITUDE).statistics["ffn"][1]
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-6)


def test_random_follows_its_seed() -> None:
    model = tiny("llama")
    first, again, other = (
        score(model, tokens(), Method.RANDOM, seed=seed).statistics["ffn"] for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_taylor_leaves_the_model_as_it_was_and_names_a_broken_gradient() -> None:
    model = tiny("llama").train()
    model.lm_head.weight.requires_grad_(False)
    score(model, tokens(), Method.TAYLOR)
    assert model.training
    assert not model.lm_head.weight.requires_grad
    with pytest.raises(InputError, match="no tokens"):
        score(model, tokens(0), Method.TAYLOR)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="not finite") as caught:
        score(model, tokens(), Method.TAYLOR)
    assert caught.value.value in dict(model.named_parameters())
