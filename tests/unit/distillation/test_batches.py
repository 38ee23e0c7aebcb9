"""Which tokens are predicted, and that rows of several documents teach and measure as the documents do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from cascade.data.corpus import Corpus
from cascade.distillation.batches import batch_of, count_targets
from cascade.distillation.fused import IGNORED
from cascade.distillation.loop import distill
from cascade.distillation.settings import DistillSettings
from cascade.distillation.signals import OnlineTeacher, Part
from cascade.distillation.states import final_states, head_of
from cascade.evaluation.metrics import evaluate
from tests.unit.distillation.teaching import LENGTH, make_rows, make_student, make_teacher

END = 256
CPU = torch.device("cpu")


@pytest.fixture
def corpus() -> Corpus:
    """Rows 0 and 1 of each part hold three documents and two, and row 2 one."""
    rows = replace(make_rows(), end_of_text=END)
    for part in (rows.train, rows.held_out):
        part[0, [4, 9]] = END
        part[1, 7] = END
    return rows


def documents(row: torch.Tensor) -> list[torch.Tensor]:
    ends = [*((row == END).nonzero().flatten() + 1).tolist(), len(row)]
    return [row[begin:end].long() for begin, end in zip([0, *ends], ends, strict=False)]


def test_the_token_after_an_end_of_text_is_no_target(corpus: Corpus) -> None:
    batch = batch_of(corpus, Part.TRAIN, [0, 2], CPU)
    labels = batch.labels.view(2, -1)
    expected = corpus.train[[0, 2], 1:].long()
    expected[0, [4, 9]] = IGNORED
    assert torch.equal(labels, expected)
    assert labels[0, 3] == END
    assert count_targets(corpus, Part.TRAIN, [0, 2]) == 2 * (LENGTH - 1) - 2


def test_where_a_row_is_one_text_every_token_but_the_first_is_a_target(corpus: Corpus) -> None:
    joined = replace(corpus, end_of_text=None)
    batch = batch_of(joined, Part.HELD_OUT, [0], CPU)
    assert batch.positions is None
    assert torch.equal(batch.labels, corpus.held_out[0, 1:].long())
    assert count_targets(joined, Part.HELD_OUT, [0]) == LENGTH - 1


def test_a_step_and_an_evaluation_are_those_of_the_documents_alone(corpus: Corpus) -> None:
    """Micro-batches with different numbers of targets, against the mean over all targets of all documents."""
    settings = DistillSettings(
        tokens=3 * LENGTH, batch_rows=3, micro_rows=1, learning_rate=0.01, cross_entropy_weight=0.25
    )
    student, model = make_student(), make_teacher()
    teacher = OnlineTeacher(model, corpus)
    figures, counts = {}, {}
    for part, rows in ((Part.TRAIN, corpus.train[:3]), (Part.HELD_OUT, corpus.held_out)):
        kl = ce = count = 0
        for row in rows:
            for ids in documents(row):
                with torch.no_grad():
                    log_q, log_p = (
                        head_of(one).logits(final_states(one, ids[None]))[0, :-1].double().log_softmax(-1)
                        for one in (student, model)
                    )
                kl += functional.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
                ce += functional.nll_loss(log_q, ids[1:], reduction="sum").item()
                count += len(ids) - 1
        figures[part] = kl / count, ce / count
        counts[part] = count
    metrics = evaluate(student, teacher, corpus, range(3))
    assert (metrics.kl_to_parent, metrics.held_out_ce) == pytest.approx(figures[Part.HELD_OUT], rel=1e-5)
    assert metrics.tokens == counts[Part.HELD_OUT]
    [step] = distill(student, teacher, corpus, settings=settings)
    assert (step.kl, step.ce) == pytest.approx(figures[Part.TRAIN], rel=1e-5)
