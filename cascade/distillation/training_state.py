"""Everything a stopped run needs to go on as if it had never stopped, as named tensors and plain JSON."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from cascade.distillation.states import device_of
from cascade.storage.checkpoints import TrainingCheckpoints


@dataclass(frozen=True)
class StepRecord:
    """One optimiser step.

    loss, kl, ce: nats per target, over the same targets; cross_entropy_weight: the share of ce in the loss.
    grad_norm: before clipping. seconds: since the run began, pauses left out; waited: of this step for data.
    memory: the largest so far in bytes, of the device where that is a GPU, else of the process.
    own_targets: tokens that were to be predicted and that the student had written itself.
    """

    step: int
    tokens: int
    loss: float
    kl: float
    ce: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    seconds: float
    # Older snapshots know nothing of these.
    cross_entropy_weight: float = 0.0
    waited: float = 0.0
    memory: int = 0
    own_targets: int = 0


@dataclass
class Progress:
    """What has been trained so far. plan: the record of `Plan` and the corpus it belongs to."""

    plan: dict[str, Any]
    steps: list[StepRecord] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Seconds of training behind us."""
        return self.steps[-1].seconds if self.steps else 0.0

    @property
    def tokens(self) -> int:
        """Tokens trained."""
        return self.steps[-1].tokens if self.steps else 0


@dataclass
class Training:
    """A student that is being taught: what is trained, its optimiser, and how far it has come."""

    student: PreTrainedModel
    optimizer: Optimizer
    progress: Progress

    @property
    def step(self) -> int:
        """Steps that are finished."""
        return len(self.progress.steps)

    @property
    def device(self) -> torch.device:
        """Where it is trained."""
        return device_of(self.student)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All that is trained."""
        for name, parameter in self.student.named_parameters():
            if parameter.requires_grad:
                yield name, parameter

    def random_state(self) -> dict[str, Tensor]:
        """The states of the generators that a forward pass may draw from."""
        states = {"random.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["random.cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def save(self, checkpoints: TrainingCheckpoints, random: dict[str, Tensor]) -> None:
        """Store weights, optimiser, random state and position as of the last finished step.

        Before the first step there is nothing worth storing, nor an optimiser state.
        """
        if not self.progress.steps:
            return
        tensors = dict(random)
        for name, parameter in self.named_parameters():
            tensors[f"weight.{name}"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        record = {"plan": self.progress.plan, "steps": [asdict(step) for step in self.progress.steps]}
        checkpoints.save(self.step, tensors, record)

    def restore(self, checkpoints: TrainingCheckpoints) -> bool:
        """Load the newest state into student, optimiser, generators and progress.

        False when there is none, or when it belongs to other settings or data (a derived default may
        have changed since): then nothing is touched.
        """
        with tempfile.TemporaryDirectory(prefix="cascade-resume-") as folder:
            found = checkpoints.latest(Path(folder))
            if found is None or found[0]["plan"] != self.progress.plan:
                return False
            record, tensors = found
            steps = [StepRecord(**step) for step in record["steps"]]
            with torch.no_grad():
                for name, parameter in self.named_parameters():
                    parameter.copy_(tensors[f"weight.{name}"])
                    self.optimizer.state[parameter] = {
                        key: tensors[f"optimizer.{key}.{name}"].clone().to(parameter.device)
                        for key in ("step", "exp_avg", "exp_avg_sq")
                    }
            torch.set_rng_state(tensors["random.cpu"].clone())
            if self.device.type == "cuda" and "random.cuda" in tensors:
                torch.cuda.set_rng_state(tensors["random.cuda"].clone(), self.device)
        self.progress.steps = steps
        return True


class Keeper:
    """Stores a training's states, at intervals of so many seconds and when it has to stop.

    A state is stored at an interval only once the next step has shown that its loss is healthy: what a later
    step finds broken was never kept as good. Where a run is asked to stop there is no next step.
    """

    def __init__(self, training: Training, checkpoints: TrainingCheckpoints | None, seconds: float) -> None:
        self.training, self.checkpoints, self.seconds = training, checkpoints, seconds
        self._saved, self._step = time.monotonic(), training.step

    def save_when_due(self, random: dict[str, Tensor]) -> None:
        """random: from before anything was drawn for the step that is not finished."""
        if time.monotonic() - self._saved >= self.seconds:
            self.save(random)

    def save(self, random: dict[str, Tensor]) -> None:
        """Unless the state is stored already."""
        if self.checkpoints and self.training.step > self._step:
            self.training.save(self.checkpoints, random)
            self._saved, self._step = time.monotonic(), self.training.step
