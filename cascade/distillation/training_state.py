"""Everything a stopped run needs to go on as if it had never stopped, as named tensors and plain JSON."""

from __future__ import annotations

import tempfile
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
    hidden_states: unweighted, of a training that has this term.
    own_targets: tokens that were to be predicted and that the student had written itself.
    watched_ce: of the watched corpus after the step, nats per target, where it was measured.
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
    hidden_states: float = 0.0
    watched_ce: float | None = None


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


@dataclass(frozen=True)
class State:
    """What `Training.restore` reads again."""

    plan: dict[str, Any]
    steps: list[StepRecord]
    tensors: dict[str, Tensor]
    watch: dict[str, Any] | None = None

    @property
    def step(self) -> int:
        """Steps that are finished."""
        return len(self.steps)

    def save(self, checkpoints: TrainingCheckpoints) -> None:
        """Store it; before the first step there is nothing worth storing, nor an optimiser state."""
        if not self.steps:
            return
        record: dict[str, Any] = {"plan": self.plan, "steps": [asdict(step) for step in self.steps]}
        if self.watch:
            record["watch"] = self.watch
        checkpoints.save(self.step, self.tensors, record)


@dataclass
class Training:
    """A student that is being taught: what is trained, its optimiser, and how far it has come.

    projections: of the hidden-state loss, trained along. watch: the record of the watch, if there is one.
    best: the weights of its best measurement so far, on the CPU; empty before the first.
    """

    student: PreTrainedModel
    optimizer: Optimizer
    progress: Progress
    projections: tuple[nn.Parameter, ...] = ()
    watch: dict[str, Any] | None = None
    best: dict[str, Tensor] = field(default_factory=dict)

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
        for place, projection in enumerate(self.projections):
            # Older snapshots have one without a number.
            yield f"hidden_states.projection{f'.{place}' if place else ''}", projection

    def keep_best(self) -> None:
        """Keep the weights as they are."""
        self.best = {
            name: parameter.detach().to("cpu", copy=True) for name, parameter in self.named_parameters()
        }

    @torch.no_grad()
    def return_to_best(self) -> None:
        """Give the student the weights that were kept, if any were."""
        for name, parameter in self.named_parameters() if self.best else ():
            parameter.copy_(self.best[name])

    def random_state(self) -> dict[str, Tensor]:
        """The states of the generators that a forward pass may draw from."""
        states = {"random.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["random.cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def state(self, random: dict[str, Tensor]) -> State:
        """A copy of weights, optimiser, random state and position as of the last step, on the CPU."""
        tensors = dict(random)
        for name, parameter in self.named_parameters():
            tensors[f"weight.{name}"] = parameter.detach().to("cpu", copy=True)
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value.to("cpu", copy=True)
        # Never changed in place.
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        return State(self.progress.plan, list(self.progress.steps), tensors, self.watch)

    def restore(self, checkpoints: TrainingCheckpoints) -> bool:
        """Load the newest state into student, optimiser, generators and progress.

        False when there is none, or when it belongs to other settings or data (a derived default may
        have changed since): then nothing is touched. What was not watched so far, such as a leg of a race,
        may go on watched.
        """
        with tempfile.TemporaryDirectory(prefix="cascade-resume-") as folder:
            found = checkpoints.latest(Path(folder))
            if found is None or found[0]["plan"] != self.progress.plan:
                return False
            record, tensors = found
            if record.get("watch") not in (None, self.watch):
                return False
            steps = [StepRecord(**step) for step in record["steps"]]
            with torch.no_grad():
                for name, parameter in self.named_parameters():
                    parameter.copy_(tensors[f"weight.{name}"])
                    self.optimizer.state[parameter] = {
                        key: tensors[f"optimizer.{key}.{name}"].clone().to(parameter.device)
                        for key in ("step", "exp_avg", "exp_avg_sq")
                    }
            kept = {name.removeprefix("best."): name for name in tensors if name.startswith("best.")}
            self.best = {name: tensors[stored].clone() for name, stored in kept.items()}
            torch.set_rng_state(tensors["random.cpu"].clone())
            if self.device.type == "cuda" and "random.cuda" in tensors:
                torch.cuda.set_rng_state(tensors["random.cuda"].clone(), self.device)
        self.progress.steps = steps
        return True
