"""Teachers that are no single model, the corpus and mixtures; and one that learns by low-rank additions."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch.nn import functional

from cascade.distillation.fused import fused_distillation_loss
from cascade.distillation.labels import CorpusTeacher
from cascade.distillation.lora import LowRank
from cascade.distillation.mixture import MixedTeacher
from cascade.distillation.signals import OnlineTeacher, Part
from cascade.distillation.states import Head, final_states, head_of
from cascade.distillation.targets import BucketTargets, Targets
from cascade.errors import InputError
from tests.tiny import make_model
from tests.unit.distillation.teaching import make_rows

VOCABULARY = 258


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_to_learn_from_the_corpus_is_cross_entropy(weight: float) -> None:
    corpus = make_rows()
    draw = torch.Generator().manual_seed(0)
    targets = CorpusTeacher(corpus, VOCABULARY).targets(Part.TRAIN, [0, 2])
    labels = corpus.train[[0, 2]].long()[:, 1:].flatten()
    hidden = torch.randn(len(labels), 16, dtype=torch.float64, generator=draw).requires_grad_()
    head = torch.randn(VOCABULARY, 16, dtype=torch.float64, generator=draw).requires_grad_()
    terms = fused_distillation_loss(hidden, Head(head), targets, labels, cross_entropy_weight=weight)
    terms.loss.backward()
    found = hidden.grad, head.grad
    hidden.grad = head.grad = None
    expected = functional.cross_entropy(hidden @ head.T, labels)
    expected.backward()
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for gradient, reference in zip(found, (hidden.grad, head.grad), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-7)


def test_a_mixture_is_the_weighted_mean_of_probabilities() -> None:
    corpus = make_rows()
    models = [make_model(seed=seed) for seed in (1, 2)]
    mixed = MixedTeacher([OnlineTeacher(model, corpus) for model in models], (0.25, 0.75))
    found = mixed.targets(Part.HELD_OUT, [1, 0]).logits().softmax(-1)
    ids = corpus.held_out[[1, 0]].long()
    with torch.no_grad():
        one, two = (model(input_ids=ids).logits[:, :-1].flatten(0, 1).softmax(-1) for model in models)
    torch.testing.assert_close(found, 0.25 * one + 0.75 * two, rtol=1e-4, atol=1e-6)


class Kept:
    """A teacher of which some entries were stored."""

    waited = 2.5

    def targets(self, part: Part, rows: Sequence[int]) -> Targets:
        return BucketTargets(torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, 1), VOCABULARY)


def test_a_mixture_of_kept_entries_is_refused_and_waits_add_up() -> None:
    mixed = MixedTeacher([Kept(), Kept()], (0.5, 0.5))
    assert mixed.waited == 5.0
    with pytest.raises(InputError, match="whole distributions"):
        mixed.targets(Part.TRAIN, [0])


def test_low_rank_additions_change_nothing_until_they_learn_and_merge_into_a_plain_model() -> None:
    pytest.importorskip("peft")
    model, ids = make_model(), torch.arange(24)[None]
    names = {name for name, _ in model.named_parameters()}
    state = torch.get_rng_state()
    with torch.no_grad():
        before = final_states(model, ids)
    additions = LowRank(model, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    after = final_states(model, ids)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    after.square().sum().backward()
    learning = {name: one for name, one in model.named_parameters() if one.requires_grad}
    assert learning
    assert all("lora" in name and one.grad is not None and one.grad.any() for name, one in learning.items())
    with torch.no_grad():
        for one in learning.values():
            one.add_(0.05)
        learned = final_states(model, ids)
    merged = additions.merged()
    assert {name for name, _ in merged.named_parameters()} == names
    assert not torch.allclose(learned, before, atol=1e-2)
    with torch.no_grad():
        torch.testing.assert_close(final_states(merged, ids), learned, rtol=1e-3, atol=1e-4)
    assert head_of(merged).weight is merged.get_input_embeddings().weight
