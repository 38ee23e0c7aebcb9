"""Leases: one holder at a time, whoever dies is followed, and nobody comes back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from cascade.errors import StorageFault
from cascade.storage import lease as leases
from cascade.storage.lease import Lease, is_dead, this_process
from cascade.storage.locations import Location
from tests.reports import Recorder
from tests.waiting import wait_until

HOLDER = """
    import sys, time
    from cascade.storage.lease import Lease
    from cascade.storage.locations import open_location
    with Lease(open_location(sys.argv[1])):
        print("held", flush=True)
        time.sleep(600)
"""


class Lines(Recorder):
    """A lease has lines to tell, and no progress."""

    def progress(self, done: int, total: int, unit: str, **figures: float) -> None:
        raise AssertionError


def holder(place: Location) -> subprocess.Popen[str]:
    """A process that holds the lease."""
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), place.uri]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def elsewhere(place: Location, number: int, beats: int = 1, free: bool = False) -> None:
    """The lease of a process that this machine knows nothing of."""
    record = {"machine": "elsewhere", "process": "", "beats": beats, "free": free}
    (place / f"lease-{number:04d}").write_bytes(json.dumps(record).encode())


def test_one_at_a_time(store: Location) -> None:
    """Each of four adds to a file what it read there: two at once would lose a number."""
    counter = store / "counter"
    counter.write_bytes(b"0")

    def work() -> None:
        for _ in range(3):
            with Lease(store / "place"):
                counter.write_bytes(str(int(counter.read_bytes()) + 1).encode())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.read_bytes() == b"12"
    assert len((store / "place").children()) == 1


def test_who_waits_says_so_and_goes_on_when_the_holder_is_done(
    store: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "POLL_SECONDS", 0.01)
    report, place, order = Lines(), store / "place", []

    def wait() -> None:
        with Lease(place, report):
            order.append("second")

    with Lease(place):
        thread = threading.Thread(target=wait)
        thread.start()
        assert wait_until(lambda: bool(report.lines))
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert len(report.lines) == 1
    assert f"process {os.getpid()}" in report.lines[0]


def test_a_killed_holder_of_this_machine_is_followed_at_once(store: Location) -> None:
    process = holder(store / "place")
    name = json.loads((store / "place/lease-0001").read_bytes())["process"]
    assert not is_dead(name)
    process.kill()
    # Not waited for yet: a zombie is dead.
    assert wait_until(lambda: is_dead(name))
    report = Lines()
    with Lease(store / "place", report):
        assert report.lines == []
        assert (store / "place").children() == ["lease-0002"]
    end(process)


def test_a_silent_holder_of_another_machine_is_dead_after_a_while(
    store: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "DEAD_SECONDS", 0.5)
    place, report = store / "place", Lines()
    elsewhere(place, 7)
    with Lease(place, report):
        assert place.children() == ["lease-0008"]
    assert "elsewhere" in report.lines[-1]


def test_a_holder_that_beats_is_waited_for(store: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "DEAD_SECONDS", 5.0)
    monkeypatch.setattr(leases, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(leases, "MOST_POLL_SECONDS", 0.01)
    place, held = store / "place", threading.Event()
    elsewhere(place, 1)

    def wait() -> None:
        with Lease(place):
            held.set()

    thread = threading.Thread(target=wait)
    thread.start()
    for beats in range(2, 60):
        elsewhere(place, 1, beats)
        assert not held.wait(0.1)
    elsewhere(place, 1, 60, free=True)
    thread.join()
    assert held.is_set()


def test_a_holder_is_not_dead_because_the_store_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock of our own: every look takes a second, and one of them an hour."""
    place, report, now, looks = Location(str(tmp_path)), Lines(), [0.0], []
    elsewhere(place, 1)

    def look(lease: Lease, number: int) -> dict[str, object] | None:
        looks.append(number)
        now[0] += 3600 if len(looks) == 5 else 1
        return read(lease, number)

    read = Lease._read
    monkeypatch.setattr(Lease, "_read", look)
    monkeypatch.setattr(leases.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(leases.time, "monotonic", lambda: now[0])
    with Lease(place, report):
        assert 5 + leases.DEAD_SECONDS < len(looks) < 5 + leases.DEAD_SECONDS + 5


def test_beats_change_the_file(store: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.01)
    with Lease(store / "place"):
        first = (store / "place/lease-0001").read_bytes()
        assert wait_until(lambda: (store / "place/lease-0001").read_bytes() != first)


def test_who_was_taken_for_dead_is_told_and_confirms_no_more(
    store: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.05)
    lost = threading.Event()
    with Lease(store / "place", on_lost=lost.set) as lease:
        lease.confirm()
        elsewhere(store / "place", 2)
        assert lost.wait(60)
        with pytest.raises(StorageFault, match="taken this work over"):
            lease.confirm()


def test_a_number_that_is_behind_is_not_held(store: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody saw lease 3 end, and slept while others took 4 and 5 and cleared them away."""
    place = store / "place"
    elsewhere(place, 5, free=True)
    numbers = iter([4, 6])
    monkeypatch.setattr(Lease, "_free_number", lambda lease: next(numbers))
    with Lease(place):
        assert place.children() == ["lease-0006"]


def test_an_unreadable_lease_is_waited_for(store: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "DEAD_SECONDS", 0.3)
    report = Lines()
    (store / "place/lease-0001").write_bytes(b"what a later version writes")
    with Lease(store / "place", report):
        assert len(report.lines) == 2


def test_finish_removes_the_place(store: Location) -> None:
    with Lease(store / "place") as lease:
        (store / "place/step-1").write_bytes(b"state")
        lease.finish()
        assert not (store / "place").exists()
    assert not (store / "place").exists()


def test_a_place_that_is_being_removed_is_no_failure(
    store: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits comes in while the last holder removes the folder it writes to."""
    write, gone = Location.write_bytes, [FileNotFoundError(), FileNotFoundError()]

    def write_bytes(location: Location, data: bytes, create: bool = False) -> None:
        if gone:
            raise gone.pop()
        write(location, data, create)

    monkeypatch.setattr(Location, "write_bytes", write_bytes)
    with Lease(store / "place"):
        assert (store / "place").children() == ["lease-0001"]


def test_processes_are_told_apart(tmp_path: Path) -> None:
    own = this_process()
    if sys.platform != "linux":
        assert own == ""
        return
    assert not is_dead(own)
    place, _, started = own.rpartition("/")
    # The number was given to a later process.
    assert is_dead(f"{place}/{int(started) - 1}")
    # After another boot, or of another machine, nobody can tell.
    assert not is_dead(f"other{own}")
    assert not is_dead("")
