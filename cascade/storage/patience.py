"""Waiting out a store that fails: a request is made again, later and later, until it succeeds or a bound is
reached.

This is the one place where requests to a store wait and are repeated; botocore and s3fs make one attempt
each, so that waits do not multiply and every one of them is told. (Below them aiohttp sends a request whose
connection broke again at once, and once, as RFC 9112 9.3.1 allows for those that are idempotent.) A single
request is repeated, not the call that it belongs to: a page of a listing, a part of an upload, a range of a
file. So a long transfer goes on where it was.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import aiohttp
from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.exceptions import (
    HTTPClientError,
    IncompleteReadError,
)
from botocore.parsers import ResponseParserError

from cascade.errors import InputError
from cascade.report import Report
from cascade.storage.faults import KeepsFailing, client_error, endpoint, full, reason, s3_code, s3_status

LOG = logging.getLogger("cascade.storage")

SETTING = "CASCADE_STORE_PATIENCE"
# Longer than an outage of ten minutes.
DEFAULT_SECONDS = 900.0
FIRST_WAIT = 0.25
# Waits grow up to this share of the whole: 30 s of 900 s.
LONGEST_SHARE = 1 / 30
# At most one line in this time, and none about an answer that came sooner.
QUIET_SECONDS = 1.0

# Answers with a status below 500 that another attempt may not get: the request was cut short or damaged on
# its way, or another one for the same object was being served.
PASSING_CODES = (
    "BadDigest",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "OperationAborted",
    "RequestTimeout",
    "SlowDown",
    "XAmzContentSHA256Mismatch",
)
PASSING_STATUS = (408, 429)
# Not implemented.
LASTING_STATUS = (501,)
PASSING_ERRORS = (
    aiohttp.ClientError,
    BotoConnectionError,
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
    ResponseParserError,
    TimeoutError,
)

# What `at_most` allows; it travels with a call into the thread that serves it.
_allowed: ContextVar[float] = ContextVar("allowed", default=float("inf"))

# Not the global generator: a training that draws from it must not notice that its store failed.
_jitter = random.SystemRandom()

Result = TypeVar("Result")


class ShortAnswer(ConnectionError):
    """An answer that says it is complete, and is not."""


def patience() -> float:
    """Seconds for which a request is repeated: CASCADE_STORE_PATIENCE, or 900. InputError for no number."""
    text = os.environ.get(SETTING, "")
    try:
        seconds = float(text or DEFAULT_SECONDS)
        if 0 <= seconds < float("inf"):
            return seconds
    except ValueError:
        pass
    raise InputError(
        f"{SETTING} is not a number of seconds", value=text, where="environment", remedy="write, say, 900"
    )


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Within this block requests are repeated for so long at most: for what matters now or not at all."""
    token = _allowed.set(seconds)
    try:
        yield
    finally:
        _allowed.reset(token)


async def patiently(attempt: Callable[[], Awaitable[Result]], what: str, seconds: float) -> Result:
    """What `attempt` returns; it is made again after each fault that may pass, for so many seconds in all.

    The n-th wait lies between half and all of 0.25 s * 2^n, at most a thirtieth of `seconds`: many clients of
    one store do not come back together. what: for the log, without anything secret.
    Raises KeepsFailing from the last fault; other errors as they are.
    """
    seconds = min(seconds, _allowed.get())
    deadline, wait, failed_at = time.monotonic() + seconds, FIRST_WAIT, 0.0
    while True:
        try:
            result = await attempt()
        except Exception as error:
            if not may_pass(error):
                raise
            now = time.monotonic()
            left, longest = deadline - now, seconds * LONGEST_SHARE
            if left <= 0:
                raise KeepsFailing(seconds) from error
            pause = min(_jitter.uniform(0.5, 1) * min(wait, longest), left)
            wait, failed_at = min(2 * wait, longest), failed_at or now
            _told.waits(f"{what} failed: {reason(error)}", pause, left)
        else:
            if failed_at:
                _told.answers(time.monotonic() - failed_at)
            return result
        await asyncio.sleep(pause)


def may_pass(error: BaseException) -> bool:
    """Whether the network or the service failed as they do for a while, rather than refused for good."""
    if full(error, ""):
        return False
    if client_error(error) is None:
        return isinstance(error, PASSING_ERRORS)
    status, code = s3_status(error), s3_code(error)
    return (
        (status >= 500 and status not in LASTING_STATUS) or status in PASSING_STATUS or code in PASSING_CODES
    )


class _Told:
    """One line a wait, though many requests wait at once; and one when the store answers again."""

    def __init__(self) -> None:
        self._until, self._failing = 0.0, False

    def waits(self, what: str, pause: float, left: float) -> None:
        """A request waits."""
        now, self._failing = time.monotonic(), True
        if now >= self._until:
            self._until = now + max(pause, QUIET_SECONDS)
            LOG.warning("%s: %s; again in %.1f s, for up to %.0f s", endpoint(), what, pause, left)

    def answers(self, waited: float) -> None:
        """A request that failed so long ago has been answered."""
        if self._failing and waited >= QUIET_SECONDS:
            self._failing = False
            LOG.warning("%s answers again after %.1f s", endpoint(), waited)


_told = _Told()


@contextmanager
def waits_told(report: Report) -> Iterator[None]:
    """Send the lines about waiting to a report instead, within this block."""
    handler, LOG.propagate = _Forward(report), False
    LOG.addHandler(handler)
    try:
        yield
    finally:
        LOG.removeHandler(handler)
        LOG.propagate = True


class _Forward(logging.Handler):
    def __init__(self, report: Report) -> None:
        super().__init__(logging.WARNING)
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        """Pass the line on."""
        self._report.log(record.getMessage())
