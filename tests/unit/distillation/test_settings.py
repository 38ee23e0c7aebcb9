"""The schedule and what is derived from the student."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from cascade.distillation.objectives import Objective
from cascade.distillation.schedules import Schedule, WeightSchedule
from cascade.distillation.settings import LATER, DistillSettings, rows_of
from cascade.errors import InputError


def test_tokens_are_rounded_up_to_whole_rows() -> None:
    assert [rows_of(tokens, 256) for tokens in (1, 256, 257, 20480)] == [1, 1, 2, 80]


def test_every_row_is_trained_once_and_the_last_batch_may_be_short() -> None:
    plan = DistillSettings(tokens=160, batch_rows=4).resolved(hidden=64, sequence_length=16)
    assert (plan.rows, plan.steps, plan.tokens) == (10, 3, 160)
    assert [list(plan.positions(step)) for step in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_warm_up_and_decay_are_linear() -> None:
    settings = DistillSettings(tokens=20 * 16, batch_rows=1, learning_rate=1.0, warmup=0.25, final=0.1)
    plan = settings.resolved(hidden=64, sequence_length=16)
    rates = [plan.learning_rate(step) for step in range(plan.steps)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4:] == pytest.approx([1 - 0.9 * step / 15 for step in range(16)])


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_still_have_positive_rates(steps: int) -> None:
    plan = DistillSettings(tokens=16 * steps, batch_rows=1).resolved(hidden=64, sequence_length=16)
    assert plan.steps == steps
    assert all(0 < plan.learning_rate(step) <= plan.peak_rate for step in range(steps))


def test_derived_numbers_follow_the_student_and_stated_ones_stay() -> None:
    derived = DistillSettings(tokens=10**6).resolved(hidden=576, sequence_length=256)
    assert derived.micro_rows <= derived.batch_rows
    wider = DistillSettings(tokens=10**6).resolved(hidden=4 * 576, sequence_length=256)
    assert wider.peak_rate == pytest.approx(derived.peak_rate / 2)
    longer = DistillSettings(tokens=10**6).resolved(hidden=576, sequence_length=10**5)
    assert (longer.batch_rows, longer.micro_rows) == (1, 1)
    stated = DistillSettings(tokens=10**6, batch_rows=7, micro_rows=3, learning_rate=0.01)
    plan = stated.resolved(hidden=576, sequence_length=256)
    assert (plan.batch_rows, plan.micro_rows, plan.peak_rate) == (7, 3, 0.01)


def test_a_batch_is_never_larger_than_the_run() -> None:
    plan = DistillSettings(tokens=32, batch_rows=8, micro_rows=8).resolved(hidden=64, sequence_length=16)
    assert (plan.batch_rows, plan.micro_rows, plan.steps) == (2, 2, 1)


def test_the_record_is_json_with_every_number_filled_in() -> None:
    plan = DistillSettings(tokens=320).resolved(hidden=64, sequence_length=16)
    record = json.loads(json.dumps(plan.record()))
    assert record == plan.record()
    assert None not in record.values()


def test_what_came_later_and_is_at_rest_leaves_a_record_as_it_was() -> None:
    settings = DistillSettings(tokens=320, cross_entropy_weight=0.5)
    record = json.loads(json.dumps(settings.record()))
    assert not set(LATER) & set(record)
    assert DistillSettings(**record) == settings
    scheduled = replace(settings, cross_entropy_schedule=WeightSchedule.WSD, schedule=Schedule.COSINE)
    record = json.loads(json.dumps(scheduled.record()))
    assert (record["schedule"], record["cross_entropy_schedule"]) == ("cosine", "wsd")
    again = DistillSettings(**record)
    assert again == scheduled
    # A name from JSON is as good as the member.
    ours, theirs = (made.resolved(hidden=64, sequence_length=16) for made in (again, scheduled))
    for step in range(ours.steps):
        assert ours.learning_rate(step) == theirs.learning_rate(step)
        assert ours.cross_entropy_weight(step) == theirs.cross_entropy_weight(step)


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens": 0},
        {"batch_rows": 0},
        {"micro_rows": 0},
        {"learning_rate": 0.0},
        {"warmup": 1.1},
        {"final": -0.1},
        {"clip": 0.0},
        {"weight_decay": -1.0},
        {"cross_entropy_weight": 1.5},
        {"temperature": 0.0},
    ],
)
def test_values_out_of_range_are_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError) as caught:
        DistillSettings(**{"tokens": 16, **wrong})  # type: ignore[arg-type]
    assert (caught.value.where, caught.value.value) == next((k, str(v)) for k, v in wrong.items())


@pytest.mark.parametrize("objective", Objective)
def test_a_weight_is_recorded_only_where_the_objective_has_one(objective: Objective) -> None:
    """A key of a run that does not use it must not know of it."""
    default = {"jsd": 0.5, "skew_kl": 0.1, "skew_reverse_kl": 0.1}.get(objective.value)
    record = DistillSettings(tokens=320, objective=objective).resolved(64, 16).settings.record()
    assert record.get("objective_weight") == default
    assert ("objective_weight" in record) == (default is not None)


@pytest.mark.parametrize(("objective", "weight"), [(Objective.FORWARD_KL, 0.5), (Objective.JSD, 1.0)])
def test_a_weight_that_the_objective_does_not_take_is_refused(objective: Objective, weight: float) -> None:
    with pytest.raises(InputError, match="objective_weight") as caught:
        DistillSettings(tokens=16, objective=objective, objective_weight=weight)
    assert (caught.value.where, caught.value.value) == ("objective_weight", str(weight))
