"""Locations behave alike in a folder and in S3: whole files, exclusive creation, plain listings."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cascade.errors import CascadeError, InputError, StorageFault
from cascade.storage import s3 as s3_module
from cascade.storage.local import LocalStore
from cascade.storage.locations import Location, open_location


def test_a_file_is_written_read_and_replaced(store: Location) -> None:
    file = store / "a.json"
    assert not file.exists()
    file.write_bytes(b"one")
    file.write_bytes(b"second")
    assert file.exists()
    assert file.read_bytes() == b"second"
    assert file.size() == 6
    assert file.sha256() == hashlib.sha256(b"second").hexdigest()
    assert -5 < file.age() < 60
    assert file.name == "a.json"
    assert file.parent == store


def test_what_is_absent_is_not_found(store: Location, tmp_path: Path) -> None:
    absent = store / "absent"
    with pytest.raises(FileNotFoundError):
        absent.read_bytes()
    with pytest.raises(FileNotFoundError):
        absent.size()
    with pytest.raises(FileNotFoundError):
        absent.download(tmp_path / "copy" / "file")
    assert list((tmp_path / "copy").iterdir()) == []
    assert absent.children() == []
    assert absent.walk() == []
    absent.delete_tree()


def test_create_refuses_what_exists(store: Location) -> None:
    file = store / "manifest.json"
    file.write_bytes(b"ours", create=True)
    with pytest.raises(FileExistsError):
        file.write_bytes(b"theirs", create=True)
    assert file.read_bytes() == b"ours"
    assert store.walk() == ["manifest.json"]


def test_of_many_creators_one_wins(store: Location) -> None:
    def attempt(number: int) -> bool:
        try:
            (store / "x").write_bytes(str(number).encode(), create=True)
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(attempt, range(4)))
    assert won.count(True) == 1
    assert (store / "x").read_bytes() == str(won.index(True)).encode()


def test_listings_are_sorted_and_leave_hidden_names_out(store: Location) -> None:
    for path in ("b", "a/y", "a/x/z", "ab/c", ".hidden", "a/.part/q"):
        (store / path).write_bytes(b"1")
    assert store.children() == ["a", "ab", "b"]
    assert store.walk() == ["a/x/z", "a/y", "ab/c", "b"]
    assert (store / "a").children() == ["x", "y"]
    assert (store / "a").exists()
    assert (store / "b").children() == []
    with pytest.raises((FileNotFoundError, InputError)):
        (store / "a").read_bytes()


def test_delete_tree_leaves_the_neighbours(store: Location) -> None:
    for path in ("a/x", "a/.hidden", "a/y/[z]", "ab"):
        (store / path).write_bytes(b"1")
    (store / "a").delete_tree()
    assert not (store / "a").exists()
    assert store.walk() == ["ab"]


def test_delete_tree_does_not_mind_what_vanishes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_location(str(tmp_path / "a"))
    for name in "xyz":
        (folder / name).write_bytes(b"1")
    original = os.unlink

    def overtaken(path: str, **options: int) -> None:
        original(path, **options)
        raise FileNotFoundError(2, "gone", path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", overtaken)
        folder.delete_tree()
    assert not folder.exists()


def test_a_version_changes_with_the_file(store: Location) -> None:
    file = store / "x"
    file.write_bytes(b"1")
    first = file.version()
    assert file.version() == first
    file.write_bytes(b"2")
    assert file.version() != first


def test_large_files_travel_in_parts(
    store: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_module, "PART_BYTES", 5 * 2**20)
    source, copy = tmp_path / "source", tmp_path / "deep" / "copy"
    source.write_bytes(os.urandom(2**20) * 12)
    file = store / "model.safetensors"
    file.upload(source, create=True)
    with pytest.raises(FileExistsError):
        file.upload(source, create=True)
    file.download(copy)
    assert copy.read_bytes() == source.read_bytes()
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]
    assert file.sha256() == hashlib.sha256(source.read_bytes()).hexdigest()


def write_half(file: Location) -> None:
    """A writer that stops in the middle."""
    with file.staged() as path:
        path.write_bytes(b"half")
        raise RuntimeError("interrupted")


def test_a_staged_file_appears_whole_or_not_at_all(store: Location) -> None:
    with (store / "good").staged() as path:
        path.write_bytes(b"whole")
        assert store.children() == []
    with pytest.raises(RuntimeError, match="interrupted"):
        write_half(store / "bad")
    assert store.children() == ["good"]
    assert (store / "good").read_bytes() == b"whole"
    if store.local_path is not None:
        assert os.listdir(store.local_path) == ["good"]


def test_a_copy_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    target = open_location(str(tmp_path / "store")) / "file"
    with pytest.raises(FileNotFoundError):
        target.upload(tmp_path / "no such file")
    assert list((tmp_path / "store").iterdir()) == []


def read_in_child(store: Location, answers: multiprocessing.Queue[bytes]) -> None:
    """Runs in a forked process."""
    answers.put((store / "file").read_bytes())
    answers.close()
    answers.join_thread()
    # At once: what other tests have loaded, such as Prefect, has an end of its own, which may fail.
    os._exit(0)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_reads_too(store: Location) -> None:
    (store / "file").write_bytes(b"parent")
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=read_in_child, args=(store, answers))
    child.start()
    assert answers.get(timeout=120) == b"parent"
    child.join(120)
    assert child.exitcode == 0


def test_open_location_makes_local_paths_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert open_location("out/x").uri == f"{tmp_path}/out/x"
    assert open_location("~/out").uri == "/home/someone/out"
    assert open_location("file:///data/my%20store").uri == "/data/my store"
    assert open_location("/data/here/../there/.").uri == "/data/there"
    assert open_location("/data/").local_path == Path("/data")
    assert (open_location("/") / "x").uri == "/x"


def test_open_location_keeps_bucket_and_prefix() -> None:
    location = open_location("s3://bucket/some/prefix/")
    assert location.uri == "s3://bucket/some/prefix"
    assert location.local_path is None
    assert (location / "a/b").uri == "s3://bucket/some/prefix/a/b"
    assert open_location("s3://bucket").name == "bucket"


@pytest.mark.parametrize(
    "uri", ["", " ", "gs://b/x", "http://h/x", "s3://", "s3:///x", "s3://b/../c", "s3://b//c"]
)
def test_open_location_refuses(uri: str) -> None:
    with pytest.raises(InputError) as caught:
        open_location(uri)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("s3://KEY:SECRET@bucket/prefix", "s3://bucket/prefix"),
        ("s3://KEY:SEC/RET@bucket", "s3://bucket"),
        ("s3://KEY:SECRET", "s3://..."),
    ],
)
def test_credentials_in_an_address_are_refused_and_not_repeated(uri: str, shown: str) -> None:
    with pytest.raises(InputError, match="credentials") as caught:
        open_location(uri)
    assert caught.value.value == shown
    assert "SEC" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "..", "../x", "a/../../x", "/etc", "a//b", "."])
def test_a_name_cannot_lead_out(name: str) -> None:
    with pytest.raises(InputError):
        open_location("/data") / name


def test_a_silent_server_is_a_fault_that_a_retry_may_heal(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("CASCADE_STORE_PATIENCE", "1")
    with pytest.raises(StorageFault) as caught:
        (open_location(s3) / "x").read_bytes()
    assert caught.value.retryable
    assert "127.0.0.1:9" in str(caught.value)


def test_a_missing_bucket_is_not_an_absent_file(s3: str) -> None:
    bucket = open_location("s3://no-such-bucket/prefix")
    for action in (bucket.children, bucket.walk, bucket.exists, (bucket / "x").read_bytes):
        with pytest.raises(InputError, match="bucket does not exist"):
            action()


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device", "/data/x")

    monkeypatch.setattr(LocalStore, "write", full)
    with pytest.raises(CascadeError, match="disk is full") as caught:
        (open_location(str(tmp_path)) / "x").write_bytes(b"1")
    assert not caught.value.retryable


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("1")
    with pytest.raises(InputError, match="in the way"):
        (open_location(str(tmp_path)) / "file" / "x").write_bytes(b"1")


def test_a_folder_that_another_process_removes_at_this_moment_is_not_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the holder of a lease does that is done, while others wait there."""

    def seen_and_gone(*arguments: object, **options: object) -> None:
        raise FileExistsError

    gone = open_location(str(tmp_path)) / "gone"
    monkeypatch.setattr(os.path, "isdir", lambda path: True)
    assert gone.children() == []
    monkeypatch.setattr(Path, "mkdir", seen_and_gone)
    with pytest.raises(FileNotFoundError):
        (gone / "lease-0001").write_bytes(b"1", create=True)


def test_a_name_that_no_file_can_have_is_wrong_input(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, what in (("a" * 300, "name too long"), ("loop", "symbolic links")):
        with pytest.raises(InputError, match=f"(?i){what}"):
            open_location(str(tmp_path / name)).read_bytes()


def test_what_is_around_a_bucket_or_a_disk_is_nothing() -> None:
    assert open_location("s3://bucket/a/b").parent == open_location("s3://bucket/a")
    assert open_location("s3://bucket/a").parent == open_location("s3://bucket")
    assert open_location("s3://bucket").parent is None
    assert open_location("/a").parent == open_location("/")
    assert open_location("/").parent is None
