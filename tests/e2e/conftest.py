"""The command line, run in the test's own process: what costs seconds to import is imported once."""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cascade import cli

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Command]:
    """Run `cascade` with its own scratch folder; returns its exit code and what it said."""
    at_sigterm, threshold = signal.getsignal(signal.SIGTERM), gc.get_threshold()
    monkeypatch.setenv("CASCADE_CACHE", str(tmp_path / "cache"))

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["cascade", *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.err + captured.out

    yield run
    signal.signal(signal.SIGTERM, at_sigterm)
    gc.set_threshold(*threshold)
