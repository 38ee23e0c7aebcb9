"""What the store does to single requests, and that nobody notices but the log."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import botocore.session
import pytest
import torch

from cascade.errors import InputError, StorageFault
from cascade.storage import connection, lease, patience
from cascade.storage import s3 as s3_module
from cascade.storage.artifacts import problems, publish
from cascade.storage.checkpoints import TrainingCheckpoints
from cascade.storage.locations import Location, check_store
from cascade.storage.manifest import Draft, read_manifest
from tests.faults.proxy import After, Fault, FaultyProxy, First, Once, Request
from tests.s3_server import S3Server

# The ordinary run has those that differ most.
HARM = [
    fault if fault in (Fault.LOST, Fault.SHORT, Fault.RESET) else pytest.param(fault, marks=pytest.mark.slow)
    for fault in Fault
    if fault is not Fault.NONE
]
PART = 5 * 2**20
DRAFT = Draft(kind="pruned", key="0" * 64, family="tiny", stage="small")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Three parts of an upload."""
    path = tmp_path / "weights.bin"
    path.write_bytes(random.Random(0).randbytes(11 * PART // 5))
    return path


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_module, "PART_BYTES", PART)


def use_all(place: Location, file: Path, copy: Path) -> None:
    """Every method of a location, each of which has to give what a store without faults gives."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    small, large = place / "a" / "small.json", place / "a" / "large.bin"
    assert not small.exists()
    small.write_bytes(b"first")
    small.write_bytes(b"second")
    (place / "a" / "created").write_bytes(b"created", create=True)
    large.upload(file, create=True)
    (place / "replaced").upload(file)
    with (place / "staged").staged() as path:
        path.write_bytes(b"staged")
    assert (small.read_bytes(), small.size(), small.exists()) == (b"second", 6, True)
    assert small.version() == small.version()
    assert large.sha256() == (place / "replaced").sha256() == digest
    large.download(copy)
    assert copy.read_bytes() == file.read_bytes()
    assert place.walk() == ["a/created", "a/large.bin", "a/small.json", "replaced", "staged"]
    assert place.children() == ["a", "replaced", "staged"]
    with pytest.raises(FileNotFoundError):
        (place / "none").read_bytes()
    with pytest.raises(FileExistsError):
        small.write_bytes(b"third", create=True)
    (place / "a").delete_tree()
    assert place.walk() == ["replaced", "staged"]


@pytest.mark.parametrize("fault", HARM, ids=lambda fault: fault.name.lower())
def test_whatever_is_asked_first_fails_and_every_answer_is_right(
    proxy: FaultyProxy,
    place: Location,
    file: Path,
    tmp_path: Path,
    fault: Fault,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tests.faults.proxy.PAUSE_SECONDS", 0.01)
    proxy.plan = First(fault)
    use_all(place, file, tmp_path / "copy")
    met = {request.method for request, done in proxy.seen if done is fault}
    assert met == {"GET", "HEAD", "PUT", "POST", "DELETE"}


def test_a_part_of_an_upload_that_is_reset_is_sent_again_and_the_others_are_not(
    proxy: FaultyProxy, place: Location, file: Path
) -> None:
    proxy.plan = Once(Fault.RESET, Fault.INTERNAL, method="PUT", text="partNumber=2")
    (place / "x").upload(file, create=True)
    parts = [
        request.target.split("partNumber=")[1][0]
        for request, _ in proxy.seen
        if "partNumber" in request.target
    ]
    assert sorted(parts) == ["1", "2", "2", "2", "3"]
    assert (place / "x").sha256() == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("create", [True, False])
@pytest.mark.parametrize("size", [100, 11 * PART // 5])
def test_a_write_whose_answer_was_lost_is_known_as_our_own(
    proxy: FaultyProxy, place: Location, tmp_path: Path, create: bool, size: int
) -> None:
    (tmp_path / "file").write_bytes(bytes(size))
    last = {"method": "PUT"} if size == 100 else {"method": "POST", "text": "uploadId="}
    proxy.plan = Once(Fault.LOST, **last)
    (place / "x").upload(tmp_path / "file", create=create)
    assert [fault for _, fault in proxy.seen].count(Fault.LOST) == 1
    assert (place / "x").size() == size


@pytest.mark.parametrize("content", [b"ours", b"theirs"])
def test_what_another_created_while_we_failed_is_never_taken_for_ours(
    proxy: FaultyProxy, place: Location, s3_server: S3Server, content: bytes
) -> None:
    """Not even when it holds the same: no lock is taken by two."""
    client = botocore.session.Session().create_client("s3", endpoint_url=s3_server.endpoint)
    bucket, _, key = f"{place.uri}/x".removeprefix("s3://").partition("/")
    once = Once(Fault.UNAVAILABLE, method="PUT")

    def overtaken(request: Request) -> Fault:
        fault = once(request)
        if fault is Fault.UNAVAILABLE:
            client.put_object(Bucket=bucket, Key=key, Body=content)
        return fault

    proxy.plan = overtaken
    with pytest.raises(FileExistsError):
        (place / "x").write_bytes(b"ours", create=True)
    assert (place / "x").read_bytes() == content
    client.close()


def test_what_is_refused_for_good_is_asked_once(
    proxy: FaultyProxy, place: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "x").write_bytes(b"1")
    proxy.seen.clear()
    with pytest.raises(FileExistsError):
        (place / "x").write_bytes(b"2", create=True)
    assert [request.method for request, _ in proxy.seen] == ["PUT", "HEAD"]
    proxy.seen.clear()
    with pytest.raises(FileNotFoundError):
        (place / "none").read_bytes()
    assert [request.method for request, _ in proxy.seen] == ["GET"]
    proxy.seen.clear()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "this-is-wrong")
    with pytest.raises(InputError, match="does not accept the credentials"):
        (place / "x").read_bytes()
    assert len(proxy.seen) == 1


def test_an_outage_within_the_bound_is_waited_for_and_told_without_a_flood(
    proxy: FaultyProxy, place: Location, caplog: pytest.LogCaptureFixture
) -> None:
    """Ten minutes, scaled to two seconds."""
    (place / "x").write_bytes(b"1")
    state = random.getstate()
    with caplog.at_level(logging.WARNING, patience.LOG.name), ThreadPoolExecutor(8) as pool:
        began, outage = time.monotonic(), proxy.outage(2.0)
        read = list(pool.map(lambda _: (place / "x").read_bytes(), range(8)))
        outage.join()
    assert read == [b"1"] * 8
    took = time.monotonic() - began
    assert took >= 2
    assert random.getstate() == state
    lines = [record.getMessage() for record in caplog.records]
    assert 1 <= len([line for line in lines if "again in" in line]) <= 2 + took / patience.QUIET_SECONDS
    assert [line.startswith(f"{proxy.endpoint} answers again after ") for line in lines].count(True) == 1
    assert f"get_object {place.uri}/x failed: " in lines[0]
    assert not any(
        os.environ[name] in "".join(lines) for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID")
    )


@pytest.mark.parametrize("size", [100, 11 * PART // 5])
def test_beyond_the_bound_it_is_a_fault_in_four_parts(
    proxy: FaultyProxy, place: Location, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: int
) -> None:
    monkeypatch.setenv(patience.SETTING, "4")
    (tmp_path / "file").write_bytes(bytes(size))
    # What opens an upload in parts succeeds.
    proxy.plan = lambda request: Fault.NONE if "?uploads" in request.target else Fault.UNAVAILABLE
    with pytest.raises(StorageFault) as caught:
        (place / "x").upload(tmp_path / "file")
    asked = [request.method for request, _ in proxy.seen]
    assert asked.count("PUT") >= 2
    # Ending the upload does not wait, too.
    assert asked.count("DELETE") == asked.count("POST")
    error = caught.value
    assert error.what == "the store failed, for 4 s"
    assert error.value == "OSError (SlowDown)"
    assert error.where == f"{place.uri}/x, {proxy.endpoint}"
    assert error.remedy
    assert (error.exit_code, error.retryable) == (1, True)


@pytest.mark.parametrize(("fault", "asked"), [(Fault.INTERNAL, 1), (Fault.UNAVAILABLE, 1), (Fault.RESET, 2)])
def test_patience_of_zero_asks_once(
    proxy: FaultyProxy, place: Location, fault: Fault, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So nothing below us repeats requests, untold and beyond our bound.

    But for aiohttp, which sends an idempotent request again at once, and once, over a new connection.
    """
    monkeypatch.setenv(patience.SETTING, "0")
    proxy.plan = lambda request: fault
    with pytest.raises(StorageFault):
        place.children()
    assert len(proxy.seen) == asked


def test_what_matters_now_or_not_at_all_is_not_waited_for(proxy: FaultyProxy, place: Location) -> None:
    proxy.plan = lambda request: Fault.UNAVAILABLE
    with patience.at_most(0.1), pytest.raises(StorageFault, match="for 0 s"):
        (place / "x").size()
    proxy.plan = Once(Fault.UNAVAILABLE)
    assert not (place / "x").exists()


def test_a_builder_that_was_cut_off_with_its_store_is_not_taken_for_dead(
    proxy: FaultyProxy, place: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one cannot know how long it was silent: the store could not hear it."""
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.5)
    monkeypatch.setattr(lease, "DEAD_SECONDS", 6.0)
    # Shorter than a beat, as in earnest: only the outage keeps the other one from looking.
    monkeypatch.setattr(lease, "MOST_POLL_SECONDS", 0.2)
    # As on two machines, who cannot look after each other's processes.
    monkeypatch.setattr(lease, "is_dead", lambda process: False)
    with lease.Lease(place) as first:
        waiting = threading.Thread(target=lambda: lease.Lease(place).__enter__()._stop_beating())
        waiting.start()
        time.sleep(1.0)
        # The other one hears of the store again before it can hear of the holder.
        proxy.plan = lambda request: Fault.UNAVAILABLE if request.method == "PUT" else Fault.NONE
        proxy.outage(9.0).join()
        time.sleep(1.5)
        proxy.plan = lambda request: Fault.NONE
        time.sleep(1.5)
        first.confirm()
        assert waiting.is_alive()
    waiting.join()


@pytest.mark.parametrize("text", ["soon", "-1", "inf", "nan"])
def test_patience_that_is_no_time_is_wrong_input(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(patience.SETTING, text)
    with pytest.raises(InputError, match="not a number of seconds"):
        patience.patience()


@pytest.mark.parametrize("seconds", [90.0, 900.0])
def test_waits_double_with_jitter_up_to_a_thirtieth_and_end_at_the_bound(
    monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    clock, waits = [1000.0], []

    async def sleep(pause: float) -> None:
        waits.append(pause)
        clock[0] += pause

    async def attempt() -> None:
        raise ConnectionResetError

    # Of that module alone: other threads of this process go on by the real clock.
    monkeypatch.setattr(patience, "asyncio", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(patience, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    with pytest.raises(OSError, match="kept failing"):
        asyncio.run(patience.patiently(attempt, "x", seconds))
    assert sum(waits) == pytest.approx(seconds)
    for number, wait in enumerate(waits[:-1]):
        longest = min(0.25 * 2**number, seconds / 30)
        assert longest / 2 <= wait <= longest
    assert len(set(waits)) == len(waits)


def test_the_default_outlives_an_outage_of_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(patience.SETTING, raising=False)
    assert patience.patience() > 600


def test_a_server_that_hangs_is_asked_again(
    proxy: FaultyProxy, place: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(connection.WORK_LIMITS, "read_timeout", 4)
    monkeypatch.setattr("tests.faults.proxy.PAUSE_SECONDS", 8)
    (place / "x").write_bytes(b"123456")
    proxy.plan = Once(Fault.SLOW, method="GET")
    assert (place / "x").read_bytes() == b"123456"
    assert [request.method for request, _ in proxy.seen].count("GET") == 2


def test_a_preflight_waits_only_where_nobody_is_there_to_be_told(proxy: FaultyProxy, place: Location) -> None:
    proxy.refuse()
    with pytest.raises(InputError, match="cannot be reached"):
        check_store(place)
    outage = threading.Timer(1.0, proxy.listen)
    outage.start()
    check_store(place, wait=True)
    outage.join()


@pytest.mark.parametrize("fault", [Fault.UNAVAILABLE, Fault.LOST])
def test_a_preflight_in_a_bad_moment_still_tells_what_the_store_can_do(
    proxy: FaultyProxy, place: Location, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "CHECK_SECONDS", 30.0)
    proxy.plan = First(fault)
    check_store(place)
    assert place.walk() == []


def test_a_busy_store_is_not_called_a_wrong_address(proxy: FaultyProxy, place: Location) -> None:
    proxy.plan = lambda request: Fault.UNAVAILABLE
    with pytest.raises(StorageFault, match="the store failed, for 4 s"):
        check_store(place)


@pytest.fixture
def work(tmp_path: Path, file: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "a.json").write_text("{}")
    file.rename(folder / "b.bin")
    (folder / "c.json").write_text("[]")
    return folder


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_an_artifact_whose_storing_fails_anywhere_is_not_half_there_and_goes_on(
    proxy: FaultyProxy, place: Location, work: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store fails for good after one request, after two, and so on, until all of them succeed."""
    monkeypatch.setenv(patience.SETTING, "0")
    for budget in count(0, step):
        to, plan = place / str(budget), After(budget, Fault.RESET)
        proxy.plan = plan
        with suppress(StorageFault):
            publish(work, to, DRAFT)
        proxy.plan = lambda request: Fault.NONE
        stored = set(to.walk())
        # Only the reading of the published manifest may have failed.
        assert read_manifest(to) is None or problems(to) == []
        proxy.seen.clear()
        publish(work, to, DRAFT)
        assert problems(to) == []
        sent = [request.target for request, _ in proxy.seen if request.method == "PUT"]
        assert not any(f"/{budget}/{name}" in target for name in stored for target in sent)
        if not plan.met:
            break
    assert budget > 10


def test_a_manifest_whose_answer_was_lost_is_published(
    proxy: FaultyProxy, place: Location, work: Path
) -> None:
    proxy.plan = Once(Fault.LOST, method="PUT", text="manifest.json")
    publish(work, place, DRAFT)
    assert problems(place) == []


@pytest.mark.slow
@pytest.mark.parametrize("fault", HARM, ids=lambda fault: fault.name.lower())
def test_a_checkpoint_goes_through_every_fault(
    proxy: FaultyProxy, place: Location, tmp_path: Path, fault: Fault
) -> None:
    proxy.plan = First(fault)
    kept = TrainingCheckpoints(place)
    tensors = {"weight": torch.arange(1000.0)}
    for step in (1, 2, 3):
        kept.save(step, tensors, {"step": step})
    found = kept.latest(tmp_path)
    assert found is not None
    assert found[0] == {"step": 3}
    assert torch.equal(found[1]["weight"], tensors["weight"])
    assert place.children() == ["step-00000002", "step-00000003"]
