"""The fused loss against plain float64 autograd over the whole [N, V], and its invariances.

N tokens, D and E hidden sizes, V vocabulary; sizes are odd on purpose, so that no chunk divides them.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cascade.distillation.fused import IGNORED, chunk_tokens, fused_distillation_loss
from cascade.distillation.objectives import Objective
from cascade.distillation.states import Head
from cascade.distillation.targets import StateTargets, Targets
from cascade.errors import InputError
from tests.numerics.divergences import EVERY, by_definition
from tests.numerics.temporaries import LargestResult

N, D, E, V = 23, 8, 11, 37


@dataclass
class Case:
    """Random states and heads with the logits of a trained model's spread, and a few ignored labels."""

    student: Tensor
    student_head: Tensor
    teacher: Tensor
    teacher_head: Tensor
    labels: Tensor
    value: float = 0.0

    def to(self, dtype: torch.dtype) -> Case:
        floats = (self.student, self.student_head, self.teacher, self.teacher_head)
        student, student_head, teacher, teacher_head = (tensor.detach().to(dtype) for tensor in floats)
        return Case(
            student.requires_grad_(), student_head.requires_grad_(), teacher, teacher_head, self.labels
        )

    def arguments(self, rows: slice = slice(None)) -> tuple[Tensor, Head, Targets, Tensor]:
        targets = StateTargets(self.teacher[rows], Head(self.teacher_head))
        return self.student[rows], Head(self.student_head), targets, self.labels[rows]

    def gradients(self) -> tuple[Tensor, Tensor]:
        assert self.student.grad is not None
        assert self.student_head.grad is not None
        return self.student.grad, self.student_head.grad


@pytest.fixture
def case() -> Case:
    draw = torch.Generator().manual_seed(5)
    labels = torch.randint(V, (N,), generator=draw)
    labels[[0, 7, N - 1]] = IGNORED
    student, student_head, teacher, teacher_head = (
        torch.randn(rows, width, generator=draw, dtype=torch.float64)
        for rows, width in ((N, D), (V, D), (N, E), (V, E))
    )
    return Case(student, student_head, teacher, teacher_head, labels)


def plain_loss(
    case: Case, objective: Objective, temperature: float, weight: float, objective_weight: float | None = None
) -> Tensor:
    """The definition, written out: mean over targets of (1-w) T^2 divergence + w cross-entropy."""
    logits, teacher_logits = case.student @ case.student_head.T, case.teacher @ case.teacher_head.T
    kept = case.labels != IGNORED
    log_q, log_p = (functional.log_softmax(z[kept] / temperature, -1) for z in (logits, teacher_logits))
    divergence = by_definition(objective, log_q, log_p, objective_weight).mean()
    cross_entropy = functional.cross_entropy(logits, case.labels, ignore_index=IGNORED)
    return (1 - weight) * temperature**2 * divergence + weight * cross_entropy


@pytest.mark.parametrize(("objective", "objective_weight"), EVERY)
@pytest.mark.parametrize(
    ("temperature", "weight"), [(1.0, 0.0), (2.5, 0.0), (1.0, 0.3), (0.7, 0.5), (1.0, 1.0)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_value_and_gradients_equal_float64_autograd(
    case: Case,
    objective: Objective,
    objective_weight: float | None,
    temperature: float,
    weight: float,
    dtype: torch.dtype,
) -> None:
    reference, fused = case.to(torch.float64), case.to(dtype)
    plain = plain_loss(reference, objective, temperature, weight, objective_weight)
    plain.backward()
    terms = fused_distillation_loss(
        *fused.arguments(),
        objective=objective,
        objective_weight=objective_weight,
        temperature=temperature,
        cross_entropy_weight=weight,
        chunk=5,
    )
    terms.loss.backward()
    tolerance = 1e-12 if dtype is torch.float64 else 3e-6
    assert terms.loss.item() == pytest.approx(plain.item(), rel=tolerance, abs=tolerance)
    for ours, theirs in zip(fused.gradients(), reference.gradients(), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


def test_terms_are_the_divergence_and_the_cross_entropy(case: Case) -> None:
    reference = case.to(torch.float64)
    terms = fused_distillation_loss(
        *reference.arguments(), temperature=2.0, cross_entropy_weight=0.25, chunk=4
    )
    assert terms.kl.item() == pytest.approx(plain_loss(reference, Objective.FORWARD_KL, 2.0, 0.0).item() / 4)
    assert terms.ce.item() == pytest.approx(plain_loss(reference, Objective.FORWARD_KL, 2.0, 1.0).item())
    assert not terms.kl.requires_grad
    assert not terms.ce.requires_grad


@pytest.mark.parametrize("objective", Objective)
def test_chunks_and_splits_change_nothing(case: Case, objective: Objective) -> None:
    whole, chunked, split = (case.to(torch.float64) for _ in range(3))
    total = int((case.labels != IGNORED).sum())
    losses = [
        fused_distillation_loss(*part.arguments(), objective=objective, cross_entropy_weight=0.2, chunk=chunk)
        for part, chunk in ((whole, N), (chunked, 1))
    ]
    for terms in losses:
        terms.loss.backward()
    value = 0.0
    for rows in (slice(0, 3), slice(3, 16), slice(16, N)):
        terms = fused_distillation_loss(
            *split.arguments(rows), objective=objective, cross_entropy_weight=0.2, total_targets=total
        )
        terms.loss.backward()
        value += terms.loss.item()
    assert losses[0].loss.item() == pytest.approx(losses[1].loss.item(), rel=1e-12)
    assert losses[0].loss.item() == pytest.approx(value, rel=1e-12)
    for other in (chunked, split):
        for ours, theirs in zip(other.gradients(), whole.gradients(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_ignored_tokens_change_nothing(case: Case) -> None:
    clean, dirty = case.to(torch.float64), case.to(torch.float64)
    ignored = case.labels == IGNORED
    with torch.no_grad():
        dirty.student[ignored] = torch.inf
        dirty.teacher[ignored] = torch.nan
    losses = [fused_distillation_loss(*part.arguments(), cross_entropy_weight=0.5) for part in (clean, dirty)]
    for terms in losses:
        terms.loss.backward()
    assert losses[0].loss.item() == losses[1].loss.item()
    for ours, theirs in zip(dirty.gradients(), clean.gradients(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert not dirty.gradients()[0][ignored].any()


def test_no_target_at_all_is_zero(case: Case) -> None:
    empty = case.to(torch.float32)
    empty.labels = torch.full_like(case.labels, IGNORED)
    terms = fused_distillation_loss(*empty.arguments(), cross_entropy_weight=0.5)
    terms.loss.backward()
    assert terms.loss.item() == 0
    assert not any(gradient.any() for gradient in empty.gradients())


@pytest.mark.parametrize("objective", Objective)
def test_a_perfect_student_has_neither_loss_nor_gradient(case: Case, objective: Objective) -> None:
    twin = case.to(torch.float32)
    twin.teacher, twin.teacher_head = twin.student.detach(), twin.student_head.detach()
    terms = fused_distillation_loss(*twin.arguments(), objective=objective, temperature=3.0, chunk=6)
    terms.loss.backward()
    assert terms.loss.item() == pytest.approx(0, abs=1e-7)
    assert max(gradient.abs().max().item() for gradient in twin.gradients()) < 1e-6


def test_the_gradient_is_scaled_by_what_follows_the_loss(case: Case) -> None:
    once, thrice = case.to(torch.float64), case.to(torch.float64)
    fused_distillation_loss(*once.arguments()).loss.backward()
    (3 * fused_distillation_loss(*thrice.arguments()).loss).backward()
    for ours, theirs in zip(thrice.gradients(), once.gradients(), strict=True):
        torch.testing.assert_close(ours, 3 * theirs)


def test_a_frozen_head_gets_no_gradient(case: Case) -> None:
    frozen = case.to(torch.float64)
    frozen.student_head = frozen.student_head.detach()
    fused_distillation_loss(*frozen.arguments()).loss.backward()
    assert frozen.student.grad is not None
    assert frozen.student_head.grad is None


def test_bfloat16_states_keep_a_float32_head_gradient(case: Case) -> None:
    """The GPU's path: bfloat16 products, but the chunks' contributions to the head add up in float32."""
    reference, low = case.to(torch.float64), case.to(torch.float32)
    low.student = low.student.detach().bfloat16().requires_grad_()
    low.teacher = low.teacher.bfloat16()
    plain_loss(reference, Objective.FORWARD_KL, 1.0, 0.5).backward()
    terms = fused_distillation_loss(*low.arguments(), cross_entropy_weight=0.5, chunk=2)
    terms.loss.backward()
    assert low.student_head.grad is not None
    assert low.student_head.grad.dtype is torch.float32
    for ours, theirs in zip(low.gradients(), reference.gradients(), strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize("longer", ["student", "teacher"])
@pytest.mark.parametrize("objective", Objective)
def test_padding_of_either_vocabulary_is_removed_from_both_distributions(
    case: Case, longer: str, objective: Objective
) -> None:
    """Rows as large as real ones, which a logit of zero or a softmax over them would let in."""
    exact, padded = case.to(torch.float64), case.to(torch.float64)
    name = f"{longer}_head"
    rows = getattr(padded, name).detach()
    wide = torch.cat([rows, 5 * torch.randn(128, rows.shape[1], dtype=torch.float64)])
    setattr(padded, name, wide.requires_grad_(longer == "student"))
    for part in (exact, padded):
        terms = fused_distillation_loss(
            *part.arguments(), objective=objective, temperature=1.5, cross_entropy_weight=0.3, chunk=5
        )
        terms.loss.backward()
        part.value = terms.loss.item()
    assert padded.value == exact.value
    (hidden, head), (expected_hidden, expected_head) = padded.gradients(), exact.gradients()
    torch.testing.assert_close(hidden, expected_hidden, rtol=0, atol=0)
    torch.testing.assert_close(head[:V], expected_head, rtol=0, atol=0)
    assert not head[V:].any()


@pytest.mark.parametrize(("student", "teacher"), [(151936, 152064), (152064, 151936)])
def test_the_two_paddings_of_qwen_fit_together(student: int, teacher: int) -> None:
    draw = torch.Generator().manual_seed(6)
    states = torch.randn(2, 3, generator=draw).requires_grad_()
    head, other = (Head(torch.randn(rows, 3, generator=draw)) for rows in (student, teacher))
    labels = torch.tensor([7, 151_935])
    targets = StateTargets(states.detach() / 2, other)
    terms = fused_distillation_loss(states, head, targets, labels, objective=Objective.REVERSE_KL)
    log_q, log_p = (
        (part @ some.weight[:151_936].T).double().log_softmax(-1)
        for part, some in ((states.detach(), head), (targets.states, other))
    )
    expected = by_definition(Objective.REVERSE_KL, log_q, log_p).mean()
    assert terms.kl.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("change", [-1025, 1025])
def test_vocabularies_that_differ_by_more_than_padding_are_refused(change: int) -> None:
    states = torch.randn(4, 2)
    targets = StateTargets(states, Head(torch.randn(2000 + change, 2)))
    with pytest.raises(InputError, match="different vocabularies") as caught:
        fused_distillation_loss(states, Head(torch.randn(2000, 2)), targets, torch.zeros(4).long())
    assert caught.value.value == f"2000 and {2000 + change} entries"


@pytest.mark.parametrize("objective", Objective)
def test_blocks_of_a_chunk_change_nothing(
    case: Case, objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, blocks = case.to(torch.float64), case.to(torch.float64)
    for part, rows in ((whole, N), (blocks, 3)):
        monkeypatch.setattr("cascade.distillation.fused.BLOCK_BYTES", 4 * V * rows)
        terms = fused_distillation_loss(
            *part.arguments(), objective=objective, temperature=0.7, cross_entropy_weight=0.4, chunk=11
        )
        terms.loss.backward()
        part.value = terms.loss.item()
    assert blocks.value == pytest.approx(whole.value, rel=1e-12)
    for ours, theirs in zip(blocks.gradients(), whole.gradients(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("objective", Objective)
def test_no_temporary_is_larger_than_a_chunk(objective: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    """All logits of 512 tokens x 4096 entries would be 2^21 elements; a chunk of 1 MiB has 2^18."""
    monkeypatch.setattr("cascade.distillation.fused.CHUNK_BYTES", 2**20)
    tensors = [torch.randn(rows, 4) for rows in (512, 4096, 512, 4096)]
    case = Case(*tensors, torch.zeros(512).long()).to(torch.float32)
    with LargestResult() as largest:
        fused_distillation_loss(
            *case.arguments(), objective=objective, temperature=2.0, cross_entropy_weight=0.5
        ).loss.backward()
    assert largest.elements == 2**18


@pytest.mark.parametrize("vocabulary", [258, 49152, 128256, 10**8])
def test_a_chunk_fits_its_bytes_or_is_the_smallest(vocabulary: int) -> None:
    tokens = chunk_tokens(vocabulary)
    assert tokens % 8 == 0
    assert tokens == 8 or 4 * tokens * vocabulary <= 64 * 2**20 < 4 * (tokens + 8) * vocabulary
