"""Held-out figures against their definitions over the whole [N, V] in float64."""

from __future__ import annotations

import pytest
import torch

from cascade.distillation.signals import OnlineTeacher
from cascade.errors import InputError
from cascade.evaluation.metrics import Metrics, evaluate
from tests.unit.distillation.teaching import LENGTH, make_rows, make_student, make_teacher


def test_figures_are_their_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows in batches of two, chunks that do not divide them."""
    monkeypatch.setattr("cascade.evaluation.metrics.BATCH_TOKENS", 2 * LENGTH)
    monkeypatch.setattr("cascade.distillation.fused.CHUNK_BYTES", 8 * 4 * 258)
    model, parent, corpus = make_student(), make_teacher(), make_rows(held_out=6)
    metrics = evaluate(model, OnlineTeacher(parent, corpus), corpus, range(5))
    ids = corpus.held_out[:5].long()
    with torch.no_grad():
        log_q, log_p = (
            which(input_ids=ids).logits[:, :-1].flatten(0, 1).double().log_softmax(-1)
            for which in (model, parent)
        )
    ce = -log_q.gather(1, ids[:, 1:].flatten()[:, None]).mean()
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    agreed = (log_q.argmax(-1) == log_p.argmax(-1)).double().mean()
    assert metrics.held_out_ce == pytest.approx(ce.item(), rel=1e-5)
    assert metrics.kl_to_parent == pytest.approx(kl.item(), rel=1e-5)
    assert metrics.top1_agreement == pytest.approx(agreed.item(), abs=1e-12)
    assert metrics.tokens == 5 * (LENGTH - 1)
    assert metrics.tokens_per_second > 0


def test_the_parent_is_no_distance_from_itself() -> None:
    corpus, parent = make_rows(), make_teacher()
    metrics = evaluate(parent, OnlineTeacher(parent, corpus), corpus, range(3))
    assert metrics.kl_to_parent == pytest.approx(0, abs=1e-7)
    assert metrics.top1_agreement == 1.0


def test_only_the_clock_differs_between_two_runs() -> None:
    corpus = make_rows()
    teacher = OnlineTeacher(make_teacher(), corpus)

    def figures(metrics: Metrics) -> tuple[float, ...]:
        return metrics.held_out_ce, metrics.kl_to_parent, metrics.top1_agreement

    student = make_student(attention_dropout=0.5).train()
    assert figures(evaluate(student, teacher, corpus, range(3))) == figures(
        evaluate(student, teacher, corpus, range(3))
    )


def test_nothing_to_measure_is_refused() -> None:
    corpus = make_rows()
    with pytest.raises(InputError, match="held-out row"):
        evaluate(make_student(), OnlineTeacher(make_teacher(), corpus), corpus, range(0))


def test_another_vocabulary_is_refused() -> None:
    corpus = make_rows()
    with pytest.raises(InputError, match="different vocabularies"):
        evaluate(make_student(vocab_size=2000), OnlineTeacher(make_teacher(), corpus), corpus, range(1))


def test_other_padding_of_the_parent_is_no_part_of_the_kl() -> None:
    """The cross-entropy is the model's own, over all that it can say."""
    corpus, model = make_rows(), make_student()
    plain = evaluate(model, OnlineTeacher(make_teacher(), corpus), corpus, range(2))
    padded = make_student(vocab_size=300)
    with torch.no_grad():
        padded.get_input_embeddings().weight[:258] = model.get_input_embeddings().weight
        padded.load_state_dict(
            {name: value for name, value in model.state_dict().items() if value.ndim < 2 or "layers" in name},
            strict=False,
        )
    wide = evaluate(padded, OnlineTeacher(make_teacher(), corpus), corpus, range(2))
    assert wide.kl_to_parent == pytest.approx(plain.kl_to_parent, rel=1e-6)
    assert wide.held_out_ce > plain.held_out_ce + 0.01
    narrow = evaluate(model, OnlineTeacher(padded, corpus), corpus, range(2))
    assert narrow.kl_to_parent == pytest.approx(0, abs=1e-6)
