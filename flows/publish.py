"""What a build shows in Prefect: its log lines, the cards of its stages and of the family."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast
from uuid import UUID

import httpx
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.exceptions import PrefectException
from prefect.logging import get_run_logger
from prefect.settings import PREFECT_CLOUD_UI_URL, PREFECT_UI_URL

from cascade.cards.card import CARD, Card
from cascade.cards.links import Links
from cascade.console import ConsoleReport
from cascade.errors import CascadeError
from cascade.storage.locations import open_location
from cascade.storage.patience import waits_told
from flows.events import stage_completed, stage_reused

# Of the family's card; a stage's has the stage's name here.
FAMILY = "family"

# Prefect's loggers that tell how a run or its process ended.
ENDINGS = ("prefect.flow_runs", "prefect.task_runs", "prefect.engine")

# By build and key: a card that grows stays one artifact.
_shown: dict[tuple[str, str], UUID] = {}
_listener: ContextVar[ConsoleReport | None] = ContextVar("listener", default=None)


@contextmanager
def listener(report: ConsoleReport) -> Iterator[None]:
    """Show on a terminal, too, what the flow reports within this block."""
    token = _listener.set(report)
    try:
        yield
    finally:
        _listener.reset(token)


def terminal() -> ConsoleReport | None:
    """The one that listens, if one does."""
    return _listener.get()


@contextmanager
def waits_shown() -> Iterator[None]:
    """Say in the flow run's log, and on the terminal, when the flow itself waits for the store."""
    with waits_told(FlowReport()):
        yield


class NoTraceback(logging.Filter):
    """Errors of ours say what, which value, where and the way out; where they were raised helps nobody."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Every record stays."""
        if record.exc_info and isinstance(record.exc_info[1], CascadeError):
            record.exc_info = None
        return True


for name in ENDINGS:
    logging.getLogger(name).addFilter(NoTraceback())


class FlowReport:
    """Lines of the flow, from whichever thread."""

    def __init__(self) -> None:
        self.logger, self.terminal = get_run_logger(), terminal()

    def log(self, message: str) -> None:
        """One line, never throttled."""
        self.logger.warning(message)
        if self.terminal:
            self.terminal.log(message)

    def progress(self, done: int, total: int, unit: str, **figures: float) -> None:
        """A flow has none of its own."""


# What Prefect's client raises. To show something is never worth a training.
NotShown = (httpx.HTTPError, PrefectException)


def not_shown(error: Exception) -> str:
    """The warning in place of what could not be shown."""
    return f"Prefect cannot show this, the work goes on: {type(error).__name__}: {error}"


def prefect_key(*parts: str) -> str:
    """Prefect's artifact keys hold lowercase letters, digits and dashes; so do our names, but for kinds."""
    return "-".join(parts).replace("_", "-")


def publish_card(card: Card, store: str, run: str) -> None:
    """Show a card, and tell automations that its stage is there."""
    what = f"stage `{card.stage}` of family `{card.family}`" if card.stage else f"family `{card.family}`"
    key = prefect_key(card.family, card.stage or FAMILY)
    try:
        if shown := _shown.get((run, key)):
            with get_client(sync_client=True) as client:
                client.update_artifact(shown, ArtifactUpdate(data=card.inline))
        else:
            created = create_markdown_artifact(card.inline, key=key, description=what)
            # Only in a coroutine it is an awaitable.
            _shown[run, key] = cast(UUID, created)
    except NotShown as error:
        get_run_logger().warning(not_shown(error))
    if card.row:
        tell = stage_reused if card.row["reused"] else stage_completed
        tell(card.family, card.row, store, run)


def log_ending(index: dict[str, Any], store: str) -> None:
    """The run's last lines: where the family and its card are, and how to make it again."""
    logger, links = get_run_logger(), Links(open_location(store).uri)
    family, place = index["family"], links.family(index["family"])
    logger.info(f"the family is at {place}; show it with: cascade show {shlex.quote(place)}")
    page = page_of(index["run"], prefect_key(family, FAMILY))
    logger.info(f"its card: {f'{page} and ' if page else ''}{place}/{CARD}")
    logger.info(f"make it again, or go on with it: {links.build(family)}")


def page_of(run: str, key: str) -> str:
    """Where the UI shows an artifact of this build; empty where nobody knows of a UI.

    Artifacts have no entry in its sidebar. Of a server of one's own it is the newer UI's page: the older one
    shows mermaid as text.
    """
    root, shown = PREFECT_UI_URL.value(), _shown.get((run, key))
    if not root or not shown:
        return ""
    newer = "" if root.startswith(str(PREFECT_CLOUD_UI_URL.value())) else "/v2"
    return f"{root}{newer}/artifacts/artifact/{shown}"
