"""What a node shows in Prefect while it runs: log lines, and a progress artifact where it takes long."""

from __future__ import annotations

import time
from typing import cast
from uuid import UUID

from prefect import runtime
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey
from prefect.logging import get_run_logger

from cascade.console import Pace, figures_text, seconds_text
from cascade.family.job import Job
from cascade.kinds import PARENT_STAGE, SHARED
from flows.events import stage_started
from flows.publish import NotShown, not_shown, prefect_key, terminal

# A forwarded progress line in this many seconds keeps the run's log readable.
LOG_SECONDS = 10.0
# From the node's begin until its artifact, too: what is over by then needs none.
ARTIFACT_SECONDS = 3.0
# A server that is gone may take long to fail, and a node that cannot report has to wait.
AFTER_FAILURE_SECONDS = 60.0


class RunReport:
    """Forwards a node's events to the run's log and to a progress artifact, throttled."""

    def __init__(self, job: Job) -> None:
        self.job, self.key = job, prefect_key(job.family, job.stage, job.kind)
        self.logger, self.terminal = get_run_logger(), terminal()
        self.pace = Pace()
        self.artifact: UUID | None = None
        # The server may have one before it has answered so: a cancel comes at any time.
        self.shown = False
        self.percent = 0.0
        self.begun = self.warned = False
        self.next_log = time.monotonic()
        self.next_update = self.next_log + ARTIFACT_SECONDS
        if self.terminal:
            self.terminal.start(job.name)

    def log(self, message: str) -> None:
        """One line of the node, never throttled."""
        self._begin()
        self.note(message)

    def note(self, message: str) -> None:
        """One line about the node."""
        self.logger.info(message)
        if self.terminal:
            self.terminal.log(message)

    def progress(self, done: int, total: int, unit: str, **figures: float) -> None:
        """Percent and figures in the artifact, a line in the log, both at most once in some seconds."""
        self._begin()
        now = time.monotonic()
        left = self.pace.left(done, total, now)
        if now >= self.next_log:
            self.next_log = now + LOG_SECONDS
            self.logger.info(f"{done:,}/{total:,} {unit} {figures_text(figures)}".rstrip() + left_text(left))
        if now >= self.next_update:
            self.next_update = now + ARTIFACT_SECONDS
            text = f"{done:,} of {total:,} {unit}, {figures_text(figures)}".rstrip(", ") + left_text(left)
            self._show(100.0 * done / total, text)
        if self.terminal:
            self.terminal.progress(done, total, unit, **figures)

    def finish(self) -> None:
        """The node is done: so is its progress, if it ever showed any."""
        if self.artifact:
            self._show(100.0, "done")

    def stop(self) -> None:
        """The node failed: what is shown promises no time left. Another attempt goes on in the same place."""
        if self.shown:
            self._show(self.percent, f"stopped at {self.percent:.0f} %")

    def _begin(self) -> None:
        """At the first sign of life: a node that is reused gives none."""
        if not self.begun:
            self.begun = True
            job = self.job
            if job.kind not in SHARED and job.stage != PARENT_STAGE:
                stage = {"name": job.stage, "node": job.name}
                stage_started(job.family, stage, job.options.store, job.options.run)

    def _show(self, percent: float, text: str) -> None:
        self.shown, self.percent, described = True, percent, f"`{self.job.name}`: {text}"
        try:
            # Of an earlier attempt: a second artifact would stand beside it for ever.
            self.artifact = self.artifact or shown_here(self.key)
            if self.artifact is None:
                created = create_progress_artifact(percent, key=self.key, description=described)
                # Only in a coroutine it is an awaitable.
                self.artifact = cast(UUID, created)
            else:
                update_progress_artifact(self.artifact, percent, description=described)
        except NotShown as error:
            self.next_update = time.monotonic() + AFTER_FAILURE_SECONDS
            if not self.warned:
                self.warned = True
                self.logger.warning(not_shown(error))


def shown_here(key: str) -> UUID | None:
    """The artifact with this key in this flow run, from whichever process."""
    chosen = ArtifactFilter(
        key=ArtifactFilterKey(any_=[key]),
        flow_run_id=ArtifactFilterFlowRunId(any_=[UUID(str(runtime.flow_run.id))]),
    )
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=chosen, limit=1)
    return found[0].id if found else None


def left_text(seconds: float | None) -> str:
    """`, about 3 min left`; nothing while nobody knows."""
    return "" if seconds is None else f", about {seconds_text(seconds)} left"
