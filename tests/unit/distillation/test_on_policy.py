"""Training on what the student writes: which rows, which targets, and the same bits after an interruption."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cascade.data.corpus import Corpus
from cascade.distillation.loop import distill
from cascade.distillation.mixture import MixedTeacher, live
from cascade.distillation.objectives import Objective
from cascade.distillation.on_policy import OwnRows, Writing
from cascade.distillation.rows import StepRows
from cascade.distillation.settings import DistillSettings
from cascade.distillation.signals import OnlineTeacher, Part, StoredTeacher, write_signals
from cascade.distillation.states import head_of
from cascade.distillation.training_state import StepRecord
from cascade.errors import CascadeError, InputError, Interrupted
from cascade.generation.sampling import continued, draws
from cascade.storage.checkpoints import TrainingCheckpoints
from cascade.storage.locations import open_location
from tests.tiny import make_model
from tests.unit.distillation.teaching import LENGTH, make_rows, make_student, make_teacher

pytestmark = pytest.mark.usefixtures("stored_at_once")

END, PROMPT, VOCABULARY = 256, 6, 258
SETTINGS = DistillSettings(
    tokens=20 * LENGTH, batch_rows=4, micro_rows=2, learning_rate=0.01, objective=Objective.JSD
)
HALF = Writing(0.5, PROMPT, seed=9)


@pytest.fixture(params=[None, END], ids=["joined", "apart"])
def corpus(request: pytest.FixtureRequest) -> Corpus:
    """Some prompts hold a border, and one ends with it."""
    rows = replace(make_rows(), end_of_text=request.param)
    rows.train[1, 2] = rows.train[3, PROMPT - 1] = rows.train[2, 9] = END
    return rows


@pytest.fixture
def teacher(corpus: Corpus) -> OnlineTeacher:
    return OnlineTeacher(make_teacher(), corpus)


def own(student: PreTrainedModel, teacher: OnlineTeacher, writing: Writing = HALF) -> OwnRows:
    return OwnRows(student, teacher, teacher.corpus, writing)


def run(
    teacher: OnlineTeacher, writing: Writing = HALF, **how: Any
) -> tuple[PreTrainedModel, list[StepRecord]]:
    student = make_student()
    how = {"settings": SETTINGS, "source": own(student, teacher, writing), **how}
    return student, distill(student, teacher, teacher.corpus, **how)


def arithmetic(records: list[StepRecord]) -> list[tuple[float, ...]]:
    return [(one.loss, one.kl, one.ce, one.grad_norm, one.own_targets) for one in records]


def assert_equal_weights(one: PreTrainedModel, other: PreTrainedModel) -> None:
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


def never() -> bool:
    return False


def written(student: PreTrainedModel, corpus: Corpus, positions: Sequence[int]) -> Tensor:
    """What `HALF` makes the student say, one row at a time."""
    rows = [
        continued(
            student,
            corpus.train[[corpus.row(position)], :PROMPT].long(),
            draws(9, [position], LENGTH - PROMPT),
            temperature=1.0,
            vocabulary=VOCABULARY,
            end_of_text=corpus.end_of_text,
        )
        for position in positions
    ]
    return torch.cat([row for row in rows if row is not None])


def test_without_own_rows_it_is_the_training_on_the_corpus(corpus: Corpus, teacher: OnlineTeacher) -> None:
    student, records = run(teacher, replace(HALF, mixture=0.0))
    plain, expected = run(teacher, source=None)
    assert_equal_weights(student, plain)
    assert arithmetic(records) == arithmetic(expected)
    assert not any(record.own_targets for record in records)


def by_definition(
    objective: Objective,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: Tensor,
    given: list[int],
    end: bool,
) -> tuple[float, float, int]:
    """Mean divergence and cross-entropy in float64 over the targets of all documents, and their number."""
    one, other = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    total, surprise, count = 0.0, 0.0, 0
    for row, prompt in zip(rows, given, strict=True):
        borders = [0, *((row == END).nonzero().flatten() + 1).tolist(), LENGTH] if end else [0, LENGTH]
        for begin, stop in pairwise(borders):
            if stop - begin < 2:
                continue
            ids = row[None, begin:stop]
            with torch.no_grad():
                q, p = (model(ids, use_cache=False).logits[0].softmax(-1) for model in (one, other))
            for place in range(begin, stop - 1):
                if place + 1 < prompt:
                    continue
                a, b = p[place - begin], q[place - begin]
                middle = (a + b) / 2
                if objective is Objective.JSD:
                    value = (a * (a / middle).log() + b * (b / middle).log()).sum() / 2
                else:
                    value = (b * (b / a).log()).sum()
                total += value.item()
                surprise -= b[row[place + 1]].log().item()
                count += 1
    return total / count, surprise / count, count


@pytest.mark.parametrize("objective", [Objective.JSD, Objective.REVERSE_KL])
def test_the_first_step_is_the_definition(
    objective: Objective, corpus: Corpus, teacher: OnlineTeacher
) -> None:
    settings = replace(SETTINGS, tokens=4 * LENGTH, objective=objective)
    [step] = run(teacher, settings=settings)[1]
    student, rows = make_student(), corpus.train[:4].long()
    rows[[1, 3]] = written(student, corpus, [1, 3])
    apart = corpus.end_of_text is not None
    given = [0, PROMPT, 0, PROMPT]
    loss, ce, _ = by_definition(objective, student, teacher.model, rows, given, apart)
    assert (step.loss, step.kl, step.ce) == pytest.approx((loss, loss, ce), rel=1e-5)
    chosen = [1] if apart else [1, 3]
    count = by_definition(objective, student, teacher.model, rows[chosen], [PROMPT] * len(chosen), apart)[2]
    assert step.own_targets == count > 5
    if not apart:
        assert count == 2 * (LENGTH - PROMPT)


class Watched:
    """Own rows, remembered with the student as it was when they were written."""

    def __init__(self, source: OwnRows) -> None:
        self.source, self.seen = source, list[tuple[StepRows, PreTrainedModel]]()

    def rows(self, positions: Sequence[int], should_stop: Callable[[], bool]) -> StepRows | None:
        found = self.source.rows(positions, should_stop)
        assert found is not None
        self.seen.append((found, copy.deepcopy(self.source.student).eval()))
        return found

    def record(self) -> dict[str, object]:
        return self.source.record()


def test_every_step_is_written_by_the_student_as_it_is_then(corpus: Corpus, teacher: OnlineTeacher) -> None:
    student = make_student()
    source = Watched(own(student, teacher))
    distill(student, teacher, corpus, settings=SETTINGS, source=source)
    assert len(source.seen) == 5
    for step, (rows, then) in enumerate(source.seen):
        positions = [4 * step + 1, 4 * step + 3]
        train = rows.corpus.train
        assert torch.equal(train[[1, 3]].long(), written(then, corpus, positions))
        assert torch.equal(train[[0, 2]], corpus.train[[4 * step, 4 * step + 2]])
        assert rows.prompts.tolist() == [0, PROMPT, 0, PROMPT]
        assert list(rows.named) == [corpus.row(4 * step + row) for row in range(4)]
    texts = [rows.corpus.train[1, PROMPT:].tolist() for rows, _ in source.seen]
    assert len({tuple(text) for text in texts}) == 5


# Asked once a token (10), then once a micro-batch (2): in a step's first text, in its last, after it.
@pytest.mark.parametrize("stop", [25, 33, 34, 35, 36])
def test_resuming_is_bit_identical(stop: int, corpus: Corpus, teacher: OnlineTeacher, tmp_path: Path) -> None:
    checkpoints = TrainingCheckpoints(open_location(str(tmp_path)))
    whole, expected = run(teacher)
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == stop

    with pytest.raises(Interrupted, match="after step 2"):
        run(teacher, checkpoints=checkpoints, should_stop=should_stop)
    student, records = run(teacher, checkpoints=checkpoints)
    assert_equal_weights(student, whole)
    assert arithmetic(records) == arithmetic(expected)


def test_a_state_of_another_writing_is_left_alone(
    corpus: Corpus, teacher: OnlineTeacher, tmp_path: Path
) -> None:
    checkpoints = TrainingCheckpoints(open_location(str(tmp_path)))
    run(teacher, checkpoints=checkpoints, checkpoint_seconds=0.0)
    heard = list[StepRecord]()
    run(teacher, replace(HALF, temperature=0.5), checkpoints=checkpoints, on_step=heard.append)
    assert [record.step for record in heard] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("mixture", [0.0, 0.1, 1 / 3, 0.5, 0.9, 1.0])
def test_own_rows_are_spread_evenly(mixture: float) -> None:
    writing = Writing(mixture, 4)
    chosen = [writing.owns(position) for position in range(300)]
    for stop in range(301):
        assert sum(chosen[:stop]) == writing.own_before(stop)
        assert abs(sum(chosen[:stop]) - mixture * stop) < 1
    assert math.isclose(sum(chosen), 300 * mixture, abs_tol=1)


def test_a_mixture_of_teachers_scores_what_the_student_wrote(corpus: Corpus) -> None:
    models = make_teacher(), make_model(seed=5, num_hidden_layers=1)
    mixed = MixedTeacher([OnlineTeacher(model, corpus) for model in models], (0.25, 0.75))
    student = make_student()
    source = OwnRows(student, mixed, corpus, replace(HALF, mixture=1.0))
    rows = source.rows(range(2), never)
    assert rows is not None
    batch, targets = rows.part(0, 2, torch.device("cpu"))
    expected = mixed.over(replace(corpus, train=batch.ids)).targets(Part.TRAIN, range(2))
    assert torch.equal(targets.logits(), expected.logits())  # type: ignore[attr-defined]
    [step] = distill(student, mixed, corpus, settings=replace(SETTINGS, tokens=4 * LENGTH), source=source)
    assert math.isfinite(step.loss)


def test_only_entries_that_the_teacher_has_are_written(corpus: Corpus) -> None:
    student = make_student(vocab_size=300)
    with torch.no_grad():
        student.get_output_embeddings().weight[VOCABULARY:] *= 50
    teacher = OnlineTeacher(make_teacher(), corpus)
    rows = own(student, teacher, replace(HALF, mixture=1.0)).rows(range(8), never)
    assert rows is not None
    assert rows.corpus.train.max() < VOCABULARY
    assert head_of(student).vocabulary == 300


def test_a_step_whose_texts_have_all_ended_changes_little_and_fails_nothing(corpus: Corpus) -> None:
    ended = replace(corpus, end_of_text=END, train=corpus.train.clone())
    ended.train[:, PROMPT - 1] = END
    teacher = OnlineTeacher(make_teacher(), ended)
    _, records = run(teacher, replace(HALF, mixture=1.0), settings=replace(SETTINGS, tokens=4 * LENGTH))
    assert (records[0].loss, records[0].own_targets) == (0.0, 0)


def test_stored_signals_know_no_new_text(corpus: Corpus, teacher: OnlineTeacher, tmp_path: Path) -> None:
    write_signals(teacher.model, corpus, tmp_path, 4, 1)
    stored = StoredTeacher(tmp_path, teacher.head, corpus.identity)
    with pytest.raises(InputError, match="stored signals cannot say"):
        live(stored)
    with pytest.raises(InputError, match="StoredTeacher"):
        MixedTeacher([teacher, stored], (0.5, 0.5)).over(corpus)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mixture": 1.5}, "mixture"),
        ({"mixture": -0.1}, "mixture"),
        ({"mixture": math.nan}, "mixture"),
        ({"prompt_tokens": 0}, "prompt_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
    ],
)
def test_settings_out_of_range_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match="out of range") as caught:
        replace(HALF, **changes)
    assert caught.value.where == words


@pytest.mark.parametrize("tokens", [LENGTH, LENGTH + 1])
def test_a_prompt_leaves_something_to_write(tokens: int, teacher: OnlineTeacher) -> None:
    with pytest.raises(InputError, match="shorter than a row"):
        own(make_student(), teacher, replace(HALF, prompt_tokens=tokens))
    assert own(make_student(), teacher, replace(HALF, prompt_tokens=LENGTH - 1))


def test_a_step_that_is_not_finite_names_the_rows_that_prompted_it(
    corpus: Corpus, teacher: OnlineTeacher
) -> None:
    student, later = make_student(), replace(SETTINGS, tokens=30 * LENGTH)

    def spoil(record: StepRecord) -> None:
        if record.step == 5:
            with torch.no_grad():
                student.get_input_embeddings().weight.fill_(math.nan)

    source = own(student, teacher, replace(HALF, mixture=1.0))
    with pytest.raises(CascadeError, match="not finite") as caught:
        distill(student, teacher, corpus, settings=later, source=source, on_step=spoil)
    rows = [corpus.row(position) for position in range(24, 28)]
    assert caught.value.where == f"training rows {', '.join(map(str, rows))}"
