"""Latency: the rates explain what was measured, and every measurement is made once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cascade.architecture import Architecture
from cascade.evaluation.latency import Bench, Latency, amounts, kept, non_negative, probes
from cascade.models.decoder import decoder_of
from tests.architectures import ARCHITECTURES, tiny
from tests.unit.planning.shapes import SMOLLM2_135M


def bench_of(name: str) -> tuple[Bench, Architecture]:
    decoder = decoder_of(tiny(name))
    config = decoder.model.config
    bench = Bench(type(decoder.model), config, decoder.anatomy, 16, torch.device("cpu"))
    return bench, decoder.architecture


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_any_architecture_can_be_measured(name: str) -> None:
    bench, shape = bench_of(name)
    for probe in probes(shape):
        assert bench.milliseconds(probe) > 0


def test_known_rates_are_found_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    true = (0.3, 20.0, 10.0, 5.0)

    def pretend(bench: Bench, shape: Architecture) -> float:
        return sum(rate * amount for rate, amount in zip(true, amounts(shape), strict=True))

    monkeypatch.setattr(Bench, "milliseconds", pretend)
    bench, _ = bench_of("llama")
    rates = Latency(bench, tmp_path / "known.json").rates(SMOLLM2_135M)
    for shape in (
        SMOLLM2_135M,
        replace(SMOLLM2_135M, layers=20, ffn=700),
        replace(SMOLLM2_135M, kv_groups=1),
    ):
        assert rates.predict(shape) == pytest.approx(pretend(bench, shape), rel=1e-6)


def test_no_rate_is_negative() -> None:
    rows = torch.tensor([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0]], dtype=torch.float64)
    found = non_negative(rows, torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    assert found[0] == 0
    assert found[1] == pytest.approx(2.0)


def test_a_measurement_is_made_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bench, shape = bench_of("llama")
    path = tmp_path / "deep" / "known.json"
    first = Latency(bench, path).milliseconds(shape)

    def never(bench: Bench, shape: Architecture) -> float:
        raise AssertionError("measured again")

    monkeypatch.setattr(Bench, "milliseconds", never)
    assert Latency(bench, path).milliseconds(shape) == first


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a": "x", "b": NaN, "c": -1.0, "d": 1e999}'])
def test_what_is_damaged_is_measured_again(tmp_path: Path, text: str) -> None:
    path = tmp_path / "known.json"
    path.write_text(text)
    assert kept(path) == {}
