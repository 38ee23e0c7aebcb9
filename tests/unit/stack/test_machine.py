"""How many GPUs there are, and what is said where a driver is there and torch sees none."""

from __future__ import annotations

from pathlib import Path

import pytest

from cascade.stack import machine
from cascade.stack.machine import gpu_count


@pytest.mark.parametrize(
    ("question", "count", "note"),
    [
        ("print('a warning'); print(2)", 2, ""),
        ("print(0)", 0, "(it counts 0)"),
        ("import sys; sys.exit('no torch')", 0, "(no torch)"),
        ("print('words')", 0, "(exit code 0)"),
        ("import time; time.sleep(600)", 0, "(it did not answer in 3 s)"),
    ],
)
def test_torch_is_asked_where_a_driver_is(
    question: str, count: int, note: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"DRIVERS": (tmp_path,), "QUESTION": question, "SECONDS": 3.0}.items():
        monkeypatch.setattr(machine, name, value)
    if "sleep" not in question:
        monkeypatch.setattr(machine, "SECONDS", 120.0)
    said: list[str] = []
    assert gpu_count(said.append) == count
    assert note in "".join(said)
    assert bool(said) == (not count)


def test_without_a_driver_nobody_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "DRIVERS", (tmp_path / "none",))
    assert gpu_count(pytest.fail) == 0
