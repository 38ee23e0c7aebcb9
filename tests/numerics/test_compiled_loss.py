"""The compiled loss against the plain one and against float64, and how often it is compiled.

N tokens, D and E hidden sizes, V vocabulary, B tokens of a block.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from cascade.distillation.fused import IGNORED, Terms, fused_distillation_loss
from cascade.distillation.objectives import Objective
from cascade.distillation.states import Head
from cascade.distillation.targets import StateTargets

N, D, E, V, B = 23, 8, 11, 37, 4
FULL_BLOCKS = 5

pytestmark = [
    pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler"),
    # torch's own compiler is written with what torch deprecates.
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks of B tokens; graphs of other tests would count towards torch's limit for one function."""
    monkeypatch.setattr("cascade.distillation.fused.BLOCK_BYTES", 4 * V * B)
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def drawn(dtype: torch.dtype, cap: float | None = None) -> tuple[Tensor, Head, StateTargets, Tensor]:
    """Random states and heads; 21 targets, so that the last block is no whole one."""
    draw = torch.Generator().manual_seed(5)
    shapes = ((N, D), (V, D), (N, E), (V, E))
    student, head, teacher, other = (torch.randn(*s, generator=draw, dtype=torch.float64) for s in shapes)
    labels = torch.randint(V, (N,), generator=draw)
    labels[[0, 7]] = IGNORED
    student, head = student.to(dtype).requires_grad_(), head.to(dtype).requires_grad_()
    return student, Head(head, cap=cap), StateTargets(teacher.to(dtype), Head(other.to(dtype))), labels


def found(dtype: torch.dtype, compiled: bool, cap: float | None = None, **how: Any) -> list[Tensor]:
    """Loss, divergence, cross-entropy and both gradients, in float64."""
    student, head, targets, labels = drawn(dtype, cap)
    terms: Terms = fused_distillation_loss(student, head, targets, labels, compiled=compiled, **how)
    terms.loss.backward()
    assert student.grad is not None
    assert head.weight.grad is not None
    parts = (terms.loss, terms.kl, terms.ce, student.grad, head.weight.grad)
    return [part.detach().double() for part in parts]


def assert_equal(compiled: list[Tensor], plain: list[Tensor], tolerance: float) -> None:
    for ours, theirs in zip(compiled, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def test_a_weight_that_changes_and_a_smaller_last_block_compile_nothing_more() -> None:
    for weight in (0.3, 0.45, 0.0, 0.6, 1.0, 0.0):
        assert_equal(
            found(torch.float32, True, cross_entropy_weight=weight),
            found(torch.float32, False, cross_entropy_weight=weight),
            3e-6,
        )
    # One with the cross-entropy, one without.
    assert graphs() == 2
    assert not counters["graph_break"]


def test_only_whole_blocks_of_whole_distributions_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []

    def block(student: Tensor, teacher: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
        asked.append(tuple(student.shape))
        return torch.zeros(2, dtype=torch.float64)

    monkeypatch.setattr("cascade.distillation.fused.compiled_block", lambda *_: block)
    found(torch.float32, True)
    assert asked == [(B, V)] * FULL_BLOCKS
    found(torch.float32, False)
    assert len(asked) == FULL_BLOCKS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "temperature", "dtype"),
    [
        *((objective, 2.5, torch.float64) for objective in Objective),
        (Objective.FORWARD_KL, 1.0, torch.float64),
        (Objective.FORWARD_KL, 1.0, torch.float32),
        (Objective.JSD, 2.5, torch.float32),
    ],
)
def test_value_and_gradients_are_those_of_the_plain_loss(
    objective: Objective, temperature: float, dtype: torch.dtype
) -> None:
    tolerance = 1e-12 if dtype is torch.float64 else 3e-6
    for weight in (0.0, 0.3, 1.0):
        how = {"objective": objective, "temperature": temperature, "cross_entropy_weight": weight}
        assert_equal(found(dtype, True, **how), found(torch.float64, False, **how), tolerance)
    assert graphs() == 2


@pytest.mark.slow
def test_a_soft_cap_is_compiled_too() -> None:
    how = {"objective": Objective.JSD, "temperature": 0.7, "cross_entropy_weight": 0.4}
    assert_equal(found(torch.float64, True, 5.0, **how), found(torch.float64, False, 5.0, **how), 1e-12)
    assert graphs() == 1


@pytest.mark.slow
@pytest.mark.parametrize("objective", Objective)
def test_a_large_vocabulary_loses_no_more_than_the_plain_loss(
    objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums over 50021 entries in float32, against float64."""
    tokens, vocabulary = 8, 50_021
    monkeypatch.setattr("cascade.distillation.fused.BLOCK_BYTES", 4 * vocabulary * tokens)
    draw = torch.Generator().manual_seed(6)
    shapes = ((tokens, D), (vocabulary, D), (tokens, E), (vocabulary, E))
    states = [torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in shapes]
    labels = torch.randint(vocabulary, (tokens,), generator=draw)

    def run(dtype: torch.dtype, compiled: bool) -> list[Tensor]:
        student, head, teacher, other = (state.detach().clone().to(dtype) for state in states)
        student.requires_grad_()
        targets = StateTargets(teacher, Head(other))
        terms = fused_distillation_loss(
            student,
            Head(head),
            targets,
            labels,
            objective=objective,
            cross_entropy_weight=0.3,
            compiled=compiled,
        )
        terms.loss.backward()
        assert student.grad is not None
        return [terms.kl.detach(), terms.ce.detach(), student.grad.double()]

    exact = run(torch.float64, False)
    for ours, plain, true in zip(run(torch.float32, True), run(torch.float32, False), exact, strict=True):
        scale = true.abs().max()
        error, usual = ((part - true).abs().max() / scale for part in (ours, plain))
        assert error <= max(3 * usual, 2e-6)
