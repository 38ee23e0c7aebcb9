"""Signals in every codec: written shard by shard, on from what is finished, read back row by row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cascade.distillation.loop import distill
from cascade.distillation.settings import DistillSettings
from cascade.distillation.signals import (
    FinishedShards,
    OnlineTeacher,
    Part,
    StoredTeacher,
    make_codec,
    write_signals,
    writing,
)
from cascade.distillation.signals.codecs import CODECS, Codec, split_rows
from cascade.distillation.states import head_of
from cascade.distillation.targets import StateTargets, Targets
from cascade.evaluation.metrics import evaluate
from cascade.storage.locations import Location
from tests.unit.distillation.teaching import LENGTH, make_rows, make_student, make_teacher

ROWS = 10


def make(name: str) -> Codec:
    return make_codec(name, 48, 258, seed=5)


def tensors(targets: Targets) -> dict[str, Tensor]:
    return {name: value for name, value in vars(targets).items() if isinstance(value, Tensor)}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a few rows, whatever the codec."""
    monkeypatch.setattr(writing, "_rows_per_shard", lambda codec, length: 4)
    monkeypatch.setattr(writing, "BATCH_TOKENS", 3 * LENGTH)


@pytest.mark.parametrize("name", CODECS)
def test_rows_come_back_in_any_order_as_they_were_encoded(name: str, tmp_path: Path) -> None:
    model, corpus = make_teacher(), make_rows()
    record = write_signals(model, corpus, tmp_path, ROWS, 3, codec=make(name))
    stored, online = StoredTeacher(tmp_path, head_of(model), corpus.identity), OnlineTeacher(model, corpus)
    chosen = stored.codecs[Part.TRAIN]
    assert (record["codec"], record["settings"]) == (name, chosen.settings())
    rows = [9, 0, 4, 4]
    states = torch.cat([online.states(Part.TRAIN, [row]) for row in rows])
    encoded = chosen.encode(states, online.head, rows)
    expected = tensors(chosen.decode(split_rows(encoded, chosen), online.head))
    found = tensors(stored.targets(Part.TRAIN, rows))
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert len(value) == len(rows) * (LENGTH - 1)
        # A batch of other rows rounds a state differently; an entry drawn at the edge may differ by it.
        same = torch.isclose(value.double(), expected[key].double(), rtol=1e-2, atol=1e-2)
        assert same.reshape(len(value), -1).all(1).double().mean() > 0.95
    held_out = stored.targets(Part.HELD_OUT, [2])
    assert isinstance(held_out, StateTargets)
    exact = online.targets(Part.HELD_OUT, [2])
    torch.testing.assert_close(held_out.states, exact.states.bfloat16().float(), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("name", CODECS)
def test_bytes_per_token_are_those_of_the_files(name: str, tmp_path: Path) -> None:
    record = write_signals(make_teacher(), make_rows(), tmp_path, ROWS, 3, codec=make(name))
    for part, rows, key in (
        ("train", ROWS, "bytes_per_token"),
        ("held_out", 3, "held_out_bytes_per_token"),
    ):
        size = sum(path.stat().st_size for path in tmp_path.glob(f"{part}-*"))
        assert record[key] == pytest.approx(size / (rows * LENGTH), abs=1e-3)
    measured = {"decoded_kl"} if name.startswith("hidden") else {"decoded_kl", "rest"}
    assert (measured if "hidden" in name or name == "top_k" else {"weights_rms"}) <= record.keys()


class Stopped(Exception):
    """The process ends here."""


class Counter:
    """Counts the rows that the teacher runs over; may stop after some."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int = 10**9) -> None:
        self.rows: list[int] = []
        inner = OnlineTeacher.states

        def states(teacher: OnlineTeacher, part: Part, rows: range) -> Tensor:
            if len(self.rows) + len(rows) > most:
                raise Stopped
            self.rows += rows
            return inner(teacher, part, rows)

        monkeypatch.setattr(OnlineTeacher, "states", states)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["hidden_bf16", "sampled", "head_and_tail"])
def test_a_second_try_computes_only_what_was_not_finished(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_signals(make_teacher(), make_rows(), tmp_path / "whole", ROWS, 3, codec=make(name))
    finished = FinishedShards(Location(str(tmp_path / "finished")))
    # Four rows to measure on, then a first shard of four and half of the second one.

    def attempt(folder: str) -> None:
        write_signals(
            make_teacher(), make_rows(), tmp_path / folder, ROWS, 3, codec=make(name), finished=finished
        )

    with monkeypatch.context() as patch:
        Counter(patch, most=4 + 4 + 3)
        with pytest.raises(Stopped):
            attempt("first")
    counter = Counter(monkeypatch)
    attempt("second")
    assert counter.rows[4:] == [*range(4, 10), *range(3)]
    assert contents(tmp_path / "second") == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["bytes", "record", "codec", "rows"])
def test_a_finished_shard_that_is_not_the_one_needed_is_made_again(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = FinishedShards(Location(str(tmp_path / "finished")))

    def write(folder: str, name: str = "head_and_tail", rows: int = 4) -> None:
        write_signals(
            make_teacher(), make_rows(), tmp_path / folder, rows, 0, codec=make(name), finished=finished
        )

    write_signals(make_teacher(), make_rows(), tmp_path / "whole", 4, 0, codec=make("head_and_tail"))
    write("one", name="top_k" if damage == "codec" else "head_and_tail", rows=3 if damage == "rows" else 4)
    shard = tmp_path / "finished" / "train-00000.safetensors"
    if damage == "bytes":
        shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    if damage == "record":
        shard.with_name(f"{shard.name}.json").write_text("[]")
    counter = Counter(monkeypatch)
    write("two")
    assert counter.rows[4:] == [0, 1, 2, 3]
    assert contents(tmp_path / "two") == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", CODECS)
def test_a_student_comes_nearer_to_the_teacher_with_every_codec(name: str, tmp_path: Path) -> None:
    model, corpus, student = make_teacher(), make_rows(train=48), make_student()
    # A random teacher is close to uniform: few entries of it are mostly noise.
    chosen = make_codec(name, 48, 258, token_bytes=200)
    write_signals(model, corpus, tmp_path, 48, 3, codec=chosen)
    stored = StoredTeacher(tmp_path, head_of(model), corpus.identity)
    before = evaluate(student, stored, corpus, range(3)).kl_to_parent
    settings = DistillSettings(tokens=96 * LENGTH, batch_rows=4, learning_rate=3e-3)
    distill(student, stored, corpus, settings=settings)
    assert evaluate(student, stored, corpus, range(3)).kl_to_parent < 0.95 * before
