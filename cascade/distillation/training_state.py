"""Everything a stopped run needs to go on as if it had never stopped, as named tensors and plain JSON."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from cascade.distillation.states import device_of
from cascade.storage.checkpoints import TrainingCheckpoints


@dataclass(frozen=True)
class StepRecord:
    """One optimiser step. loss, kl, ce: nats per target; seconds: since the run began, pauses left out."""

    step: int
    tokens: int
    loss: float
    kl: float
    ce: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    seconds: float


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


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of the generators that a forward pass may draw from."""
    states = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["random.cuda"] = torch.cuda.get_rng_state(device)
    return states


def save(
    checkpoints: TrainingCheckpoints,
    student: PreTrainedModel,
    optimizer: Optimizer,
    random: dict[str, Tensor],
    progress: Progress,
) -> None:
    """Store weights, optimiser, random state and position as of the last finished step.

    Before the first step there is nothing worth storing, nor an optimiser state.
    """
    if not progress.steps:
        return
    tensors = dict(random)
    for name, parameter in student.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = value
    record = {"plan": progress.plan, "steps": [asdict(step) for step in progress.steps]}
    checkpoints.save(len(progress.steps), tensors, record)


def restore(
    checkpoints: TrainingCheckpoints, student: PreTrainedModel, optimizer: Optimizer, plan: dict[str, Any]
) -> Progress | None:
    """Load the newest state into student, optimiser and generators.

    None when there is none, or when it belongs to other settings or data (a derived default may
    have changed since): then nothing is touched.
    """
    with tempfile.TemporaryDirectory(prefix="cascade-resume-") as folder:
        found = checkpoints.latest(Path(folder))
        if found is None or found[0]["plan"] != plan:
            return None
        record, tensors = found
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                parameter.copy_(tensors[f"weight.{name}"])
                optimizer.state[parameter] = {
                    key: tensors[f"optimizer.{key}.{name}"].clone().to(parameter.device)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
        torch.set_rng_state(tensors["random.cpu"].clone())
        device = device_of(student)
        if device.type == "cuda" and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"].clone(), device)
    return Progress(plan, [StepRecord(**step) for step in record["steps"]])
