"""Every divergence by its properties: zero at equality, never negative, gradient equals autograd's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cascade.distillation.objectives import DIVERGENCES, Objective

SPREADS = (0.1, 3.0, 30.0)
"""Standard deviations of logits: almost uniform, a model's usual one, almost one-hot."""


def log_probabilities(spread: float, seed: int) -> Tensor:
    """[16, 101] rows in float64."""
    draw = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(16, 101, generator=draw, dtype=torch.float64)).log_softmax(-1)


def by_definition(objective: Objective, log_q: Tensor, log_p: Tensor) -> Tensor:
    """torch's own KL, whose first argument is the approximation and whose second is the reference."""
    pair = {Objective.FORWARD_KL: (log_q, log_p), Objective.REVERSE_KL: (log_p, log_q)}[objective]
    return torch.nn.functional.kl_div(*pair, reduction="none", log_target=True).sum(-1)


def test_every_objective_has_a_divergence() -> None:
    assert set(DIVERGENCES) == set(Objective)


@pytest.mark.parametrize("objective", Objective)
@pytest.mark.parametrize("spread", SPREADS)
def test_value_and_gradient(objective: Objective, spread: float) -> None:
    logits = (spread * torch.randn(16, 101, dtype=torch.float64)).requires_grad_()
    log_p = log_probabilities(spread, seed=1)
    expected = by_definition(objective, logits.log_softmax(-1), log_p)
    expected.sum().backward()
    value, gradient = DIVERGENCES[objective](logits.detach().log_softmax(-1), log_p.clone())
    torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, logits.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("objective", Objective)
@pytest.mark.parametrize("spread", SPREADS)
def test_zero_at_equality_and_only_there(objective: Objective, spread: float) -> None:
    log_p = log_probabilities(spread, seed=2)
    value, gradient = DIVERGENCES[objective](log_p.clone(), log_p.clone())
    torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-13)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-13)
    other, _ = DIVERGENCES[objective](log_probabilities(spread, seed=3), log_p.clone())
    assert (other > 1e-4).all()


@pytest.mark.parametrize("objective", Objective)
def test_a_gradient_never_moves_the_sum_of_the_logits(objective: Objective) -> None:
    """Adding a constant to all logits changes no probability, so every row of the gradient sums to zero."""
    _, gradient = DIVERGENCES[objective](log_probabilities(3.0, seed=4), log_probabilities(3.0, seed=5))
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(16, dtype=torch.float64), rtol=0, atol=1e-13)


def test_the_two_kls_are_each_other_with_the_roles_exchanged() -> None:
    log_q, log_p = log_probabilities(3.0, seed=6), log_probabilities(3.0, seed=7)
    forward, _ = DIVERGENCES[Objective.FORWARD_KL](log_q.clone(), log_p.clone())
    reverse, _ = DIVERGENCES[Objective.REVERSE_KL](log_p.clone(), log_q.clone())
    torch.testing.assert_close(forward, reverse)
