"""Storing a finished folder as an artifact: files first, manifest last, nothing ever overwritten."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from cascade.errors import CascadeError, StorageFault
from cascade.report import SILENT, Report
from cascade.storage.faults import store_faults
from cascade.storage.lease import Lease
from cascade.storage.local import file_sha256, make_folder
from cascade.storage.locations import Location, is_hidden
from cascade.storage.manifest import MANIFEST, Draft, FileRecord, Manifest, encode_manifest, read_manifest

# Files of an unfinished artifact that differ from ours belong to a builder that died, or to one that
# is still uploading. S3 cannot tell; one that has written nothing for this long is taken for dead.
QUIET_SECONDS = 300.0
POLL_SECONDS = 5.0
# Of folders with hidden names, while an artifact is moved into its place.
STATES = (".incoming", ".remains")


def publish(
    folder: Path, to: Location, draft: Draft, *, report: Report = SILENT, lease: Lease | None = None
) -> Manifest:
    """Store every file of `folder` (except hidden ones) as the artifact `to`.

    lease: held by whoever makes this artifact; what other builders left is then of dead ones, and nobody
    waits for them.

    Returns the manifest that stands there afterwards: ours, or that of another builder who was first;
    then ours is dropped. The files of `folder` stay where they are.
    A crash at any point leaves no manifest, so the artifact counts as not done.
    """
    existing = read_manifest(to)
    if existing is not None:
        return existing
    files = _records(folder)
    manifest = Manifest(
        **dict(draft),
        files=files,
        bytes=sum(record.size for record in files.values()),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    if to.local_path is not None:
        return _publish_folder(folder, to, to.local_path, manifest)
    return _publish_objects(folder, to, manifest, report, lease)


def _records(folder: Path) -> dict[str, FileRecord]:
    """Digest and size of every file, in a fixed order."""
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    if MANIFEST in paths:
        raise CascadeError(
            "the work folder holds a manifest already",
            value=MANIFEST,
            where=str(folder),
            remedy="remove it: storing the folder writes its own",
        )
    records = {}
    for path in paths:
        if not is_hidden(path):
            records[path] = FileRecord(sha256=file_sha256(folder / path), size=(folder / path).stat().st_size)
    return records


def _publish_folder(folder: Path, to: Location, target: Path, manifest: Manifest) -> Manifest:
    """Build the whole artifact under a hidden name, then rename it: it is there completely or not at all."""
    with store_faults(to.uri), only_publisher(target.parent):
        existing = read_manifest(to)
        if existing is not None:
            return existing
        staged, remains = (target.with_name(f".{target.name}{state}") for state in STATES)
        # Nobody else is at it: whatever is here under such a name, a killed publisher left.
        _remove(path for state in STATES for path in target.parent.glob(f".*{state}"))
        try:
            staged.mkdir()
            for path in manifest.files:
                (staged / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / path, staged / path)
            (staged / MANIFEST).write_bytes(encode_manifest(manifest))
            if target.exists():
                # Without a manifest it is what an interrupted or deleted artifact left.
                os.rename(target, remains)
            os.rename(staged, target)
        finally:
            _remove((staged, remains))
    return manifest


def _remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def only_publisher(folder: Path) -> Iterator[None]:
    """Let one process at a time put artifacts into this folder, or away; any exit frees the lock."""
    make_folder(folder)
    # A file, not the folder: NFS locks only what is open for writing.
    with (folder / ".publishing.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _publish_objects(
    folder: Path, to: Location, manifest: Manifest, report: Report, lease: Lease | None
) -> Manifest:
    """Create every object, then the manifest; the store refuses each creation whose name is taken."""
    kept = _settle_remains(to, manifest, report, 0.0 if lease else QUIET_SECONDS)
    if isinstance(kept, Manifest):
        return kept
    for path, record in manifest.files.items():
        if path not in kept and not _created(folder / path, to / path, record):
            return _theirs(to)
    if lease:
        # Of a builder that slept meanwhile, others have removed the files.
        lease.confirm()
    with suppress(FileExistsError):
        (to / MANIFEST).write_bytes(encode_manifest(manifest), create=True)
    # Read back what stands there: a repeated request is refused although its first try was ours.
    return _theirs(to)


def _settle_remains(to: Location, manifest: Manifest, report: Report, quiet: float) -> set[str] | Manifest:
    """The files already there with our content, after removing all others; or a manifest that appeared.

    quiet: seconds without a new file after which their builder is taken for dead.
    StorageFault when another builder is still at it after a long time.
    """
    kept: set[str] = set()
    told = False
    deadline = time.monotonic() + 4 * QUIET_SECONDS
    while time.monotonic() < deadline:
        present = to.walk()
        if MANIFEST in present:
            return _theirs(to)
        kept |= {path for path in present if path not in kept and _same(to / path, manifest.files.get(path))}
        foreign = [path for path in present if path not in kept]
        if not foreign:
            return kept
        if not quiet or min((to / path).age() for path in present) > quiet:
            for path in foreign:
                (to / path).delete_tree()
            return kept
        if not told:
            told = True
            report.log(
                f"another builder's files are at {to.uri}: waiting until it is done, or has written nothing "
                f"for {quiet:.0f} s (at most {4 * QUIET_SECONDS:.0f} s)"
            )
        time.sleep(POLL_SECONDS)
    raise _contended(to)


def _same(location: Location, record: FileRecord | None) -> bool:
    return record is not None and location.size() == record.size and location.sha256() == record.sha256


def _created(source: Path, target: Location, record: FileRecord) -> bool:
    """Upload one file; False when another builder has just stored other content under the name."""
    try:
        target.upload(source, create=True)
    except FileExistsError:
        return _same(target, record)
    return True


def _theirs(to: Location) -> Manifest:
    """The manifest that stands there; StorageFault if there is none yet."""
    manifest = read_manifest(to)
    if manifest is None:
        raise _contended(to)
    return manifest


def _contended(to: Location) -> StorageFault:
    return StorageFault(
        "another builder is storing the same artifact",
        value=to.name,
        where=to.uri,
        remedy="run again when it has finished; its result will be used",
    )
