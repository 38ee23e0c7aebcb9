"""What codecs keep of a distribution: how much, how exactly, and without bias where they promise it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cascade.distillation.signals.codecs import Codec, Decoded, make_codec
from cascade.distillation.signals.entries import Sampled, TopK
from cascade.distillation.signals.fidelity import _rows_of, fidelity
from cascade.distillation.signals.head_and_tail import HeadAndTail
from cascade.distillation.signals.packing import STEPS, pack, rounded_shares, uniforms, unpack
from cascade.distillation.states import Head
from cascade.distillation.targets import BucketTargets, SparseTargets, StateTargets
from cascade.errors import InputError

VOCABULARY = 64
# The states are the logits themselves.
PLAIN = Head(torch.eye(VOCABULARY))
SPARSE = ("sampled", "head_and_tail")


def logits(tokens: int, seed: int = 0) -> Tensor:
    """Uniform, ordinary and peaked distributions [tokens, V] in turn; one has no tail at all."""
    draw = torch.Generator().manual_seed(seed)
    scales = torch.tensor([0.0, 0.5, 2.0, 4.0, 30.0]).repeat(tokens // 5 + 1)[:tokens, None]
    found = scales * torch.randn(tokens, VOCABULARY, generator=draw)
    found[-1, 3] = 1000.0
    return found


def as_rows(tokens_NV: Tensor, rows: int = 1) -> Tensor:
    """States [rows, N + 1, V] whose targets are these tokens in every row."""
    return torch.cat([tokens_NV, tokens_NV[:1]])[None].repeat(rows, 1, 1)


def codec(name: str, token_bytes: int = 24, seed: int = 0, draws: int = 12) -> Codec:
    return make_codec(name, VOCABULARY, VOCABULARY, token_bytes=token_bytes, seed=seed, draws=draws)


def decoded(chosen: Codec, states_BTE: Tensor) -> Decoded:
    stored = chosen.encode(states_BTE, PLAIN, range(len(states_BTE)))
    return chosen.decode(_rows_of(stored, chosen), PLAIN)


def weights(chosen: Codec, states_BTE: Tensor) -> Tensor:
    """The decoded estimate of every probability [B, N, V], float64."""
    targets = decoded(chosen, states_BTE)
    assert isinstance(targets, SparseTargets)
    dense_NV = torch.zeros(len(targets), VOCABULARY, dtype=torch.float64)
    dense_NV.scatter_add_(1, targets.ids, targets.weights.double())
    return dense_NV.unflatten(0, (len(states_BTE), -1))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_packed_integers_come_back(size: int) -> None:
    values = torch.randint(256**size, (5, 7))
    values[0, 0], values[0, 1] = 0, 256**size - 1
    stored = pack(values, size)
    assert stored.dtype is torch.uint8
    assert stored.shape == (5, 7 * size)
    torch.testing.assert_close(unpack(stored, size), values, rtol=0, atol=0)


def test_rounded_shares_are_right_on_average_and_never_more_than_the_whole() -> None:
    p_NV = logits(10).double().softmax(-1)
    sums_NV = p_NV.cumsum(1).clamp_max(1)
    grid = 512
    total = torch.zeros_like(p_NV)
    for place in range(grid):
        shares = rounded_shares(sums_NV, torch.full((10,), (place + 0.5) / grid))
        assert (shares >= 0).all()
        assert (shares.sum(1) <= STEPS).all()
        assert ((shares / STEPS - p_NV).abs() < 1 / STEPS).all()
        total += shares
    # The mean over the grid is the mean over all dithers up to the grid's own step.
    assert (total / grid / STEPS - p_NV).abs().max() <= 2 / (grid * STEPS)


def test_draws_depend_on_the_seed_and_the_row_alone() -> None:
    together, alone = uniforms(7, [3, 4, 5], 6, 2), uniforms(7, [4], 6, 2)
    assert together[6:12].equal(alone)
    assert not together[:6].equal(alone)
    assert not uniforms(8, [4], 6, 2).equal(alone)
    assert not uniforms(4, [7], 6, 2).equal(alone)


@pytest.mark.parametrize("token_bytes", [12, 24, 64])
@pytest.mark.parametrize("name", SPARSE)
def test_the_expected_weight_is_the_probability(name: str, token_bytes: int) -> None:
    """Bernstein's inequality for each entry, with a chance of one in a million that any test of an unbiased
    codec fails: |mean - p| <= sqrt(2 v L / R) + 2 L / (3 R) for R drawings of weights in [0, 1], where v is
    the codec's own variance and L = log(2 * entries * 1e6)."""
    tokens_NV, drawings = logits(6), 4000
    p_NV = tokens_NV.double().softmax(-1)
    chosen = codec(name, token_bytes, draws=9)
    found = weights(chosen, as_rows(tokens_NV, drawings))
    assert (found >= 0).all()
    assert (found <= 1 + 1e-6).all()
    torch.testing.assert_close(found.sum(2), torch.ones(drawings, 6, dtype=torch.float64))
    variance = p_NV * (1 - p_NV) / 9 if isinstance(chosen, Sampled) else found.var(0)
    L = math.log(2 * p_NV.numel() * 1e6)
    bound = (2 * variance * L / drawings).sqrt() + 2 * L / (3 * drawings)
    difference = (found.mean(0) - p_NV).abs()
    assert (difference <= bound).all()
    # And all entries of a token together, whose mean squared distance is the codec's error over R.
    error = (found - p_NV).square().sum(2).mean(0)
    assert (difference.square().sum(1) <= 4 * error / drawings + 1e-9).all()


@pytest.mark.parametrize("name", SPARSE)
def test_entries_of_a_token_differ_and_its_entropy_is_kept(name: str) -> None:
    tokens_NV = logits(200, seed=3)
    targets = decoded(codec(name), as_rows(tokens_NV))
    assert isinstance(targets, SparseTargets)
    for ids, kept in zip(targets.ids, targets.weights, strict=True):
        assert len(set(ids[kept > 0].tolist())) == int((kept > 0).sum())
    log_NV = tokens_NV.double().log_softmax(-1)
    entropy = -(log_NV.exp() * log_NV).sum(1)
    assert (targets.entropy - entropy).abs().max() <= 1 / 8192 + 1e-5


def test_a_token_takes_the_head_of_least_error() -> None:
    """Against every split, in float64: r^2 / S - sum of the tail's p^2, among those without p > r / S."""
    p_NV = logits(300, seed=1).double().softmax(-1)
    chosen = codec("head_and_tail")
    assert isinstance(chosen, HeadAndTail)
    found = chosen.encode(as_rows(logits(300, seed=1)), PLAIN, [0])["head"][0]
    for p_V, size in zip(p_NV.sort(descending=True).values.tolist(), found.tolist(), strict=True):
        errors = []
        for H, S in enumerate(chosen.splits):
            tail = p_V[H:]
            rest = math.fsum(tail)
            drawable = S == 1 or tail[0] * S <= rest * 0.999
            errors.append(rest**2 / S - math.fsum(p * p for p in tail) if drawable else math.inf)
        assert errors[size] <= min(errors) + 1e-6
    assert len(set(found.tolist())) > 2


def test_the_tail_has_less_error_than_draws_of_the_same_bytes() -> None:
    tokens_NV = logits(40, seed=2)
    states = as_rows(tokens_NV, 200)
    p_NV = tokens_NV.double().softmax(-1)
    error = {}
    for name in SPARSE:
        chosen = codec(name).fitted(states[:1], PLAIN)
        stored = chosen.encode(states, PLAIN, range(200))
        taken = sum(part.nbytes for key, part in stored.items() if key != "sizes") / (200 * 40)
        assert 20 <= taken <= 25
        error[name] = (weights(chosen, states) - p_NV).square().sum(2).mean().item()
    assert error["head_and_tail"] < 0.85 * error["sampled"]


@pytest.mark.parametrize(("vocabulary", "size"), [(49152, 2), (65536, 2), (65537, 3), (128256, 3)])
def test_all_codecs_of_entries_keep_within_their_bytes(vocabulary: int, size: int) -> None:
    for allowed in (12, 24, 256):
        for name in ("top_k", "sampled", "head_and_tail"):
            chosen = make_codec(name, 8, vocabulary, token_bytes=allowed)
            assert allowed - 2 * size - 1 <= chosen.token_bytes() <= allowed
            assert vars(chosen)["id_bytes"] == size


def test_large_ids_come_back() -> None:
    head = Head(torch.zeros(70_000, 2))
    head.weight[[69_999, 66_000, 3]] = torch.tensor([[9.0, 0.0], [8.0, 0.0], [7.0, 0.0]])
    states = torch.tensor([[[3.0, 0.0], [0.0, 0.0]]])
    for name in ("top_k", "sampled", "head_and_tail"):
        chosen = make_codec(name, 2, 70_000, draws=20)
        targets = chosen.decode(_rows_of(chosen.encode(states, head, [0]), chosen), head)
        assert not isinstance(targets, StateTargets)
        assert 69_999 in targets.ids[0].tolist()


def test_the_likeliest_entries_and_the_rest_to_one() -> None:
    tokens_NV = logits(50)
    targets, chosen = decoded(codec("top_k"), as_rows(tokens_NV)), codec("top_k")
    assert isinstance(chosen, TopK)
    assert isinstance(targets, BucketTargets)
    assert chosen.kept == 6
    p_NV = tokens_NV.double().softmax(-1)
    kept_NK = targets.log_p.double().exp()
    assert (kept_NK - p_NV.gather(1, targets.ids)).abs().max() < 2 / STEPS
    assert (p_NV.gather(1, targets.ids).sum(1) >= p_NV.topk(6).values.sum(1) - 1e-6).all()
    assert torch.isfinite(targets.log_p).all()
    assert (1 - targets.log_p.exp().sum(1) > 0).all()


def test_int8_states_are_off_by_half_a_scale_at_most() -> None:
    states = torch.cat([as_rows(logits(40)), torch.zeros(1, 41, VOCABULARY)])
    targets = decoded(codec("hidden_int8"), states)
    assert isinstance(targets, StateTargets)
    exact = states[:, :-1].flatten(0, 1)
    scale = exact.abs().amax(1, keepdim=True) / 127
    assert ((targets.states - exact).abs() <= 0.5001 * scale).all()
    assert not targets.states.equal(exact)


def test_fidelity_is_measured_by_its_definition() -> None:
    tokens_NV = logits(60)[:59]
    states = as_rows(tokens_NV)
    log_NV = tokens_NV.double().log_softmax(-1)
    p_NV = log_NV.exp()

    drawn = codec("head_and_tail")
    expected = (weights(drawn, states)[0] - p_NV).square().sum(1).mean().sqrt().item()
    assert fidelity(drawn, states, PLAIN, [0]) == {"weights_rms": pytest.approx(expected, rel=1e-5)}

    bucket = codec("top_k", 40)
    kept = decoded(bucket, states)
    assert isinstance(kept, BucketTargets)
    q_NV = torch.zeros_like(p_NV).scatter(1, kept.ids, kept.log_p.double().exp())
    rest = 1 - q_NV.sum(1)
    q_NV = torch.where(q_NV > 0, q_NV, (rest / (VOCABULARY - kept.ids.shape[1]))[:, None])
    kl = (p_NV * (log_NV - q_NV.log())).sum(1).mean().item()
    found = fidelity(bucket, states, PLAIN, [0])
    assert found == {
        "decoded_kl": pytest.approx(kl, rel=1e-6),
        "rest": pytest.approx(rest.mean().item(), rel=1e-6),
    }
    assert kl > 0.01


def test_an_unknown_codec_is_refused_with_those_there_are() -> None:
    with pytest.raises(InputError, match="another codec") as caught:
        codec("zip")
    assert "head_and_tail" in str(caught.value)
