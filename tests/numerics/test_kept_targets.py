"""Targets that keep some entries of a distribution, and mixtures, against plain float64 autograd.

N tokens, D hidden size, V vocabulary, K kept entries.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cascade.distillation.fused import fused_distillation_loss
from cascade.distillation.objectives import Objective
from cascade.distillation.states import Head
from cascade.distillation.targets import (
    BucketTargets,
    MixedTargets,
    SparseTargets,
    StateTargets,
    Targets,
    aligned,
    dense,
)
from cascade.errors import InputError
from tests.numerics.divergences import EVERY, by_definition
from tests.numerics.temporaries import LargestResult

N, D, V, K = 19, 6, 31, 5
LABELS = torch.arange(N) * 7 % V
WEIGHTS = [0.0, 0.3, 1.0]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def student() -> tuple[Tensor, Head]:
    return draw(N, D, seed=1).requires_grad_(), Head(draw(V, D, seed=2).requires_grad_(), 0.7, 6.0)


def teacher() -> Tensor:
    """Its logarithmic probabilities [N, V]."""
    return (2 * draw(N, V, seed=3)).log_softmax(-1)


def buckets(entries: int = K) -> BucketTargets:
    log_p, ids = teacher().topk(entries, -1)
    return BucketTargets(ids, log_p, V)


def sparse(samples: int, seed: int, log_p: Tensor | None = None) -> SparseTargets:
    """Drawn with replacement, each weighing 1 / samples: one id may come twice, and none is padding."""
    log_p = teacher() if log_p is None else log_p
    ids = log_p.exp().multinomial(samples, replacement=True, generator=torch.Generator().manual_seed(seed))
    entropy = -(log_p.exp() * log_p).sum(-1)
    return SparseTargets(ids, torch.full(ids.shape, 1 / samples, dtype=torch.float64), entropy, V)


def check_against(plain: Callable[[Tensor], Tensor], targets: Targets, weight: float, **how: object) -> None:
    """The fused loss and its gradients are those of plain: from logits [N, V] to the divergence [N]."""
    states, head = student()
    logits = head.logits(states)
    ce = torch.nn.functional.cross_entropy(logits, LABELS)
    expected = (1 - weight) * plain(logits.log_softmax(-1)).mean() + weight * ce
    wanted = torch.autograd.grad(expected, [states, head.weight])
    for chunk in (4, N):
        terms = fused_distillation_loss(
            states, head, targets, LABELS, cross_entropy_weight=weight, chunk=chunk, **how
        )
        found = torch.autograd.grad(terms.loss, [states, head.weight])
        assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-10)
        assert terms.ce.item() == pytest.approx(ce.item(), rel=1e-10)
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def grouped(log_NV: Tensor, ids: Tensor) -> Tensor:
    """[N, K + 1]: the kept entries and the logarithm of the sum of the others, one by one."""
    others = torch.ones(log_NV.shape, dtype=torch.bool).scatter(1, ids, False)
    tail = [row[mask].exp().sum().log() for row, mask in zip(log_NV, others, strict=True)]
    return torch.cat([log_NV.gather(1, ids), torch.stack(tail)[:, None]], -1)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(("objective", "objective_weight"), EVERY)
def test_buckets_equal_autograd_for_every_objective(
    objective: Objective, objective_weight: float | None, weight: float
) -> None:
    targets = buckets()
    log_p = grouped(teacher(), targets.ids)
    check_against(
        lambda log_q: by_definition(objective, grouped(log_q, targets.ids), log_p, objective_weight),
        targets,
        weight,
        objective=objective,
        objective_weight=objective_weight,
    )


@pytest.mark.parametrize("objective", Objective)
def test_buckets_of_the_whole_vocabulary_are_the_whole_distribution(objective: Objective) -> None:
    """The tail is then empty on both sides."""
    states, head = student()
    found = []
    for targets in (buckets(V), StateTargets(teacher(), Head(torch.eye(V, dtype=torch.float64)))):
        terms = fused_distillation_loss(states, head, targets, LABELS, objective=objective)
        found.append((terms.loss.detach(), *torch.autograd.grad(terms.loss, [states, head.weight])))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("objective", Objective)
def test_a_student_equal_in_every_bucket_has_neither_loss_nor_gradient(objective: Objective) -> None:
    states, head = student()
    log_q, ids = head.logits(states.detach()).log_softmax(-1).topk(K, -1)
    terms = fused_distillation_loss(
        states, head, BucketTargets(ids, log_q.detach(), V), LABELS, objective=objective
    )
    terms.loss.backward()
    assert terms.loss.item() == pytest.approx(0, abs=1e-12)
    # A total variation's gradient is a sign: rounding decides it.
    if objective is not Objective.TOTAL_VARIATION:
        assert states.grad.abs().max() < 1e-12


def test_buckets_never_exceed_the_whole_divergence_and_reach_it() -> None:
    states, head = student()
    whole = by_definition(Objective.FORWARD_KL, head.logits(states).log_softmax(-1), teacher()).mean().item()
    found = [
        fused_distillation_loss(states, head, buckets(entries), LABELS).loss.item()
        for entries in (1, 5, 20, V)
    ]
    assert found == sorted(found)
    assert found[-1] == pytest.approx(whole)


def test_rounded_probabilities_that_sum_to_more_than_one_stay_a_distribution() -> None:
    log_p = torch.tensor([[-0.69, -0.69]]).log_softmax(-1) + 1e-3
    log_buckets = BucketTargets(torch.tensor([[0, 1]]), log_p, V).log_buckets()
    assert log_buckets.exp().sum().item() == pytest.approx(1)
    assert log_buckets.isfinite().all()


@pytest.mark.parametrize("weight", WEIGHTS)
def test_sparse_targets_equal_autograd(weight: float) -> None:
    """Entries that come twice add up; weights need not sum to one; padding has weight zero."""
    targets = sparse(8, seed=4)
    weights = targets.weights * (1 + draw(N, 8, seed=5).abs())
    weights[:, -2:] = 0
    targets = SparseTargets(targets.ids, weights, targets.entropy, V)
    check_against(
        lambda log_q: -targets.entropy - (weights * log_q.gather(1, targets.ids)).sum(-1), targets, weight
    )


def test_sparse_targets_that_are_the_whole_distribution_give_the_forward_kl() -> None:
    log_p = teacher()
    ids = torch.arange(V).expand(N, V)
    whole = SparseTargets(ids, log_p.exp(), -(log_p.exp() * log_p).sum(-1), V)
    check_against(lambda log_q: by_definition(Objective.FORWARD_KL, log_q, log_p), whole, 0.2)


def test_the_mean_over_samples_is_the_exact_loss_and_gradient() -> None:
    """4000 independent draws of importance-weighted entries, whose weights sum to one only in expectation."""
    states, head = student()
    log_p, count = teacher(), 4000
    proposal = (log_p / 2).softmax(-1)
    exact = fused_distillation_loss(
        states, head, StateTargets(log_p, Head(torch.eye(V, dtype=torch.float64))), LABELS
    )
    wanted = torch.autograd.grad(exact.loss, states)[0]
    ids = proposal.repeat(count, 1).multinomial(
        3, replacement=True, generator=torch.Generator().manual_seed(6)
    )
    weights = (log_p.exp() / proposal).repeat(count, 1).gather(1, ids) / 3
    entropy = -(log_p.exp() * log_p).sum(-1).repeat(count)
    repeated = states.detach().repeat(count, 1).requires_grad_()
    terms = fused_distillation_loss(
        repeated, head, SparseTargets(ids, weights, entropy, V), LABELS.repeat(count), total_targets=N
    )
    drawn = torch.autograd.grad(terms.loss, repeated)[0].view(count, N, D)
    error = drawn.mean(0) - wanted
    deviation = drawn.std(0) / count**0.5
    assert (weights.sum(-1) - 1).abs().max() > 0.5
    assert (error.abs() < 5 * deviation).all()
    assert terms.loss.item() / count == pytest.approx(exact.loss.item(), rel=0.05)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("objective", "objective_weight"), EVERY)
def test_a_mixture_is_of_probabilities(
    objective: Objective, objective_weight: float | None, temperature: float
) -> None:
    states, head = student()
    heads = [Head(draw(V, D, seed=seed), cap=cap) for seed, cap in ((7, None), (8, 5.0))]
    parts = [draw(N, D, seed=seed) for seed in (9, 10)]
    mixed = MixedTargets(tuple(map(StateTargets, parts, heads)), (0.3, 0.7))
    p = sum(
        share * other.logits(part).softmax(-1)
        for share, part, other in zip((0.3, 0.7), parts, heads, strict=True)
    )
    log_p = (p.log() / temperature).log_softmax(-1)
    log_q = (head.logits(states) / temperature).log_softmax(-1)
    expected = temperature**2 * by_definition(objective, log_q, log_p, objective_weight).mean()
    terms = fused_distillation_loss(
        states,
        head,
        mixed,
        LABELS,
        objective=objective,
        objective_weight=objective_weight,
        temperature=temperature,
        chunk=5,
    )
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-9)
    ours, theirs = (torch.autograd.grad(loss, states)[0] for loss in (terms.loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(mixed[3:5].logits(), p[3:5].log())


def test_a_mixture_of_one_is_that_teacher() -> None:
    part = StateTargets(draw(N, D, seed=9), Head(draw(V, D, seed=7)))
    torch.testing.assert_close(MixedTargets((part,), (1.0,)).logits(), part.logits().log_softmax(-1))
    decimals = MixedTargets((part, part, part), (0.3333333, 0.3333333, 0.3333333)).logits()
    torch.testing.assert_close(decimals, part.logits().log_softmax(-1), rtol=0, atol=1e-5)


def test_a_mixture_of_teachers_with_other_padding_is_over_what_they_share() -> None:
    wide, narrow = (StateTargets(draw(N, D, seed=9), Head(draw(rows, D, seed=7))) for rows in (V + 9, V))
    with pytest.raises(InputError, match="different tokens or vocabularies"):
        MixedTargets((wide, narrow), (0.5, 0.5))
    mixed = MixedTargets((wide, wide), (0.5, 0.5)).narrowed(V)
    torch.testing.assert_close(mixed.logits(), wide.narrowed(V).logits().log_softmax(-1))


@pytest.mark.parametrize("weights", [(0.5, 0.6), (1.0,), (1.5, -0.5), (1.0, 0.0)])
def test_weights_that_make_no_mixture_are_refused(weights: tuple[float, ...]) -> None:
    part = StateTargets(draw(N, D, seed=9), Head(draw(V, D, seed=7)))
    with pytest.raises(InputError, match="one positive weight for each"):
        MixedTargets((part, part), weights)


@pytest.mark.parametrize(
    ("targets", "how", "value"),
    [
        (sparse(4, seed=1), {"objective": Objective.JSD}, "objective jsd"),
        (sparse(4, seed=1), {"temperature": 2.0}, "temperature 2"),
        (buckets(), {"temperature": 0.5}, "temperature 0.5"),
    ],
)
def test_what_kept_entries_cannot_tell_is_refused(
    targets: Targets, how: dict[str, object], value: str
) -> None:
    with pytest.raises(InputError, match="too few entries") as caught:
        fused_distillation_loss(*student(), targets, LABELS, **how)
    assert caught.value.value == value
    assert "`signals: hidden`" in caught.value.remedy


@pytest.mark.parametrize("targets", [sparse(4, seed=1), buckets()])
def test_kept_entries_fit_a_student_with_more_padding_but_not_with_less(targets: Targets) -> None:
    states, head = student()
    wide = Head(
        torch.cat([head.weight.detach(), 9 * draw(40, D, seed=11)]).requires_grad_(), head.scale, head.cap
    )
    ours, theirs = (fused_distillation_loss(states, some, targets, LABELS) for some in (wide, head))
    assert ours.loss.item() == theirs.loss.item()
    ours.loss.backward()
    assert not wide.weight.grad[V:].any()
    with pytest.raises(InputError, match="cannot be narrowed") as caught:
        fused_distillation_loss(states, head.narrowed(V - 1), targets, LABELS)
    assert caught.value.value == f"{V} entries, to be narrowed to {V - 1}"


@pytest.mark.parametrize("targets", [sparse(4, seed=1), buckets()])
def test_kept_entries_are_no_whole_distribution(targets: Targets) -> None:
    with pytest.raises(InputError, match="whole distributions"):
        dense(targets)
    assert aligned(targets, V + 3) is targets


@pytest.mark.parametrize("kind", ["sparse", "buckets"])
def test_kept_entries_need_one_chunk_of_logits_and_blocks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """512 tokens x 4096 entries in one chunk: nothing but the student's logits is that large."""
    rows, vocabulary = 512, 4096
    monkeypatch.setattr("cascade.distillation.fused.BLOCK_BYTES", 8 * 4 * vocabulary)
    ids = torch.arange(4).expand(rows, 4)
    log_p = torch.full((rows, 4), -2.0)
    targets = {
        "sparse": SparseTargets(ids, log_p.exp(), torch.zeros(rows), vocabulary),
        "buckets": BucketTargets(ids, log_p, vocabulary),
    }[kind]
    states, head = torch.randn(rows, 4).requires_grad_(), Head(torch.randn(vocabulary, 4).requires_grad_())
    with LargeResults() as large:
        fused_distillation_loss(
            states, head, targets, torch.zeros(rows).long(), cross_entropy_weight=0.5, chunk=rows
        )
    assert large.memories == {large.first}


class LargeResults(LargestResult):
    """Notes in which memory results of a whole chunk lie."""

    def __init__(self) -> None:
        super().__init__()
        self.memories: set[int] = set()
        self.first = 0

    def __torch_dispatch__(
        self, func: object, types: object, args: object = (), kwargs: object = None
    ) -> object:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if isinstance(result, Tensor) and result.numel() == 512 * 4096:
            memory = result.untyped_storage().data_ptr()
            self.first = self.first or memory
            self.memories.add(memory)
        return result
