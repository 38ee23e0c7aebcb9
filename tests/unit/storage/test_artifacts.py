"""Artifacts: published once, manifest last, never overwritten, and hashed before they are used."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from cascade.errors import InputError, IntegrityError, StorageFault
from cascade.report import Silent
from cascade.storage import artifacts, publishing
from cascade.storage.artifacts import fetch, problems, publish, read_manifest
from cascade.storage.locations import Location
from cascade.storage.manifest import Draft

FILES = ["config.json", "nested/weights.bin"]


@pytest.fixture(autouse=True)
def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test starts like a process that has verified nothing."""
    monkeypatch.setattr(artifacts, "_verified", set())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder except the manifest and hidden ones."""
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {path: (folder / path).read_bytes() for path in sorted(files) if path in FILES or "new" in path}


def test_what_is_published_is_fetched(store: Location, work: Path, draft: Draft, tmp_path: Path) -> None:
    place = store / "tiny/first/pruned/abc"
    manifest = publish(work, place, draft)
    assert read_manifest(place) == manifest
    assert list(manifest.files) == FILES
    assert manifest.bytes == 2 + 256 * 40
    assert manifest.facts == {"held_out_ce": 3.25}
    assert place.walk() == ["config.json", "manifest.json", "nested/weights.bin"]
    assert contents(fetch(place, tmp_path / "cache")) == contents(work)
    assert problems(place) == []
    assert store.walk() == [f"tiny/first/pruned/abc/{name}" for name in place.walk()]


def test_the_local_copy(store: Location, work: Path, draft: Draft, tmp_path: Path) -> None:
    """A folder is used where it lies; from S3 there is one copy, named by the key, reused while intact."""
    publish(work, store / "x", draft)
    folder = fetch(store / "x", tmp_path / "cache")
    if store.local_path is not None:
        assert folder == store.local_path / "x"
        assert not (tmp_path / "cache").exists()
        return
    assert folder == tmp_path / "cache" / draft.key[:12]
    inode = (folder / "config.json").stat().st_ino
    artifacts._verified.clear()
    assert (fetch(store / "x", tmp_path / "cache") / "config.json").stat().st_ino == inode
    artifacts._verified.clear()
    (folder / "config.json").write_text("??")
    assert (fetch(store / "x", tmp_path / "cache") / "config.json").read_text() == "{}"
    assert sorted(os.listdir(tmp_path / "cache")) == [draft.key[:12], "work"]
    assert os.listdir(tmp_path / "cache" / "work") == []


def test_files_are_hashed_once_per_process(
    store: Location, work: Path, draft: Draft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(work, store / "x", draft)
    fetch(store / "x", tmp_path)
    monkeypatch.setattr(Location, "sha256", lambda self: pytest.fail("hashed again"))
    fetch(store / "x", tmp_path)


def test_nothing_is_overwritten(store: Location, work: Path, draft: Draft) -> None:
    first = publish(work, store / "x", draft)
    (work / "config.json").write_text("other")
    assert publish(work, store / "x", draft) == first
    assert (store / "x" / "config.json").read_bytes() == b"{}"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda place: (place / "nested/weights.bin").write_bytes(b"\0" * 10240), "not what was stored"),
        (lambda place: (place / "nested/weights.bin").write_bytes(b"short"), "not what was stored"),
        (lambda place: (place / "nested/weights.bin").write_bytes(b"long" * 9999), "not what was stored"),
        (lambda place: remove(place / "nested/weights.bin"), "missing"),
        (lambda place: (place / "nested/extra").write_bytes(b"1"), "not in the manifest"),
    ],
    ids=["changed", "truncated", "grown", "missing", "extra"],
)
def test_damage_is_found_and_named(
    store: Location, work: Path, draft: Draft, tmp_path: Path, damage: object, message: str
) -> None:
    manifest = publish(work, store / "x", draft)
    assert callable(damage)
    damage(store / "x")
    found = problems(store / "x")
    assert len(found) == 1
    assert message in found[0]
    assert f"{store}/x/nested/" in found[0]
    if message == "not in the manifest" and store.local_path is None:
        return
    with pytest.raises(IntegrityError, match=message) as caught:
        fetch(store / "x", tmp_path / "cache")
    assert "nested/" in caught.value.where
    if "stored" in message:
        assert manifest.files["nested/weights.bin"].sha256 in str(caught.value)
        assert (store / "x/nested/weights.bin").sha256() in str(caught.value)


def remove(file: Location) -> None:
    """Delete one file, as a person would."""
    if file.local_path is None:
        file.delete_tree()
    else:
        file.local_path.unlink()


def test_verification_reports_every_problem(store: Location, work: Path, draft: Draft) -> None:
    publish(work, store / "x", draft)
    (store / "x/config.json").write_bytes(b"[]")
    (store / "x/new").write_bytes(b"1")
    remove(store / "x/nested/weights.bin")
    assert len(problems(store / "x")) == 3


def test_without_a_manifest_there_is_no_artifact(store: Location, tmp_path: Path) -> None:
    (store / "x/config.json").write_bytes(b"{}")
    with pytest.raises(InputError, match=r"no finished artifact"):
        fetch(store / "x", tmp_path)
    assert "no finished artifact" in problems(store / "x")[0]
    (store / "x/manifest.json").write_bytes(b"{")
    assert "damaged" in problems(store / "x")[0]


def test_a_crash_before_the_manifest_leaves_nothing_done(
    store: Location, work: Path, draft: Draft, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(publishing, "encode_manifest", crash)
        with pytest.raises(KeyboardInterrupt):
            publish(work, store / "x", draft)
    assert read_manifest(store / "x") is None
    if store.local_path is not None:
        assert [path for path in store.local_path.iterdir() if path.is_dir()] == []
    manifest = publish(work, store / "x", draft)
    assert problems(store / "x") == []
    assert read_manifest(store / "x") == manifest


def crash(manifest: object) -> bytes:
    """Somebody presses Ctrl-C."""
    raise KeyboardInterrupt


def test_intact_remains_are_not_uploaded_again(
    store: Location, work: Path, draft: Draft, monkeypatch: pytest.MonkeyPatch
) -> None:
    if store.local_path is not None:
        pytest.skip("a folder is renamed into place: it leaves no remains")
    (store / "x/config.json").write_bytes(b"{}")
    uploaded = []
    original = Location.upload

    def counted(self: Location, source: Path, create: bool = False) -> None:
        uploaded.append(source.name)
        original(self, source, create)

    monkeypatch.setattr(Location, "upload", counted)
    publish(work, store / "x", draft)
    assert uploaded == ["weights.bin"]


class Lines(Silent):
    """Keeps what is logged."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines

    def log(self, message: str) -> None:
        """Keep the line."""
        self.lines.append(message)


def test_remains_of_a_dead_builder_are_replaced(
    store: Location, work: Path, draft: Draft, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other content under our names, and names that we do not have, from a builder that is gone."""
    ages = iter([0.0, 0.0, 299.0, 299.0, 301.0, 301.0])
    monkeypatch.setattr(Location, "age", lambda location: next(ages))
    monkeypatch.setattr(publishing, "POLL_SECONDS", 0.0)
    (store / "x/config.json").write_bytes(b"old")
    (store / "x/model-00001-of-00002.safetensors").write_bytes(b"old")
    lines: list[str] = []
    publish(work, store / "x", draft, report=Lines(lines))
    assert problems(store / "x") == []
    if store.local_path is None:
        assert len(lines) == 1
        assert f"at {store}/x: waiting" in lines[0]


def test_a_killed_builders_hidden_folder_is_replaced(work: Path, draft: Draft, tmp_path: Path) -> None:
    (tmp_path / "store" / ".x.incoming").mkdir(parents=True)
    (tmp_path / "store" / ".x.incoming" / "model").write_text("half")
    store = Location(str(tmp_path / "store"))
    publish(work, store / "x", draft)
    assert problems(store / "x") == []
    assert sorted(os.listdir(tmp_path / "store")) == [".publishing.lock", "x"]


def test_the_manifest_of_a_faster_builder_is_adopted(
    store: Location, work: Path, draft: Draft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have stored the same files; the other one's manifest appears just before ours."""
    theirs_work = tmp_path / "theirs"
    shutil.copytree(work, theirs_work)
    theirs = draft.model_copy(update={"run": "the faster one"})
    original = publishing.encode_manifest
    racing = [True]

    def overtaken(manifest: publishing.Manifest) -> bytes:
        if racing.pop() if racing else False:
            (store / "x/manifest.json").write_bytes(
                original(manifest.model_copy(update={"run": theirs.run})), create=True
            )
        return original(manifest)

    if store.local_path is not None:
        assert publish(theirs_work, store / "x", theirs).run == "the faster one"
    else:
        monkeypatch.setattr(publishing, "encode_manifest", overtaken)
    assert publish(work, store / "x", draft).run == "the faster one"
    assert problems(store / "x") == []


def test_a_live_builder_with_other_content_is_not_disturbed(
    s3: str, work: Path, draft: Draft, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stores its file between our look and our upload: its file stays and we say: again later."""
    place = Location(s3) / "x"
    original = Location.upload

    def overtaken(self: Location, source: Path, create: bool = False) -> None:
        if not self.exists():
            self.write_bytes(b"theirs")
        original(self, source, create)

    monkeypatch.setattr(Location, "upload", overtaken)
    with pytest.raises(StorageFault, match="another builder"):
        publish(work, place, draft)
    assert (place / "config.json").read_bytes() == b"theirs"
    assert read_manifest(place) is None
