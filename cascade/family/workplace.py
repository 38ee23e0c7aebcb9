"""Where a node works: verified inputs, an empty folder for its files, and what it leaves behind."""

from __future__ import annotations

import os
import platform
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cascade.data.corpus import Corpus
from cascade.distillation.meters import peak_resident
from cascade.family.job import Job, JsonReport, StopSignal
from cascade.report import Report
from cascade.storage.artifacts import fetch
from cascade.storage.locations import open_location
from cascade.storage.manifest import Draft, InputRecord

LIBRARIES = ("cascade", "torch", "transformers", "torch-pruning", "datasets", "safetensors")


@dataclass(frozen=True)
class Result:
    """What a node found out, besides its files.

    facts: JSON. tokens: processed or trained. flops: analytic, of the whole node. teacher_flops: those of
    them that teachers took.
    """

    facts: dict[str, Any]
    tokens: int = 0
    flops: int = 0
    teacher_flops: int = 0


@dataclass(frozen=True)
class Workplace:
    """One job being done. `folder` becomes the artifact; `report` and `stop` lead to the orchestrator.

    leaving: is closed before the scratch folder is removed.
    """

    job: Job
    scratch: Path
    report: JsonReport
    stop: StopSignal
    leaving: ExitStack = field(default_factory=ExitStack)

    @cached_property
    def folder(self) -> Path:
        """The artifact's files, before they are stored."""
        path = self.scratch / "artifact"
        path.mkdir()
        return path

    @property
    def cache(self) -> Path:
        """Where verified copies from an object store are kept."""
        return Path(self.job.options.cache)

    @property
    def device(self) -> torch.device:
        """The device asked for, or the GPU where there is one."""
        return chosen_device(self.job.options.device)

    @property
    def working_dtype(self) -> torch.dtype:
        """Of models that are only read: float32 on a CPU (faster there than bfloat16), bfloat16 on a GPU."""
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    def input(self, name: str) -> Path:
        """A local folder with an input artifact, every file checked against its manifest."""
        return fetch(open_location(self.job.inputs[name]["uri"]), self.cache)

    @property
    def step_file(self) -> Path:
        """Where the steps of a training can be watched, and what a crash leaves of them."""
        folder = self.cache / "training"
        folder.mkdir(exist_ok=True)
        return folder / f"{self.job.family}-{self.job.stage}-{self.job.key[:12]}.jsonl"

    def corpus(self) -> Corpus:
        """The packed corpus."""
        return Corpus.open(self.input("corpus"))

    def draft(self, result: Result, seconds: float) -> Draft:
        """The manifest of this job's artifact, but for its files."""
        job = self.job
        return Draft(
            kind=job.kind,
            key=job.key,
            family=job.family,
            stage=job.stage,
            inputs={name: InputRecord(**record) for name, record in job.inputs.items()},
            spec=job.section,
            versions={"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
            seed=job.section.get("seed", 0),
            hardware=hardware(self.device),
            tokens=result.tokens,
            flops=result.flops,
            teacher_flops=result.teacher_flops,
            seconds=round(seconds, 3),
            facts=result.facts,
            run=job.options.run,
        )


@dataclass
class PassedTokens:
    """A report that also counts the tokens of passes that have come to their end."""

    report: Report
    tokens: int = 0

    def log(self, message: str) -> None:
        """One line for a person."""
        self.report.log(message)

    def progress(self, done: int, total: int, unit: str, **figures: float) -> None:
        """Of a pass, whose last report says that all is done."""
        self.report.progress(done, total, unit, **figures)
        if unit == "tokens" and done == total:
            self.tokens += total


def chosen_device(name: str) -> torch.device:
    """The device of that name, such as `cuda:0`; for "" the GPU where there is one."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def hardware(device: torch.device) -> dict[str, str | int]:
    """What the node ran on; peak_memory is the process's largest resident size in bytes."""
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "peak_memory": peak_resident(),
    }
