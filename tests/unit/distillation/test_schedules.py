"""Shapes of the schedules, from what their papers say of them."""

from __future__ import annotations

import math

import pytest

from cascade.distillation.schedules import Schedule, WeightSchedule, rate_share, weight_share

STEPS = 100


def rates(schedule: Schedule, steps: int = STEPS, warmup: float = 0.1, final: float = 0.1) -> list[float]:
    return [rate_share(schedule, step, steps, warmup=warmup, final=final) for step in range(steps)]


def weights(schedule: WeightSchedule, steps: int = STEPS, warmup: float = 0.1) -> list[float]:
    return [weight_share(schedule, step, steps, warmup=warmup) for step in range(steps)]


@pytest.mark.parametrize("schedule", Schedule)
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.95, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 100])
def test_a_rate_rises_to_its_peak_once_and_falls_from_there(
    schedule: Schedule, warmup: float, steps: int
) -> None:
    shares = rates(schedule, steps, warmup)
    top = shares.index(max(shares))
    assert shares[: top + 1] == sorted(shares[: top + 1])
    assert shares[top:] == sorted(shares[top:], reverse=True)
    assert max(shares) == 1.0
    assert min(shares) > 0


@pytest.mark.parametrize("schedule", Schedule)
def test_every_schedule_warms_up_alike_and_ends_at_the_final_share(schedule: Schedule) -> None:
    shares = rates(schedule)
    assert shares[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert shares[-1] == pytest.approx(0.1)


def test_a_cosine_is_half_way_in_the_middle_and_flat_at_both_ends() -> None:
    shares = rates(Schedule.COSINE)
    assert shares[9 + 45] == pytest.approx((1 + 0.1) / 2)
    assert shares[9] - shares[10] < 0.002
    assert shares[-2] - shares[-1] < 0.002
    assert shares[9 + 30] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 3)) / 2)


def test_wsd_is_stable_until_a_fifth_is_left() -> None:
    shares = rates(Schedule.WSD)
    assert shares[9:80] == [1.0] * 71
    # A quarter of the decay takes half of the way: 1 - sqrt(1/4).
    assert shares[84] == pytest.approx(0.1 + 0.9 / 2)


def test_weights_follow_their_names() -> None:
    assert weights(WeightSchedule.CONSTANT) == [1.0] * STEPS
    assert weights(WeightSchedule.LINEAR) == pytest.approx([step / 99 for step in range(STEPS)])
    shares = weights(WeightSchedule.WSD)
    assert shares[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert shares[9:80] == [1.0] * 71
    assert shares[80:] == pytest.approx([1 - step / 20 for step in range(1, 21)])


@pytest.mark.parametrize("schedule", WeightSchedule)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_have_weights_too(schedule: WeightSchedule, steps: int) -> None:
    assert all(0 <= share <= 1 for share in weights(schedule, steps))
