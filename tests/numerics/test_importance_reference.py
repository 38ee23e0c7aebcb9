"""The streamed scores against a dense reference: a Llama from its formulas in float64."""

from __future__ import annotations

from collections.abc import Callable, Collection

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cascade.importance.agreement import agreement
from cascade.importance.calibration import calibrate
from cascade.importance.method import Aggregation
from tests.numerics.dense import Dense, llama_of
from tests.tiny import make_model


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model("llama", seed=3)


@pytest.fixture(scope="module")
def rows() -> Tensor:
    return torch.randint(0, 256, (7, 24), generator=torch.Generator().manual_seed(1), dtype=torch.int32)


@pytest.fixture(scope="module")
def dense(model: PreTrainedModel, rows: Tensor) -> Dense:
    return llama_of(model).run(rows)


@pytest.fixture(scope="module")
def found(model: PreTrainedModel, rows: Tensor) -> dict[str, Tensor]:
    return calibrate(model, rows, batch=3, drops=(1, 2, 3)).statistics


def aggregated(values_NTX: Tensor) -> dict[str, Tensor]:
    """The three aggregations from their formulas, [..., N, T, X] to [..., X]."""
    magnitudes = values_NTX.abs()
    return {
        "rms": values_NTX.pow(2).mean((-3, -2)).sqrt(),
        "mean": magnitudes.mean((-3, -2)),
        "l2_mean": magnitudes.mean(-2).pow(2).sum(-2).sqrt(),
    }


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6, equal_nan=True)


def pairs(value: Callable[[int, int], Tensor], lengths: Collection[int]) -> Tensor:
    """The matrix [5, 5] of value(i, j) for the blocks of these lengths, NaN elsewhere."""
    matrix = torch.full((5, 5), torch.nan, dtype=torch.float64)
    for i in range(5):
        for j in range(i + 1, 5):
            if j - i in lengths:
                matrix[i, j] = value(i, j)
    return matrix


def test_reference_is_the_model(model: PreTrainedModel, rows: Tensor, dense: Dense) -> None:
    """The reference would prove nothing if it were another model."""
    with torch.no_grad():
        logits = model(input_ids=rows.long()).logits.double()
    expected = dense.norms[-1] @ model.get_output_embeddings().weight.double().T
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_block_influence_is_one_minus_the_mean_cosine(found: dict[str, Tensor], dense: Dense) -> None:
    def influence(i: int, j: int) -> Tensor:
        before, after = dense.streams[i], dense.streams[j]
        cosine = (before * after).sum(-1) / (before.pow(2).sum(-1).sqrt() * after.pow(2).sum(-1).sqrt())
        return 1 - cosine.mean()

    same(found["layers.block_influence"], pairs(influence, range(1, 5)))


def test_norm_ratio_is_the_mean_of_output_over_input(found: dict[str, Tensor], dense: Dense) -> None:
    norms = [stream.pow(2).sum(-1).sqrt() for stream in dense.streams]
    same(found["layers.norm_ratio"], pairs(lambda i, j: (norms[j] / norms[i]).mean(), range(1, 5)))


def test_drops_are_what_a_model_without_the_layers_does(
    found: dict[str, Tensor], model: PreTrainedModel, rows: Tensor
) -> None:
    llama = llama_of(model)
    whole, blocks = llama.logits(rows), [(i, j) for i in range(4) for j in range(i + 1, 5)]
    without = {(i, j): [k for k in range(4) if not i <= k < j] for i, j in blocks}
    rises = pairs(lambda i, j: llama.loss(rows, without[i, j]) - llama.loss(rows), (1, 2, 3))
    torch.testing.assert_close(
        found["layers.perplexity"].double(), rises, rtol=1e-3, atol=1e-5, equal_nan=True
    )
    squares = pairs(lambda i, j: (llama.logits(rows, without[i, j]) - whole).pow(2).mean(), (1, 2, 3))
    same(found["layers.logit_mse"], squares)


@pytest.mark.parametrize("aggregation", Aggregation)
def test_widths_are_aggregated_over_rows_and_tokens(
    found: dict[str, Tensor], dense: Dense, aggregation: Aggregation
) -> None:
    same(found[f"hidden.{aggregation}"], aggregated(torch.stack(dense.norms))[aggregation].sum(0))
    same(found[f"ffn.{aggregation}"], aggregated(torch.stack(dense.products))[aggregation])
    heads_LNTGqh = torch.stack(dense.heads).unflatten(3, (2, 2))
    groups = heads_LNTGqh.pow(2).sum((-1, -2)).sqrt()
    same(found[f"kv_groups.{aggregation}"], aggregated(groups)[aggregation])
    heads = heads_LNTGqh.pow(2).sum(-1).sqrt().flatten(-2)
    same(found[f"heads_per_group.{aggregation}"], aggregated(heads)[aggregation].unflatten(-1, (2, 2)))


def test_agreement_is_that_of_even_and_odd_rows(model: PreTrainedModel, rows: Tensor) -> None:
    """Batches of three begin at even and at odd rows."""
    measured = calibrate(model, rows, batch=3)
    even, odd = calibrate(model, rows[::2]).statistics, calibrate(model, rows[1::2]).statistics
    assert measured.agreement.keys() == {
        f"{axis}.{aggregation}"
        for axis in ("hidden", "ffn", "kv_groups", "heads_per_group")
        for aggregation in Aggregation
    }
    for name, share in measured.agreement.items():
        assert share == pytest.approx(agreement(even[name], odd[name]), abs=0.01)
        assert 0.25 <= share <= 1
