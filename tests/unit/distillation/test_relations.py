"""Self-attention relations: the loss by its definition in float64, and what changes nothing.

B rows, T tokens, C student and E teacher channels, H relation heads.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cascade.distillation import relations
from cascade.distillation.relations import Sight, documents_of, relation_heads, relation_loss

B, T, C, E, H = 3, 11, 8, 12, 4
# Two texts and padding; one text; padding first.
DOCUMENTS = torch.tensor([[0] * 4 + [1] * 5 + [-1] * 2, [0] * T, [-1] * 3 + [5] * 8])
WAYS = [Sight(DOCUMENTS, causal) for causal in (True, False)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """With products large enough that the relations are far from uniform."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1.5


def told(seed: int = 3) -> Tensor:
    return torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < 0.7


def seen(sight: Sight, row: int, token: int) -> list[int]:
    text = sight.documents[row]
    others = range(token + 1) if sight.causal else range(T)
    return [other for other in others if text[other] == text[token]]


def reference(student: Tensor, teacher: Tensor, told_BT: Tensor, sight: Sight) -> Tensor:
    """Token by token and head by head, with autograd."""
    total = torch.zeros((), dtype=torch.float64)
    for row, token in told_BT.nonzero().tolist():
        if sight.documents[row, token] < 0:
            continue
        who = seen(sight, row, token)
        for head in range(H):
            sides = []
            for side in (student, teacher):
                size = side.shape[-1] // H
                part = side[row, :, head * size : (head + 1) * size]
                scores = torch.stack([part[token] @ part[other] for other in who]) / math.sqrt(size)
                sides.append(scores.softmax(0))
            ours, theirs = sides
            total = total + (theirs * (theirs / ours).log()).sum() / H
    return total


def value_and_gradient(student: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    own = student.clone().requires_grad_()
    value = relation_loss(own, *rest, H)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(value, own)
    return value.detach(), gradient


@pytest.mark.parametrize("sight", WAYS, ids=["causal", "both-ways"])
@pytest.mark.parametrize("block", [1, relations.BLOCK_BYTES])
def test_value_and_gradient_are_those_of_the_definition(
    sight: Sight, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relations, "BLOCK_BYTES", block)
    own, teacher = drawn(B, T, C).requires_grad_(), drawn(B, T, E, seed=1)
    expected = reference(own, teacher, told(), sight)
    (gradient,) = torch.autograd.grad(expected, own)
    exact = value_and_gradient(own.detach(), teacher, told(), sight)
    torch.testing.assert_close(exact, (expected.detach(), gradient), rtol=1e-10, atol=1e-12)
    rounded = value_and_gradient(own.detach().float(), teacher.float(), told(), sight)
    assert rounded[0].dtype == torch.float32
    torch.testing.assert_close(rounded[0].double(), exact[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(rounded[1].double(), exact[1], rtol=1e-4, atol=1e-5)


def test_half_precision_is_widened() -> None:
    own, teacher = drawn(B, T, C).bfloat16(), drawn(B, T, E, seed=1).bfloat16()
    value, gradient = value_and_gradient(own, teacher, told(), WAYS[0])
    wide = value_and_gradient(own.float(), teacher.float(), told(), WAYS[0])
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, wide[0], rtol=0, atol=0)
    torch.testing.assert_close(gradient, wide[1].bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("sight", WAYS, ids=["causal", "both-ways"])
def test_it_is_zero_at_equality_with_zero_gradient_and_else_positive(sight: Sight) -> None:
    own = drawn(B, T, C)
    value, gradient = value_and_gradient(own, own.clone(), told(), sight)
    assert abs(value.item()) < 1e-12
    assert gradient.abs().max() < 1e-12
    # Relations are products: turned channels have the same.
    turn, _ = torch.linalg.qr(drawn(C // H, C // H, seed=4))
    turned = (own.unflatten(-1, (H, -1)) @ turn).flatten(-2)
    assert abs(value_and_gradient(turned, own, told(), sight)[0].item()) < 1e-12
    for seed in range(20):
        other = drawn(B, T, E, seed=seed)
        assert value_and_gradient(own, other, told(), sight)[0].item() > 0.01


@pytest.mark.parametrize("sight", WAYS, ids=["causal", "both-ways"])
def test_padding_changes_nothing(sight: Sight) -> None:
    own, teacher, padding = drawn(B, T, C), drawn(B, T, E, seed=1), sight.documents < 0
    value, gradient = value_and_gradient(own, teacher, told(), sight)
    assert not gradient[padding].any()
    assert gradient[~padding].any(-1).float().mean() > 0.8
    elsewhere = torch.where(padding[..., None], drawn(B, T, C, seed=8) * 9, own)
    other = torch.where(padding[..., None], drawn(B, T, E, seed=9) * 9, teacher)
    again = value_and_gradient(elsewhere, other, told() | padding, sight)
    torch.testing.assert_close(again, (value, gradient), rtol=0, atol=0)
    # The one text of a row without padding, padded at both ends.
    long, wide = (
        torch.cat([drawn(1, 2, s.shape[-1]), s[1:2], drawn(1, 5, s.shape[-1])], 1) for s in (own, teacher)
    )
    texts = torch.tensor([[-1] * 2 + [0] * T + [-1] * 5])
    asked = torch.cat([torch.ones(1, 2), told()[1:2], torch.ones(1, 5)], 1).bool()
    padded = value_and_gradient(long, wide, asked, Sight(texts, sight.causal))
    alone = value_and_gradient(own[1:2], teacher[1:2], told()[1:2], Sight(DOCUMENTS[1:2], sight.causal))
    torch.testing.assert_close(padded[0], alone[0])
    torch.testing.assert_close(padded[1][:, 2:-5], alone[1])


@pytest.mark.parametrize("sight", WAYS, ids=["causal", "both-ways"])
def test_documents_of_a_row_count_as_if_each_were_alone(sight: Sight) -> None:
    own, teacher, asked = drawn(B, T, C), drawn(B, T, E, seed=1), told()
    parts = []
    for first, last in ((0, 4), (4, 9)):
        cut = (slice(0, 1), slice(first, last))
        alone = Sight(torch.zeros(1, last - first, dtype=torch.int64), sight.causal)
        parts.append(value_and_gradient(own[cut], teacher[cut], asked[cut], alone))
    whole = value_and_gradient(own[:1], teacher[:1], asked[:1], Sight(DOCUMENTS[:1], sight.causal))
    torch.testing.assert_close(whole[0], parts[0][0] + parts[1][0])
    torch.testing.assert_close(whole[1][:, :9], torch.cat([parts[0][1], parts[1][1]], 1))


def test_the_future_changes_nothing_but_for_those_who_see_it() -> None:
    own, teacher = drawn(1, T, C), drawn(1, T, E, seed=1)
    first = torch.arange(T)[None] < 6
    later = own.clone()
    later[:, 6:] = 7.0
    values = []
    for causal in (True, False):
        sight = Sight(torch.zeros(1, T, dtype=torch.int64), causal)
        values.append([value_and_gradient(one, teacher, first, sight)[0].item() for one in (own, later)])
    assert values[0][0] == values[0][1]
    assert values[1][0] != pytest.approx(values[1][1], rel=0.01)


@pytest.mark.parametrize("sight", WAYS, ids=["causal", "both-ways"])
def test_a_token_that_is_not_told_adds_nothing_of_its_own(sight: Sight) -> None:
    own, teacher, asked = drawn(B, T, C), drawn(B, T, E, seed=1), told()
    whole = value_and_gradient(own, teacher, asked, sight)
    halves = [value_and_gradient(own, teacher, asked & half, sight) for half in (told(5), ~told(5))]
    torch.testing.assert_close(whole[0], halves[0][0] + halves[1][0])
    torch.testing.assert_close(whole[1], halves[0][1] + halves[1][1])
    nobody = value_and_gradient(own, teacher, torch.zeros_like(asked), sight)
    assert nobody[0] == 0
    assert not nobody[1].any()


@pytest.mark.parametrize("sight", WAYS, ids=["causal", "both-ways"])
def test_the_split_of_a_batch_changes_nothing(sight: Sight) -> None:
    own, teacher, asked = drawn(B, T, C), drawn(B, T, E, seed=1), told()
    whole = value_and_gradient(own, teacher, asked, sight)
    rows = [slice(0, 2), slice(2, 3)]
    parts = [
        value_and_gradient(own[row], teacher[row], asked[row], Sight(sight.documents[row], sight.causal))
        for row in rows
    ]
    torch.testing.assert_close(whole[0], sum(part[0] for part in parts))
    torch.testing.assert_close(whole[1], torch.cat([part[1] for part in parts]))


def test_no_gradient_reaches_the_teacher() -> None:
    teacher = drawn(B, T, E, seed=1).requires_grad_()
    relation_loss(drawn(B, T, C).requires_grad_(), teacher, told(), WAYS[0], H).backward()
    assert teacher.grad is None


def test_documents_start_where_positions_do() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    found = documents_of(positions, (2, 6), positions.device)
    assert found.tolist() == [[1, 1, 1, 2, 2, 3], [1] * 6]
    assert documents_of(None, (2, 3), positions.device).tolist() == [[0] * 3] * 2


@pytest.mark.parametrize(
    ("student", "teacher", "heads"),
    [
        (384, 768, 48),
        (768, 768, 48),
        (384, 1024, 64),
        (384, 576, 32),
        (128, 192, 8),
        (16, 32, 2),
        (8, 8, 1),
        (7, 90, 1),
    ],
)
def test_relation_heads_divide_both_and_are_the_papers(student: int, teacher: int, heads: int) -> None:
    assert relation_heads(student, teacher) == heads
