"""What a build shows in Prefect: log lines, progress, a table a stage, the family card."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast
from uuid import UUID

import httpx
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.exceptions import PrefectException
from prefect.logging import get_run_logger

from cascade.console import (
    EXTENDED_COLUMNS,
    FAMILY_COLUMNS,
    ConsoleReport,
    extended_rows,
    family_rows,
    figures_text,
    race_columns,
    race_rows,
)
from cascade.family.job import Job

# A forwarded progress line in this many seconds keeps the run's log readable.
LOG_SECONDS = 10.0
ARTIFACT_SECONDS = 3.0
# A server that is gone may take long to fail, and a node that cannot report has to wait.
AFTER_FAILURE_SECONDS = 60.0

_listener: ContextVar[ConsoleReport | None] = ContextVar("listener", default=None)


@contextmanager
def listener(report: ConsoleReport) -> Iterator[None]:
    """Show on a terminal, too, what the flow reports within this block."""
    token = _listener.set(report)
    try:
        yield
    finally:
        _listener.reset(token)


# What Prefect's client raises. To show something is never worth a training.
NotShown = (httpx.HTTPError, PrefectException)


def not_shown(error: Exception) -> str:
    """The warning in place of what could not be shown."""
    return f"Prefect cannot show this, the work goes on: {type(error).__name__}: {error}"


class RunReport:
    """Forwards a node's events to the run's log and to a progress artifact, throttled."""

    def __init__(self, job: Job) -> None:
        self.name = job.name
        self.key = prefect_key(job.family, job.stage, job.kind)
        self.logger = get_run_logger()
        self.terminal = _listener.get()
        self.artifact: UUID | None = None
        self.warned = False
        self.next_log = self.next_update = time.monotonic()
        if self.terminal:
            self.terminal.start(job.name)

    def log(self, message: str) -> None:
        """One line, never throttled."""
        self.logger.info(message)
        if self.terminal:
            self.terminal.log(message)

    def progress(self, done: int, total: int, unit: str, **figures: float) -> None:
        """Percent in the artifact, a line in the log, both at most once in some seconds."""
        now = time.monotonic()
        if now >= self.next_log:
            self.next_log = now + LOG_SECONDS
            self.logger.info(f"{done:,}/{total:,} {unit} {figures_text(figures)}".rstrip())
        if now >= self.next_update:
            self.next_update = now + ARTIFACT_SECONDS
            self._update(100.0 * done / total)
        if self.terminal:
            self.terminal.progress(done, total, unit, **figures)

    def finish(self) -> None:
        """The node is done: so is its progress, if it ever showed any."""
        if self.artifact:
            self._update(100.0)

    def _update(self, percent: float) -> None:
        try:
            if self.artifact is None:
                created = create_progress_artifact(percent, key=self.key, description=f"`{self.name}`")
                # Only in a coroutine it is an awaitable.
                self.artifact = cast(UUID, created)
            else:
                update_progress_artifact(self.artifact, percent)
        except NotShown as error:
            self.next_update = time.monotonic() + AFTER_FAILURE_SECONDS
            if not self.warned:
                self.warned = True
                self.logger.warning(not_shown(error))


def prefect_key(*parts: str) -> str:
    """Prefect's artifact keys hold lowercase letters, digits and dashes, and so do our names."""
    return "-".join(parts)


def publish_index(index: dict[str, Any]) -> None:
    """Publish the newest stage as a table, and the family so far as its card."""
    try:
        if index["stages"]:
            stage = index["stages"][-1]
            create_table_artifact(
                [{"figure": name, "value": str(value)} for name, value in stage.items() if name != "race"],
                key=prefect_key(index["family"], stage["name"]),
                description=f"stage `{stage['name']}` of family `{index['family']}`",
            )
            if stage.get("race"):
                create_markdown_artifact(
                    markdown_table(race_columns(stage), race_rows(stage)),
                    key=prefect_key(index["family"], stage["name"], "race"),
                    description=f"race of stage `{stage['name']}`",
                )
        create_markdown_artifact(
            family_card(index), key=prefect_key(index["family"], "family"), description="family card"
        )
    except NotShown as error:
        get_run_logger().warning(not_shown(error))


def family_card(index: dict[str, Any]) -> str:
    """The family as Markdown. S3 URIs stand as code: the UI strips links to them."""
    lines = [f"# Family {index['family']}", "", markdown_table(FAMILY_COLUMNS, family_rows(index))]
    lines += ["", "Cross-entropy (CE) and KL are held-out, in nats a token.", "", "## Checkpoints", ""]
    children = [*index["stages"], *index.get("extended", [])]
    lines += [f"- {child['name']}: `{child['checkpoint']}`" for child in children]
    if index.get("extended"):
        lines += ["", "## Long contexts", "", markdown_table(EXTENDED_COLUMNS, extended_rows(index))]
    return "\n".join(lines) + "\n"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join([row(columns), row(["---"] * len(columns)), *(row(cells) for cells in rows)])


def row(cells: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"
