"""Every divergence by its properties: zero at equality, never negative, gradient equals autograd's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cascade.distillation.objectives import DEFAULT_WEIGHTS, DIVERGENCES, WEIGHTED, Objective, divergence_of
from tests.numerics.divergences import EVERY, by_definition, kl

SPREADS = (0.1, 3.0, 30.0)
"""Standard deviations of logits: almost uniform, a model's usual one, almost one-hot."""


def log_probabilities(spread: float, seed: int) -> Tensor:
    """[16, 101] rows in float64."""
    draw = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(16, 101, generator=draw, dtype=torch.float64)).log_softmax(-1)


def test_every_objective_has_a_divergence_and_every_weighted_one_a_default() -> None:
    assert DIVERGENCES.keys() | WEIGHTED.keys() == set(Objective)
    assert DEFAULT_WEIGHTS.keys() == WEIGHTED.keys()
    assert DIVERGENCES.keys().isdisjoint(WEIGHTED)


@pytest.mark.parametrize(("objective", "weight"), EVERY)
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_value_and_gradient(
    objective: Objective, weight: float | None, spread: float, dtype: torch.dtype
) -> None:
    logits = log_probabilities(spread, seed=0).requires_grad_()
    log_p = log_probabilities(spread, seed=1)
    expected = by_definition(objective, logits.log_softmax(-1), log_p, weight)
    expected.sum().backward()
    value, gradient = divergence_of(objective, weight)(
        logits.detach().to(dtype).log_softmax(-1), log_p.to(dtype)
    )
    rounding = torch.finfo(dtype).eps * max(spread, 1.0)
    torch.testing.assert_close(value.double(), expected.detach(), rtol=30 * rounding, atol=30 * rounding)
    torch.testing.assert_close(gradient.double(), logits.grad, rtol=30 * rounding, atol=30 * rounding)


@pytest.mark.parametrize(("objective", "weight"), EVERY)
def test_the_gradient_is_that_of_finite_differences(objective: Objective, weight: float | None) -> None:
    """A second opinion, of the value alone."""
    logits, log_p = log_probabilities(2.0, seed=8), log_probabilities(2.0, seed=9)
    draw = torch.Generator().manual_seed(10)
    direction, step = torch.randn(16, 101, generator=draw, dtype=torch.float64), 1e-5
    ahead, behind = (
        divergence_of(objective, weight)((logits + sign * step * direction).log_softmax(-1), log_p.clone())[0]
        for sign in (1, -1)
    )
    _, gradient = divergence_of(objective, weight)(logits.clone(), log_p.clone())
    torch.testing.assert_close(
        (ahead - behind) / (2 * step), (gradient * direction).sum(-1), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize(("objective", "weight"), EVERY)
@pytest.mark.parametrize("spread", SPREADS)
def test_zero_at_equality_and_only_there(objective: Objective, weight: float | None, spread: float) -> None:
    log_p = log_probabilities(spread, seed=2)
    value, gradient = divergence_of(objective, weight)(log_p.clone(), log_p.clone())
    torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-13)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-13)
    other, _ = divergence_of(objective, weight)(log_probabilities(spread, seed=3), log_p.clone())
    assert (other > 1e-4).all()


@pytest.mark.parametrize(("objective", "weight"), EVERY)
def test_never_negative_beyond_rounding_even_beside_equality(
    objective: Objective, weight: float | None
) -> None:
    log_p = log_probabilities(3.0, seed=2).float()
    for distance in (0.0, 1e-6, 1e-3, 1.0):
        draw = torch.Generator().manual_seed(11)
        log_q = (log_p + distance * torch.randn(log_p.shape, generator=draw)).log_softmax(-1)
        value, gradient = divergence_of(objective, weight)(log_q, log_p.clone())
        assert (value > -3e-7).all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize(("objective", "weight"), EVERY)
def test_a_gradient_never_moves_the_sum_of_the_logits(objective: Objective, weight: float | None) -> None:
    """Adding a constant to all logits changes no probability, so every row of the gradient sums to zero."""
    log_q, log_p = log_probabilities(3.0, seed=4), log_probabilities(3.0, seed=5)
    _, gradient = divergence_of(objective, weight)(log_q, log_p)
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(16, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("objective", "weight"), EVERY)
@pytest.mark.parametrize("student_leads", [True, False])
def test_probabilities_that_underflow_leave_value_and_gradient_finite(
    objective: Objective, weight: float | None, student_leads: bool
) -> None:
    """One side gives e^-300 to what the other is sure of: both are zero in float32, their logarithms not."""
    certain, opposite = (torch.full((1, 4), -300.0) for _ in range(2))
    certain[0, 0] = opposite[0, 1] = 0.0
    log_q, log_p = (certain, opposite) if student_leads else (opposite, certain)
    expected = by_definition(objective, log_q.double(), log_p.double(), weight)
    value, gradient = divergence_of(objective, weight)(log_q.clone(), log_p.clone())
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=0)
    assert gradient.isfinite().all()


def test_the_two_kls_are_each_other_with_the_roles_exchanged() -> None:
    log_q, log_p = log_probabilities(3.0, seed=6), log_probabilities(3.0, seed=7)
    forward, _ = divergence_of(Objective.FORWARD_KL)(log_q.clone(), log_p.clone())
    reverse, _ = divergence_of(Objective.REVERSE_KL)(log_p.clone(), log_q.clone())
    torch.testing.assert_close(forward, reverse)


@pytest.mark.parametrize(
    ("objective", "weight", "scale", "limit"),
    [
        (Objective.JSD, 1e-7, 1e-7, Objective.FORWARD_KL),
        (Objective.JSD, 1 - 1e-7, 1e-7, Objective.REVERSE_KL),
        (Objective.SKEW_KL, 1e-7, 1, Objective.FORWARD_KL),
        (Objective.SKEW_REVERSE_KL, 1e-7, 1, Objective.REVERSE_KL),
    ],
)
def test_the_ends_of_a_weight_meet_the_kls(
    objective: Objective, weight: float, scale: float, limit: Objective
) -> None:
    """JSD(beta) / beta -> KL(p || q), JSD(beta) / (1 - beta) -> KL(q || p); the skew ones need no scaling."""
    log_q, log_p = log_probabilities(1.0, seed=6), log_probabilities(1.0, seed=7)
    value, gradient = divergence_of(objective, weight)(log_q.clone(), log_p.clone())
    expected, expected_gradient = divergence_of(limit)(log_q.clone(), log_p.clone())
    torch.testing.assert_close(value / scale, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient / scale, expected_gradient, rtol=1e-4, atol=1e-6)


def test_half_a_jsd_takes_no_side_and_is_at_most_log_two() -> None:
    log_q, log_p = log_probabilities(30.0, seed=6), log_probabilities(30.0, seed=7)
    one, _ = divergence_of(Objective.JSD, 0.5)(log_q.clone(), log_p.clone())
    other, _ = divergence_of(Objective.JSD, 0.5)(log_p.clone(), log_q.clone())
    torch.testing.assert_close(one, other)
    assert (one <= torch.tensor(2.0).double().log() + 1e-12).all()


def test_total_variation_is_bounded_by_the_kl() -> None:
    """Pinsker: 2 TV^2 <= KL; and TV <= 1."""
    log_q, log_p = log_probabilities(1.0, seed=6), log_probabilities(1.0, seed=7)
    value, _ = divergence_of(Objective.TOTAL_VARIATION)(log_q.clone(), log_p.clone())
    assert (2 * value**2 <= kl(log_p, log_q)).all()
    assert (value <= 1).all()


@pytest.mark.parametrize("objective", DEFAULT_WEIGHTS)
def test_a_weight_left_empty_is_the_default(objective: Objective) -> None:
    log_q, log_p = log_probabilities(1.0, seed=6), log_probabilities(1.0, seed=7)
    stated, _ = divergence_of(objective, DEFAULT_WEIGHTS[objective])(log_q.clone(), log_p.clone())
    empty, _ = divergence_of(objective)(log_q.clone(), log_p.clone())
    torch.testing.assert_close(empty, stated, rtol=0, atol=0)


def test_weights_that_no_objective_takes_are_refused() -> None:
    with pytest.raises(ValueError, match="belongs to jsd, skew_kl, skew_reverse_kl, not forward_kl"):
        divergence_of(Objective.FORWARD_KL, 0.5)
    for weight in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="more than 0 and less than 1"):
            divergence_of(Objective.JSD, weight)
