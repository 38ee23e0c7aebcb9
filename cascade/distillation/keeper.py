"""Snapshots of a training while it goes on: the loop copies the state, a thread stores it."""

from __future__ import annotations

import threading
from time import monotonic
from types import TracebackType

from torch import Tensor

from cascade.distillation.training_state import State, Training
from cascade.errors import CascadeError
from cascade.report import SILENT, Report
from cascade.storage.checkpoints import TrainingCheckpoints


class Keeper:
    """Stores a training's states, at intervals of so many seconds and when it has to stop.

    At an interval the loop only waits until the state is copied to the CPU's memory, which has to hold it
    once more; while one state is being stored, none is copied. A state is taken only once the next step
    has shown that its loss is healthy: what a later step finds broken was never kept as good. Where a run is
    asked to stop there is no next step.

    A store that fails is reported and costs no training: the next interval tries again. What a retry cannot
    heal (a full disk, a refusal) is raised by the next step. Leaving the block waits for the last state.
    """

    def __init__(
        self,
        training: Training,
        checkpoints: TrainingCheckpoints | None,
        seconds: float,
        report: Report = SILENT,
    ) -> None:
        self.training, self.checkpoints, self.seconds, self.report = training, checkpoints, seconds, report
        self._taken, self._stored = monotonic(), training.step
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def __enter__(self) -> Keeper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._wait()

    def save_when_due(self, random: dict[str, Tensor]) -> None:
        """random: from before anything was drawn for the step that is not finished."""
        # First whether it runs: one that fails in between would be followed by another.
        busy = self._thread and self._thread.is_alive()
        if self._failure:
            raise self._failure
        due = monotonic() - self._taken >= self.seconds
        if self.checkpoints and due and not busy and self.training.step > self._stored:
            self._taken = monotonic()
            arguments = (self.checkpoints, self.training.state(random))
            self._thread = threading.Thread(target=self._store, args=arguments, name="snapshot")
            self._thread.start()

    def save_at_end(self, random: dict[str, Tensor]) -> None:
        """The last state, if it is due; there is nothing left that waiting would stall."""
        self._wait()
        self.save_when_due(random)

    def save(self, random: dict[str, Tensor]) -> None:
        """Now, unless the state is stored already: the run has to stop. Raises as `TrainingCheckpoints`."""
        self._wait()
        if self.checkpoints and self.training.step > self._stored:
            state = self.training.state(random)
            state.save(self.checkpoints)
            self._stored = state.step

    def _wait(self) -> None:
        if self._thread:
            self._thread.join()

    def _store(self, checkpoints: TrainingCheckpoints, state: State) -> None:
        """In the thread."""
        try:
            state.save(checkpoints)
            self._stored = state.step
        except Exception as error:
            if not (isinstance(error, CascadeError) and error.retryable):
                self._failure = error
            self.report.log(f"warning: the snapshot after step {state.step} could not be stored: {error}")
