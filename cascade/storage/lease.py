"""A lease on a place in a store: of several builders one works there, and a dead one is followed by the next.

All that the store must offer is a creation that it refuses when the name is taken. Leases are numbered files;
the highest number holds, and whoever takes over creates the next one, which only one of them can. Clocks of
different machines are never compared: a holder is dead when its file has not changed for a while that the
observer measured itself, or at once when it was a process of this machine that is gone.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from cascade.errors import CascadeError, StorageFault
from cascade.report import SILENT, Report
from cascade.storage.locations import Location
from cascade.storage.patience import at_most

BEAT_SECONDS = 10.0
# Six beats missed: a busy store or machine loses one or two.
DEAD_SECONDS = 60.0
POLL_SECONDS = 0.2
MOST_POLL_SECONDS = 5.0
PREFIX = "lease-"


@dataclass
class Lease:
    """Held inside `with`; entering waits while somebody else holds it.

    on_lost: called in another thread once somebody has taken over, as happens to a machine that slept.
    Raises StorageFault and InputError as `Location`.
    """

    location: Location
    report: Report = SILENT
    on_lost: Callable[[], None] = lambda: None
    _holder: str = field(default_factory=lambda: uuid.uuid4().hex)
    _number: int = 0
    _beats: int = 0
    _over: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Lease:
        while not self._created(self._free_number()):
            pass
        self._drop_older()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let others go on at once. Not deleted: a number that is free again could be held twice."""
        if not self._over.is_set():
            self._stop_beating()
            with suppress(CascadeError, FileNotFoundError), at_most(BEAT_SECONDS):
                self._write(free=True)

    def finish(self) -> None:
        """Remove the place with all that is in it: the work is done, its result is there, and whoever holds
        the lease next has to look for that first.

        What cannot be removed now, because somebody who waited has come in already, stays.
        """
        self._stop_beating()
        with suppress(CascadeError):
            self.location.delete_tree()

    def confirm(self) -> None:
        """Raise StorageFault when somebody else has taken over."""
        if max(self._numbers(), default=0) > self._number:
            raise StorageFault(
                "another builder has taken this work over",
                value=self.location.name,
                where=self.location.uri,
                remedy="run it again: it goes on from what is there, or uses what the other has made",
            )

    def _stop_beating(self) -> None:
        self._over.set()
        if self._thread:
            self._thread.join()

    def _free_number(self) -> int:
        """The number after the last holder's, once there is none or it is done or dead."""
        seen, since, looked, pause, told = None, 0.0, 0.0, POLL_SECONDS, False
        while True:
            number = max(self._numbers(), default=0)
            content = self._read(number) if number else None
            if content is None or content.get("free") or is_dead(content.get("process", "")):
                return number + 1
            now = time.monotonic()
            # While the store failed us, it may have failed the holder too.
            if content != seen or now - looked > BEAT_SECONDS:
                seen, since = content, now
            looked = now
            if now - since > DEAD_SECONDS:
                self.report.log(f"the builder that worked on this is gone: {content.get('machine')}")
                return number + 1
            if not told:
                self.report.log(f"another builder works on this: waiting for {content.get('machine')}")
                told = True
            time.sleep(pause)
            pause = min(2 * pause, MOST_POLL_SECONDS)

    def _created(self, number: int) -> bool:
        """Whether the lease of this number is ours: nobody was faster, and nobody is ahead already."""
        self._number = number
        try:
            self._write(create=True)
        except FileNotFoundError:
            # The last holder is removing the place.
            return False
        except FileExistsError:
            # A repeated request is refused although its first try was ours.
            if self._read(number) != self._content():
                return False
        if max(self._numbers(), default=0) > number:
            self._file(number).delete_tree()
            return False
        return True

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            # A store that fails for a while is noticed by the work itself.
            with suppress(CascadeError, FileNotFoundError), at_most(BEAT_SECONDS):
                if max(self._numbers(), default=0) > self._number:
                    self.on_lost()
                    return
                self._write()

    def _drop_older(self) -> None:
        for number in self._numbers():
            if number < self._number:
                self._file(number).delete_tree()

    def _numbers(self) -> list[int]:
        names = (name.removeprefix(PREFIX) for name in self.location.children() if name.startswith(PREFIX))
        return [int(name) for name in names if name.isdecimal()]

    def _file(self, number: int) -> Location:
        return self.location / f"{PREFIX}{number:04d}"

    def _read(self, number: int) -> dict[str, Any] | None:
        """None when it is not there (any more); empty when another version wrote it."""
        try:
            found = json.loads(self._file(number).read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _content(self, free: bool = False) -> dict[str, Any]:
        return {
            "holder": self._holder,
            "machine": f"{os.uname().nodename}, process {os.getpid()}",
            "process": this_process(),
            "beats": self._beats,
            "free": free,
        }

    def _write(self, create: bool = False, free: bool = False) -> None:
        self._beats += 1
        self._file(self._number).write_bytes(json.dumps(self._content(free)).encode(), create=create)


def this_process() -> str:
    """Names this process among all that ever ran on any machine; "" where the system cannot say.

    The kernel's boot, the process namespace, the process id and when it was started.
    """
    return _process(os.getpid()) or ""


def is_dead(process: str) -> bool:
    """Whether the process was one of this machine and has ended; False for one of another machine."""
    here, _, started = process.rpartition("/")
    place, _, number = here.rpartition("/")
    if not started or place != _place():
        return False
    return _process(int(number)) != process


def _place() -> str | None:
    """The machine since its boot, and the namespace that process ids belong to."""
    if sys.platform != "linux":
        return None
    boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"


def _process(number: int) -> str | None:
    """The name of a process that runs; None when there is none, or a zombie."""
    place = _place()
    if place is None:
        return None
    try:
        # The name in parentheses may hold anything; the fields after it do not.
        fields = Path(f"/proc/{number}/stat").read_text("utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, started = fields[0], fields[19]
    return None if state in "ZX" else f"{place}/{number}/{started}"
