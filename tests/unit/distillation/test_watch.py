"""A watched corpus: over-fitting ends a training, the best weights come back, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from cascade.data.corpus import Corpus
from cascade.distillation.loop import WHOLE, Leg, distill
from cascade.distillation.settings import DistillSettings
from cascade.distillation.signals import OnlineTeacher
from cascade.distillation.states import final_states, head_of
from cascade.distillation.training_state import StepRecord
from cascade.distillation.watch import Watch, WatchSettings, derived_every, measured, watch_facts
from cascade.errors import CascadeError, Interrupted
from cascade.storage.checkpoints import TrainingCheckpoints
from cascade.storage.locations import open_location
from tests.unit.distillation.teaching import (
    LENGTH,
    make_rows,
    make_student,
    make_teacher,
    stop_after,
    weights,
)

pytestmark = pytest.mark.usefixtures("stored_at_once")

STEPS = 30
# Its own labels again and again: four rows are soon known by heart.
BY_HEART = DistillSettings(
    tokens=2 * STEPS * LENGTH, batch_rows=2, micro_rows=1, learning_rate=0.01, cross_entropy_weight=1.0
)
HOW = WatchSettings(tokens=12 * LENGTH, every=2, patience=3)


@pytest.fixture
def few() -> Corpus:
    return make_rows(train=4)


@pytest.fixture
def watch() -> Watch:
    return Watch(make_rows(train=0, held_out=12, seed=5), HOW)


def same(one: PreTrainedModel, two: PreTrainedModel) -> bool:
    other = weights(two)
    return all(torch.equal(value, other[name]) for name, value in weights(one).items())


def train(
    corpus: Corpus,
    watch: Watch | None,
    *,
    settings: DistillSettings = BY_HEART,
    leg: Leg = WHOLE,
    checkpoints: TrainingCheckpoints | None = None,
    checkpoint_seconds: float = 1e9,
    should_stop: Callable[[], bool] = lambda: False,
    on_step: Callable[[StepRecord], None] | None = None,
) -> tuple[PreTrainedModel, list[StepRecord]]:
    """With dropout, so that a draw too many would show."""
    student = make_student(attention_dropout=0.2)
    steps = distill(
        student,
        OnlineTeacher(make_teacher(), corpus),
        corpus,
        settings=settings,
        watch=watch,
        leg=leg,
        checkpoints=checkpoints,
        checkpoint_seconds=checkpoint_seconds,
        should_stop=should_stop,
        on_step=on_step,
    )
    return student, steps


def curve(steps: list[StepRecord]) -> list[tuple[float | None, ...]]:
    """The records without what depends on the clock."""
    return [(s.step, s.tokens, s.loss, s.ce, s.lr, s.grad_norm, s.watched_ce) for s in steps]


def test_over_fitting_ends_a_training_and_the_best_child_comes_back(few: Corpus, watch: Watch) -> None:
    student, steps = train(few, watch)
    found = {step.step + 1: step.watched_ce for step in steps if step.watched_ce is not None}
    assert list(found) == list(range(2, len(steps) + 1, 2))
    best = min(found, key=lambda step: found[step])
    # It fell at first, three measurements in a row were worse, and the training still got better on its rows.
    assert 2 < best == len(steps) - 6 < STEPS - 6
    assert steps[-1].ce < steps[best - 1].ce
    undisturbed, before = train(few, None, leg=Leg(best / STEPS))
    assert len(before) == best
    assert same(student, undisturbed)
    assert watch.measure(student, lambda: False) == found[best]
    facts = watch_facts(steps, STEPS)
    assert facts == {
        "stopped_early": True,
        "measurements": len(found),
        "best_step": best - 1,
        "best_tokens": 2 * best * LENGTH,
        "best_ce": found[best],
        "last_ce": steps[-1].watched_ce,
    }


def test_without_an_early_end_the_child_is_the_best_one_too(few: Corpus, watch: Watch) -> None:
    patient = replace(watch, settings=replace(HOW, every=7, patience=9))
    student, steps = train(few, patient)
    assert [step.step + 1 for step in measured(steps)] == [7, 14, 21, 28, 30]
    facts = watch_facts(steps, STEPS)
    assert facts["stopped_early"] is False
    best = min(measured(steps), key=lambda step: step.watched_ce or 0.0)
    assert facts["best_step"] == best.step < STEPS - 7
    assert same(student, train(few, None, leg=Leg((best.step + 1) / STEPS))[0])


def test_where_it_only_falls_a_watch_changes_no_bit(watch: Watch) -> None:
    many = make_rows(train=24)
    settings = replace(BY_HEART, tokens=24 * LENGTH, learning_rate=0.003)
    student, steps = train(many, watch, settings=settings)
    found = [step.watched_ce for step in measured(steps)]
    assert found == sorted(found, reverse=True)
    assert len(found) == 6
    unaware, plain = train(many, None, settings=settings)
    assert same(student, unaware)
    assert curve([replace(step, watched_ce=None) for step in steps]) == curve(plain)
    assert [step.watched_ce for step in plain] == [None] * 12


@pytest.mark.parametrize("end_of_text", [None, 256], ids=["one-text", "documents"])
def test_it_measures_the_cross_entropy_by_definition(watch: Watch, end_of_text: int | None) -> None:
    """Of the asked rows alone, float64, without the token after an end of text."""
    corpus = replace(watch.corpus, end_of_text=end_of_text)
    corpus.held_out[::2, 5] = 256
    student = make_student()
    ids = corpus.held_out[:9].long()
    positions = corpus.positions(ids)
    states = final_states(student, ids, positions)[:, :-1]
    log_q = head_of(student).logits(states).double().log_softmax(-1)
    losses = -log_q.gather(-1, ids[:, 1:, None])[..., 0]
    if end_of_text is not None:
        losses = losses[ids[:, :-1] != 256]
    part = Watch(corpus, replace(HOW, tokens=9 * LENGTH - 3))
    student.train()
    assert part.measure(student, lambda: False) == pytest.approx(losses.mean().item(), rel=1e-6)
    assert student.training


# Two micro-batches a step, and one pass of a measurement after every second: five questions in two steps.
@pytest.mark.parametrize("calls", [4, 9, 11, 24, 30, 34, 36])
def test_stopped_anywhere_it_goes_on_to_the_same_bits(
    few: Corpus, watch: Watch, checkpoints: TrainingCheckpoints, calls: int
) -> None:
    straight, whole = train(few, watch)
    asked, heard = stop_after(calls), list[StepRecord]()
    with pytest.raises(Interrupted):
        train(few, watch, checkpoints=checkpoints, should_stop=lambda: next(asked))
    resumed, steps = train(few, watch, checkpoints=checkpoints, on_step=heard.append)
    assert curve(steps) == curve(whole)
    assert same(straight, resumed)
    assert 0 < len(heard) < len(steps)


def test_a_map_that_is_trained_along_goes_back_with_the_best(
    few: Corpus, watch: Watch, checkpoints: TrainingCheckpoints
) -> None:
    settings = replace(BY_HEART, hidden_states="cosine", hidden_states_weight=0.1)
    straight, whole = train(few, watch, settings=settings)
    asked = stop_after(30)
    with pytest.raises(Interrupted):
        train(few, watch, settings=settings, checkpoints=checkpoints, should_stop=lambda: next(asked))
    resumed, steps = train(few, watch, settings=settings, checkpoints=checkpoints)
    assert curve(steps) == curve(whole)
    assert watch_facts(steps, STEPS)["stopped_early"]
    assert same(straight, resumed)


def test_what_ended_early_does_not_go_on(few: Corpus, watch: Watch, checkpoints: TrainingCheckpoints) -> None:
    student, steps = train(few, watch, checkpoints=checkpoints, checkpoint_seconds=0)
    heard = list[StepRecord]()
    again, records = train(few, watch, checkpoints=checkpoints, on_step=heard.append)
    assert heard == []
    assert records == steps
    assert same(student, again)


def test_a_state_of_another_watch_is_left_alone(
    few: Corpus, watch: Watch, checkpoints: TrainingCheckpoints
) -> None:
    train(few, watch, checkpoints=checkpoints, checkpoint_seconds=0)
    heard = list[StepRecord]()
    other = replace(watch, settings=replace(HOW, patience=1))
    student, _ = train(few, other, checkpoints=checkpoints, on_step=heard.append)
    assert heard[0].step == 0
    assert same(student, train(few, other)[0])


def test_what_goes_on_from_a_leg_is_watched_from_there(few: Corpus, watch: Watch, tmp_path: Path) -> None:
    """A leg is not watched; its last step is measured by the training that goes on from it."""
    start = TrainingCheckpoints(open_location(str(tmp_path / "leg")))
    train(few, None, leg=Leg(6 / STEPS, end=start))
    student, steps = train(few, watch, leg=Leg(start=start))
    _, whole = train(few, watch)
    assert [step.watched_ce for step in steps[:5]] == [None] * 5
    assert [step.watched_ce for step in steps[5:]] == [step.watched_ce for step in whole[5 : len(steps)]]
    best = watch_facts(steps, STEPS)["best_step"]
    assert isinstance(best, int)
    assert same(student, train(few, None, leg=Leg((best + 1) / STEPS))[0])


def test_a_measurement_that_is_not_finite_stops_the_run(
    few: Corpus, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Watch, "_sums", lambda *_: torch.tensor([torch.inf, 1.0], dtype=torch.float64))
    with pytest.raises(CascadeError, match="watched cross-entropy is not finite"):
        train(few, watch)


def test_equals_are_no_better_and_the_first_of_them_is_the_best(watch: Watch) -> None:
    record = StepRecord(0, 0, 1.0, 1.0, 1.0, 0.0, 0.1, 1.0, 1.0, 0.0, 0, 1.0)

    def steps(*values: float | None) -> list[StepRecord]:
        return [replace(record, step=place, watched_ce=value) for place, value in enumerate(values)]

    assert not watch.over(steps())
    assert not watch.over(steps(2.0, None, 2.0, 2.0))
    assert watch.over(steps(2.0, None, 2.0, 2.0, 2.0))
    assert not watch.over(steps(2.0, 3.0, 3.0, 1.9, 2.5, 2.5))
    assert watch_facts(steps(2.0, 1.0, 1.0), 3)["best_step"] == 1


def test_a_training_is_measured_ten_times_or_fewer() -> None:
    for steps in (1, 7, 10, 11, 95, 1000):
        every = derived_every(steps)
        assert -(-steps // every) <= 10
        assert every == 1 or -(-steps // (every - 1)) > 10
