"""Time that a training loses to a snapshot: stored by the loop itself, or while the loop goes on."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch.nn.utils import clip_grad_norm_

from cascade.distillation.keeper import Keeper
from cascade.distillation.steps import adamw
from cascade.distillation.training_state import Progress, StepRecord, Training
from cascade.storage.checkpoints import TrainingCheckpoints
from cascade.storage.locations import open_location
from tests.bench.options import Options
from tests.bench.report import report, spread
from tests.s3_server import S3Server
from tests.tiny import make_model

SIZES = {
    "vocab_size": 8192,
    "num_hidden_layers": 6,
    "hidden_size": 320,
    "intermediate_size": 1024,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "head_dim": 64,
}
ROWS, LENGTH = 2, 128
BLOCK_SECONDS, ROUNDS, TARGET = 4.0, 6, 0.01
INTERVAL = 60.0
NONE = "none"

# Trains so many steps, and returns the seconds for which the loop stood still.
Block = Callable[[int], float]


@dataclass
class Trial:
    """A training of some ten million parameters on random tokens; what is learned does not matter."""

    training: Training
    ids_BT: torch.Tensor = field(default_factory=lambda: torch.randint(0, 8192, (ROWS, LENGTH)))

    def steps(self, count: int) -> float:
        """As any trainer does them; nothing waits."""
        student, optimizer = self.training.student, self.training.optimizer
        for _ in range(count):
            student(input_ids=self.ids_BT, labels=self.ids_BT, use_cache=False).loss.backward()
            clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step = self.training.step
            self.training.progress.steps.append(StepRecord(step, step, 1.0, 1.0, 1.0, 1e-3, 1.0, 1.0, 1.0))
        return 0.0


def synchronous(trial: Trial, checkpoints: TrainingCheckpoints) -> Block:
    """The loop copies and stores the state itself."""

    def block(steps: int) -> float:
        began = time.perf_counter()
        trial.training.state(trial.training.random_state()).save(checkpoints)
        stood = time.perf_counter() - began
        trial.steps(steps)
        return stood

    return block


def background(trial: Trial, checkpoints: TrainingCheckpoints) -> Block:
    """The loop goes on; what is not stored at the block's end is waited for."""

    def block(steps: int) -> float:
        with Keeper(trial.training, checkpoints, 0.0) as keeper:
            trial.steps(1)
            began = time.perf_counter()
            keeper.save_when_due(trial.training.random_state())
            stood = time.perf_counter() - began
            trial.steps(steps - 1)
        return stood

    return block


def run(options: Options) -> str:
    """Blocks of the same steps in turn, with a snapshot and without one."""
    student = make_model(**SIZES).train()
    trial = Trial(Training(student, adamw(student, 0.1), Progress({})))
    with stores() as places:
        trial.steps(2)
        began = time.perf_counter()
        trial.steps(3)
        count = max(2, round(BLOCK_SECONDS / ((time.perf_counter() - began) / 3)))
        blocks: dict[str, Block] = {NONE: trial.steps}
        for name, place in places.items():
            checkpoints = TrainingCheckpoints(open_location(place))
            blocks[f"{name}, synchronous"] = synchronous(trial, checkpoints)
            blocks[f"{name}, background"] = background(trial, checkpoints)
        seconds: dict[str, list[float]] = {name: [] for name in blocks}
        stood: dict[str, list[float]] = {name: [] for name in blocks}
        for _ in range(ROUNDS * options.seeds):
            for name, block in blocks.items():
                began = time.perf_counter()
                stood[name].append(block(count))
                seconds[name].append(time.perf_counter() - began)
        size = sum(
            tensor.nbytes for tensor in trial.training.state(trial.training.random_state()).tensors.values()
        )
    parameters = sum(parameter.numel() for parameter in student.parameters())
    notes = [
        f"Llama of {parameters / 1e6:.1f} million parameters, a state of {size / 2**20:.0f} MiB, steps of "
        f"{ROWS} x {LENGTH} tokens; S3: SeaweedFS on a core of its own, as on another machine; training "
        "and storing share the rest",
        f"{ROUNDS * options.seeds} rounds of blocks of {count} steps in turn; lost: a block with a snapshot "
        "less that of its round without; stood: until the loop went on; medians, smallest and largest",
    ]
    share = f"share at one in {INTERVAL:.0f} s"
    header = ["snapshot", "seconds a block", "seconds stood", "seconds lost", share, "under 1 %"]
    return report("checkpoints: what a snapshot costs a training", header, rows(seconds, stood), notes)


def rows(seconds: dict[str, list[float]], stood: dict[str, list[float]]) -> list[list[str]]:
    """A row a kind of block."""
    found = []
    for name, own in seconds.items():
        lost = [mine - base for mine, base in zip(own, seconds[NONE], strict=True)]
        share = median(lost) / INTERVAL
        figures = ["", "", "", ""]
        if name != NONE:
            met = "met" if share < TARGET else "missed"
            figures = [spread(stood[name], 2), spread(lost, 2), f"{share:.2%}", met]
        found.append([name, spread(own, 2), *figures])
    return found


@contextmanager
def stores() -> Iterator[dict[str, str]]:
    """A folder, and a real S3 server whose work takes nothing from the training."""
    before, threads, cores = dict(os.environ), torch.get_num_threads(), os.sched_getaffinity(0)
    own = set(sorted(cores)[:-1]) or cores
    try:
        # What is started now stays there.
        os.sched_setaffinity(0, cores - own or cores)
        with tempfile.TemporaryDirectory() as root, S3Server(Path(root)) as server:
            os.sched_setaffinity(0, own)
            torch.set_num_threads(len(own))
            os.environ.update(server.environment)
            yield {"folder": f"{root}/snapshots", "S3": f"s3://{server.bucket}/snapshots"}
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)
        os.environ.clear()
        os.environ.update(before)
