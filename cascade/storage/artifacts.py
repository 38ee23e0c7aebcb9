"""Artifacts: immutable folders that are published once and hashed against their manifest before use."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from cascade.errors import CascadeError, InputError, IntegrityError
from cascade.storage.cache import discard, touch
from cascade.storage.faults import store_faults
from cascade.storage.local import make_folder
from cascade.storage.locations import Location
from cascade.storage.manifest import MANIFEST, REPAIR, FileRecord, Manifest, encode_manifest, read_manifest
from cascade.storage.publishing import publish
from cascade.storage.scratch import scratch_folder

__all__ = ["fetch", "fetch_file", "problems", "publish", "read_manifest", "require_manifest"]

# Folders whose every file this process has hashed, with the digest of the manifest they were held against.
_verified: set[tuple[str, str]] = set()

KEY_DIGITS = 12


def fetch(location: Location, cache: Path) -> Path:
    """A local folder with the artifact's files, each hashed against the manifest once per process.

    A local store: the folder itself. S3: `cache/<first 12 digits of the key>`, downloaded unless an
    intact copy is there. InputError when there is no finished artifact; IntegrityError, naming the
    file and both digests, when a file is missing, extra, truncated or changed.
    """
    manifest = require_manifest(location)
    if location.local_path is not None:
        _verify_once(location, manifest)
        return location.local_path
    target = cache.absolute() / manifest.key[:KEY_DIGITS]
    copy = Location(str(target))
    if target.exists():
        touch(target)
        try:
            _verify_once(copy, manifest)
            return target
        except IntegrityError:
            discard(target)
    _download(location, manifest, target)
    return target


def fetch_file(location: Location, manifest: Manifest, name: str, folder: Path) -> Path:
    """A local path with one file of an artifact, hashed against the manifest by this call.

    A local store: the file itself. S3: `folder/name`, downloaded unless an intact copy is there, by way of a
    scratch folder beside `folder`: what a killed process leaves there goes with the next one. Raises
    IntegrityError as `fetch` does, KeyError for a file that the manifest does not name.
    """
    record = manifest.files[name]
    if location.local_path is not None:
        if leaves(location, name):
            raise _fault("a file is a link that leads out of the artifact", location / name, "a link")
        _require_same(location / name, record)
        return location.local_path / name
    copy = Location(str(folder.absolute() / name))
    try:
        _require_same(copy, record)
    except IntegrityError:
        with store_faults(copy.uri), scratch_folder(folder.parent, "download") as staged:
            _download_file(location / name, staged / name, record)
            make_folder((folder / name).parent)
            os.replace(staged / name, folder / name)
    touch(folder)
    return folder / name


def problems(location: Location) -> list[str]:
    """Everything that is wrong with the artifact here, one line each; empty when it is intact."""
    try:
        manifest = require_manifest(location)
    except InputError as error:
        return [_line(error)]
    return [_line(fault) for fault in _faults(location, manifest)]


def require_manifest(location: Location) -> Manifest:
    """The manifest of a finished artifact; InputError when there is none."""
    manifest = read_manifest(location)
    if manifest is None:
        raise InputError(
            "there is no finished artifact here: its manifest is missing",
            value=location.uri,
            where=(location / MANIFEST).uri,
            remedy="check the address, or build it (again)",
        )
    return manifest


def _verify_once(location: Location, manifest: Manifest) -> None:
    if _proof(location, manifest) in _verified:
        return
    for fault in _faults(location, manifest):
        raise fault
    _verified.add(_proof(location, manifest))


def _proof(location: Location, manifest: Manifest) -> tuple[str, str]:
    return location.uri, hashlib.sha256(encode_manifest(manifest)).hexdigest()


def _faults(location: Location, manifest: Manifest) -> Iterator[IntegrityError]:
    """Every difference between the files here and the manifest, in the order of the file names."""
    present = set(location.walk()) - {MANIFEST}
    for path in sorted(present | manifest.files.keys()):
        record = manifest.files.get(path)
        if record is None:
            yield _surplus(location / path)
        elif path not in present:
            yield _fault("a file is missing", location / path, f"expected sha256 {record.sha256}")
        elif leaves(location, path):
            yield _fault("a file is a link that leads out of the artifact", location / path, "a link")
        else:
            difference = _difference(location / path, record)
            if difference:
                yield _fault("a file is not what was stored", location / path, difference)


def leaves(folder: Location, path: str) -> bool:
    """Whether a file of a local folder lies elsewhere: what was hashed could be changed from there."""
    root = folder.local_path
    return root is not None and not (root / path).resolve().is_relative_to(root.resolve())


def _require_same(location: Location, record: FileRecord) -> None:
    """Raise IntegrityError unless the file is there and is what the record says."""
    try:
        difference = _difference(location, record)
    except FileNotFoundError:
        raise _fault("a file is missing", location, f"expected sha256 {record.sha256}") from None
    if difference:
        raise _fault("a file is not what was stored", location, difference)


def _difference(location: Location, record: FileRecord) -> str:
    """How the file differs from its record, or ""."""
    size, digest = location.size(), location.sha256()
    if (size, digest) == (record.size, record.sha256):
        return ""
    sizes = f" ({record.size} bytes), found" if size != record.size else ", found"
    return f"expected sha256 {record.sha256}{sizes} {digest}" + (
        f" ({size} bytes)" if size != record.size else ""
    )


def _surplus(place: Location) -> IntegrityError:
    return _fault("a file is not in the manifest", place, "it was added after the artifact was stored")


def _fault(what: str, place: Location, detail: str) -> IntegrityError:
    return IntegrityError(
        what,
        value=detail,
        where=place.uri,
        remedy=REPAIR,
    )


def _line(error: CascadeError) -> str:
    return ": ".join(part for part in (error.where, error.what, error.value) if part)


def _download(location: Location, manifest: Manifest, target: Path) -> None:
    """Bring every file into a scratch folder, then rename: other processes never see half of a copy.

    Raises IntegrityError that names what is wrong in the store, not in the copy.
    """
    for path in set(location.walk()) - manifest.files.keys() - {MANIFEST}:
        raise _surplus(location / path)
    copy = Location(str(target))
    with store_faults(str(target)), scratch_folder(target.parent, "download") as staged:
        for path, record in manifest.files.items():
            _download_file(location / path, staged / path, record)
        (staged / MANIFEST).write_bytes(encode_manifest(manifest))
        if _renamed(staged, target):
            _verified.add(_proof(copy, manifest))
        else:
            _verify_once(copy, manifest)


def _download_file(source: Location, target: Path, record: FileRecord) -> None:
    """Download one file, never more than its record promises, and hash it."""
    try:
        size = source.size()
    except FileNotFoundError:
        raise _fault("a file is missing", source, f"expected sha256 {record.sha256}") from None
    if size != record.size:
        raise _fault("a file is not what was stored", source, _difference(source, record))
    # It may have been replaced since.
    source.download(target, record.size)
    difference = _difference(Location(str(target)), record)
    if difference:
        target.unlink()
        raise _fault("a file is not what was stored", source, difference)


def _renamed(staged: Path, target: Path) -> bool:
    """False when another process has brought the same artifact meanwhile."""
    try:
        os.rename(staged, target)
    except OSError:
        if not target.exists():
            raise
        return False
    return True
