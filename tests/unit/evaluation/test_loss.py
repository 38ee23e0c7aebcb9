"""The cross-entropy against its definition over the whole [N, V] in float64."""

from __future__ import annotations

import pytest
import torch

from cascade.distillation.signals import Part
from cascade.distillation.states import final_states, head_of
from cascade.evaluation.loss import cross_entropy
from tests.unit.distillation.teaching import LENGTH, make_rows, make_student


@pytest.mark.parametrize("part", Part)
def test_the_figure_is_its_definition(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows in batches of two, chunks that do not divide them."""
    monkeypatch.setattr("cascade.evaluation.loss.BATCH_TOKENS", 2 * LENGTH)
    monkeypatch.setattr("cascade.distillation.fused.CHUNK_BYTES", 8 * 4 * 258)
    model, corpus = make_student(attention_dropout=0.5).train(), make_rows(held_out=6)
    found = cross_entropy(model, corpus, part, [4, 0, 1, 3, 2])
    ids = (corpus.train if part is Part.TRAIN else corpus.held_out)[:5].long()
    with torch.no_grad():
        log_q = model.eval()(input_ids=ids).logits[:, :-1].flatten(0, 1).double().log_softmax(-1)
    expected = -log_q.gather(1, ids[:, 1:].flatten()[:, None]).mean()
    assert found == pytest.approx(expected.item(), rel=1e-5)


def test_the_token_after_an_end_of_text_is_no_target() -> None:
    model, corpus = make_student(), make_rows()
    end = int(corpus.held_out[0, 2])
    corpus.end_of_text = end
    ids = corpus.held_out[:1].long()
    positions = corpus.positions(ids)
    with torch.no_grad():
        logits = head_of(model.eval()).logits(final_states(model, ids, positions))[0, :-1]
    kept = ids[0, :-1] != end
    assert not kept.all()
    log_q = logits.double().log_softmax(-1)
    expected = -log_q.gather(1, ids[0, 1:, None])[kept].mean()
    assert cross_entropy(model, corpus, Part.HELD_OUT, [0]) == pytest.approx(expected.item(), rel=1e-5)
