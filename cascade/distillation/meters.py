"""What a step costs, and the file in which a person can watch the steps."""

from __future__ import annotations

import json
import platform
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from cascade.distillation.signals import Teacher
from cascade.distillation.training_state import StepRecord


class Stopwatch:
    """Runs from its creation on, but for pauses."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def seconds(self) -> float:
        """Run so far."""
        return time.monotonic() - self._start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The watch stands still inside."""
        begin = time.monotonic()
        yield
        self._start += time.monotonic() - begin


def peak_resident() -> int:
    """The largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def peak_memory(device: torch.device) -> int:
    """The largest so far in bytes: allocated on a GPU, or resident."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident()


def seconds_waited(teacher: Teacher) -> float:
    """For stored signals so far; none where a teacher computes its answers or keeps no count."""
    return float(getattr(teacher, "waited", 0.0))


class StepFile:
    """JSON lines, one a step; written line by line, so that a person can watch and a crash keeps them."""

    def __init__(self, path: Path | None, steps: Sequence[StepRecord]) -> None:
        """Begins with the steps that are finished. What an earlier process wrote is replaced: the steps that
        it trained after its last snapshot are trained again."""
        self._path = path
        if path:
            write_steps(path, steps)

    def append(self, step: StepRecord) -> None:
        """Add a finished step."""
        if self._path:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(_line(step))


def write_steps(path: Path, steps: Sequence[StepRecord]) -> None:
    """One line of JSON for each."""
    path.write_text("".join(map(_line, steps)), "utf-8")


def _line(step: StepRecord) -> str:
    return json.dumps(asdict(step)) + "\n"
