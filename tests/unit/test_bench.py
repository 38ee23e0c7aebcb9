"""The benchmark command: what it offers, and that it trains and measures on different text."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.__main__ import BENCHMARKS, main, parser
from tests.bench.loss import require_agreement, row
from tests.bench.loss_trial import OURS, N, drawn, measure
from tests.bench.overhead import COLD, WARM, memory_note
from tests.bench.overhead import row as overhead_row
from tests.bench.parents import read_text
from tests.tiny import make_tokenizer


def test_help_lists_every_benchmark() -> None:
    text = parser().format_help()
    assert all(f"{name} " in text and what in text for name, what in BENCHMARKS.items())


def test_unknown_benchmark_is_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["cut", "sharpen"])
    said = capsys.readouterr().err
    assert (
        "no such benchmark: sharpen; there are cut, calibration, checkpoints, loss, race, overhead, family"
        in said
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


def test_a_loss_that_is_another_one_is_no_peer() -> None:
    same = {"loss": 8.7, "student": 0.027, "head": 0.15}
    require_agreement({OURS: same, "peer": {**same, "loss": 8.7001}})
    with pytest.raises(SystemExit, match=r"peer: head is 0\.2, not 0\.15"):
        require_agreement({OURS: same, "peer": {**same, "head": 0.2}})


def test_the_loss_row_says_who_is_fastest_and_how_much_memory_it_takes() -> None:
    found = {
        OURS: {"seconds": [1.0, 2.0, 3.0], "extra": [350.0, 350.0, 401.0]},
        "peer": {"seconds": [2.0, 2.2, 9.0], "extra": [900.0, 900.0, 900.0]},
    }
    assert row(128_256, OURS, found)[-1] == "faster than every peer: met, at most 400 MiB: met"
    assert row(32_000, "peer", found)[2] == "2.00 (1.10 to 3.00)"
    found["peer"]["seconds"] = [1.9, 1.9, 1.9]
    assert row(32_000, OURS, found)[-1] == "faster than every peer: missed"


def test_the_loss_that_is_measured_is_the_one_that_trains() -> None:
    figures = measure(OURS, 2000, seed=0)
    student, head, teacher, other = (tensor.detach().double() for tensor in drawn(2000, N, seed=0))
    log_q, log_p = (student @ head.T).log_softmax(-1), (teacher @ other.T).log_softmax(-1)
    exact = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert figures["loss"] == pytest.approx(exact, rel=1e-5)


def test_the_overhead_row_says_what_prefect_adds_and_whether_that_is_little() -> None:
    times = {"direct": [10.0], "Prefect": [30.0]}
    assert overhead_row(COLD, times, 20)[1:] == ["10.0", "30.0", "20.0", "1.00", "under 2 s a node: met"]
    assert overhead_row(WARM, times, 20)[-1] == "under 2 s a node: met, under 30 s in all: missed"
    assert overhead_row(COLD, times, 10)[-1] == "under 2 s a node: missed"


def test_the_overhead_note_compares_the_end_with_the_settled_process() -> None:
    settled = [50 * 2**20] * 10 + [100 * 2**20] * 40
    assert "over 50 nodes: 100.0 MiB after 10, 104.0 MiB at the end" in memory_note([*settled, 104 * 2**20])
    assert memory_note([*settled, 104 * 2**20]).endswith("at most 5% more: met")
    assert memory_note([*settled, 106 * 2**20]).endswith("at most 5% more: missed")
