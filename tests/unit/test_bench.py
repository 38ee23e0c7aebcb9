"""The benchmark command: what it offers, and that it trains and measures on different text."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.__main__ import BENCHMARKS, main, parser
from tests.bench.parents import read_text
from tests.tiny import make_tokenizer


def test_help_lists_every_benchmark() -> None:
    text = parser().format_help()
    assert all(f"{name} " in text and what in text for name, what in BENCHMARKS.items())


def test_unknown_benchmark_is_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["cut", "sharpen"])
    assert (
        "no such benchmark: sharpen; there are cut, calibration, race, signals, pruning"
        in capsys.readouterr().err
    )


def test_no_document_is_on_both_sides(tmp_path: Path) -> None:
    # Larger than 100 kB, so that the file is split; every line says where it is from.
    path = tmp_path / "text.txt"
    lines = [f"<{index:04}> " + "some more words " * 20 + "\n\n" for index in range(600)]
    path.write_text("".join(lines), encoding="ascii")
    tokenizer = make_tokenizer()
    first, second = (read_text(str(path), tokenizer, seed=seed, sequence_length=64) for seed in (0, 1))
    places = []
    for rows in (first.corpus.train, first.corpus.held_out):
        text = tokenizer.decode(rows.flatten().tolist())
        places.append({line for line in range(600) if f"<{line:04}>" in text})
    assert places[0]
    assert places[1]
    assert places[0].isdisjoint(places[1])
    assert first.corpus.held_out.equal(second.corpus.held_out)
    assert not first.corpus.train.equal(second.corpus.train)
