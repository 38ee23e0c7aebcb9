"""Artifacts: immutable folders that are published once and hashed against their manifest before use."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from cascade.errors import CascadeError, InputError, IntegrityError
from cascade.storage.faults import store_faults
from cascade.storage.local import hidden_sibling, make_folder
from cascade.storage.locations import Location
from cascade.storage.manifest import MANIFEST, FileRecord, Manifest, encode_manifest, read_manifest
from cascade.storage.publishing import publish

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
        try:
            _verify_once(copy, manifest)
            return target
        except IntegrityError:
            _discard(target)
    _download(location, manifest, target)
    _verify_once(copy, manifest)
    return target


def fetch_file(location: Location, manifest: Manifest, name: str, folder: Path) -> Path:
    """A local path with one file of an artifact, hashed against the manifest by this call.

    A local store: the file itself. S3: `folder/name`, downloaded unless an intact copy is there. Raises
    IntegrityError as `fetch` does, KeyError for a file that the manifest does not name.
    """
    record = manifest.files[name]
    if location.local_path is not None:
        _require_same(location / name, record)
        return location.local_path / name
    copy = Location(str(folder.absolute() / name))
    try:
        _require_same(copy, record)
    except IntegrityError:
        with store_faults(copy.uri):
            make_folder(folder)
        _download_file(location / name, folder / name, record)
        _require_same(copy, record)
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
            f"there is no finished artifact here: {MANIFEST} is missing",
            value=location.uri,
            remedy="check the address, or build it (again)",
        )
    return manifest


def _verify_once(location: Location, manifest: Manifest) -> None:
    proof = (location.uri, hashlib.sha256(encode_manifest(manifest)).hexdigest())
    if proof in _verified:
        return
    for fault in _faults(location, manifest):
        raise fault
    _verified.add(proof)


def _faults(location: Location, manifest: Manifest) -> Iterator[IntegrityError]:
    """Every difference between the files here and the manifest, in the order of the file names."""
    present = set(location.walk()) - {MANIFEST}
    for path in sorted(present | manifest.files.keys()):
        record = manifest.files.get(path)
        if record is None:
            yield _fault("a file is not in the manifest", location / path, "delete it if you put it there")
        elif path not in present:
            yield _fault("a file is missing", location / path, f"expected sha256 {record.sha256}")
        else:
            difference = _difference(location / path, record)
            if difference:
                yield _fault("a file is not what was stored", location / path, difference)


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


def _fault(what: str, place: Location, detail: str) -> IntegrityError:
    return IntegrityError(
        what,
        value=detail,
        where=place.uri,
        remedy="delete the artifact's folder and build again; only what depended on it is rebuilt",
    )


def _line(error: CascadeError) -> str:
    return ": ".join(part for part in (error.where, error.what, error.value) if part)


def _download(location: Location, manifest: Manifest, target: Path) -> None:
    """Bring every file under a hidden name, then rename: other processes never see half of a copy."""
    with store_faults(str(target)):
        make_folder(target.parent)
        staged = hidden_sibling(target)
        try:
            for path, record in manifest.files.items():
                _download_file(location / path, staged / path, record)
            (staged / MANIFEST).write_bytes(encode_manifest(manifest))
            _rename_unless_there(staged, target)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def _download_file(source: Location, target: Path, record: FileRecord) -> None:
    """Download one file, never more than its record promises."""
    try:
        size = source.size()
    except FileNotFoundError:
        raise _fault("a file is missing", source, f"expected sha256 {record.sha256}") from None
    if size != record.size:
        raise _fault("a file is not what was stored", source, _difference(source, record))
    source.download(target)


def _rename_unless_there(staged: Path, target: Path) -> None:
    try:
        os.rename(staged, target)
    except OSError:
        # Another process brought the same artifact meanwhile; its copy is verified like ours.
        if not target.exists():
            raise


def _discard(folder: Path) -> None:
    """Remove a damaged copy; readers that hold its files open keep them."""
    with store_faults(str(folder)):
        doomed = hidden_sibling(folder)
        os.rename(folder, doomed)
        shutil.rmtree(doomed)
