"""What counts as a jump of the loss."""

from __future__ import annotations

import pytest

from cascade.distillation.steps import SPIKE_STEPS, is_spike


def test_three_times_a_steady_loss_is_a_jump_and_twice_is_none() -> None:
    steady = [1.0, 1.02, 0.98, 1.01] * 8
    assert is_spike(3.1, steady)
    assert not is_spike(2.9, steady)


def test_noise_of_small_batches_is_none() -> None:
    """Batches that differ by a factor of three raise the bound far above three times the median."""
    noisy = [0.5, 1.5] * 16
    assert not is_spike(8.0, noisy)
    assert is_spike(9.0, noisy)


def test_a_loss_that_is_all_but_nothing_does_not_jump() -> None:
    assert not is_spike(0.04, [1e-5] * 32)
    assert is_spike(0.06, [1e-5] * 32)


@pytest.mark.parametrize("steps", [0, SPIKE_STEPS - 1])
def test_a_few_steps_tell_too_little(steps: int) -> None:
    assert not is_spike(1e9, [1.0] * steps)
    assert is_spike(1e9, [1.0] * SPIKE_STEPS)


def test_a_falling_loss_never_jumps() -> None:
    falling = [5 * 0.9**step for step in range(100)]
    assert not any(is_spike(value, falling[:step][-32:]) for step, value in enumerate(falling))
