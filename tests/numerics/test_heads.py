"""Heads with a scale and a soft cap: the model's own logits, and the plain path's value and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cascade.distillation.fused import fused_distillation_loss
from cascade.distillation.objectives import DEFAULT_WEIGHTS, Objective
from cascade.distillation.states import Head, check_head, final_states, head_of
from cascade.distillation.targets import StateTargets
from cascade.errors import InputError
from tests.architectures import tiny
from tests.numerics.divergences import by_definition
from tests.tiny import make_model

IDS = torch.arange(3 * 17).view(3, 17) * 5 % 256
SHAPED = {
    "gemma2": {"final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 8.0},
}


def shaped(family: str, **overrides: object) -> PreTrainedModel:
    """A tiny decoder whose logits are large enough for its cap to bend them."""
    model = tiny(family, **{**SHAPED[family], **overrides}).double()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4)
    return model


@pytest.mark.parametrize("family", [*SHAPED, "llama", "gpt2", "gemma3_text", "gpt_oss"])
@torch.no_grad()
def test_a_head_gives_the_models_own_logits(family: str) -> None:
    model = shaped(family).float() if family in SHAPED else tiny(family)
    expected = model(input_ids=IDS, use_cache=False).logits
    head, states = head_of(model), final_states(model, IDS)
    torch.testing.assert_close(head.logits(states), expected, rtol=1e-5, atol=1e-5)
    for dtype in (torch.float32, torch.float64):
        written = torch.empty(IDS.numel(), head.vocabulary, dtype=dtype)
        assert head.logits(states.flatten(0, 1), written) is written
        torch.testing.assert_close(written.float(), expected.flatten(0, 1), rtol=1e-5, atol=1e-5)
    check_head(model, IDS[0])


@pytest.mark.parametrize("family", SHAPED)
@torch.no_grad()
def test_a_scale_or_cap_that_is_left_out_is_noticed(family: str) -> None:
    """The check is not so wide that what these heads add could slip through."""
    model = shaped(family)
    field = next(iter(SHAPED[family]))
    value = getattr(model.config, field)
    before = head_of(model).logits(final_states(model, IDS))
    setattr(model.config, field, None if family == "gemma2" else 1.0)
    after = head_of(model).logits(final_states(model, IDS))
    setattr(model.config, field, value)
    assert (before - after).abs().max() > 0.1 * before.abs().max()


def test_a_field_that_means_something_else_is_refused_by_name() -> None:
    """HyperCLOVA X multiplies by what Granite divides by."""
    model = make_model("hyperclovax", logits_scaling=4.0)
    with pytest.raises(InputError, match="not its LM head's") as caught:
        check_head(model, IDS[0])
    assert caught.value.where == "the LM head of hyperclovax"
    check_head(make_model("hyperclovax", logits_scaling=1.0), IDS[0])


def test_a_bias_is_refused_by_name() -> None:
    model = make_model("phi", num_key_value_heads=None, head_dim=None, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.bias.fill_(3.0).view(-1)[::2] = -3.0
    with pytest.raises(InputError, match="LM head") as caught:
        check_head(model, IDS[0])
    assert caught.value.where == "the LM head of phi"


@pytest.mark.parametrize("objective", Objective)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("pair", [("gemma2", "llama"), ("cohere", "gemma2"), ("granite", "cohere")])
def test_value_and_every_gradient_equal_the_plain_path(
    pair: tuple[str, str], objective: Objective, temperature: float
) -> None:
    """Through the whole model, from its own `forward`; tied embeddings get two gradients."""
    weight = DEFAULT_WEIGHTS.get(objective)
    model, other = (shaped(name) if name in SHAPED else tiny(name, seed=1).double() for name in pair)
    labels = IDS[:, 1:].flatten()
    with torch.no_grad():
        teacher_logits = other(input_ids=IDS).logits[:, :-1].flatten(0, 1)
        targets = StateTargets(final_states(other, IDS)[:, :-1].flatten(0, 1), head_of(other).detach())
    logits = model(input_ids=IDS).logits[:, :-1].flatten(0, 1)
    log_q, log_p = ((z / temperature).log_softmax(-1) for z in (logits, teacher_logits))
    ce = torch.nn.functional.cross_entropy(logits, labels)
    plain = 0.7 * temperature**2 * by_definition(objective, log_q, log_p, weight).mean() + 0.3 * ce
    plain.backward()
    expected = gradients(model)
    fused = fused_distillation_loss(
        final_states(model, IDS)[:, :-1].flatten(0, 1),
        head_of(model),
        targets,
        labels,
        objective=objective,
        temperature=temperature,
        cross_entropy_weight=0.3,
        chunk=7,
    )
    fused.loss.backward()
    assert fused.loss.item() == pytest.approx(plain.item(), rel=1e-9)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-9)


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """By parameter; they are zero afterwards."""
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_capped_student_equal_to_its_teacher_has_neither_loss_nor_gradient(dtype: torch.dtype) -> None:
    head = Head(torch.randn(37, 8, dtype=dtype).requires_grad_(), 0.5, 4.0)
    states = (20 * torch.randn(19, 8, dtype=dtype)).requires_grad_()
    targets = StateTargets(states.detach(), head.detach())
    terms = fused_distillation_loss(states, head, targets, torch.zeros(19).long(), chunk=5)
    terms.loss.backward()
    assert terms.loss.item() == pytest.approx(0, abs=1e-7)
    assert states.grad.abs().max() < 1e-6
    assert head.weight.grad.abs().max() < 1e-6
