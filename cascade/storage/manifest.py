"""The manifest: the last file of an artifact, which says what every other file is and where it came from."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from cascade.errors import CascadeError, IntegrityError, NewerVersion
from cascade.parsing import parse_json
from cascade.storage.locations import Location, is_hidden, is_inside
from cascade.wording import problem_lines

MANIFEST = "manifest.json"
SCHEMA_VERSION = 2
REPAIR = "run `cascade repair` on the store, then build again; only what was damaged is made again"
# Part of every key. Raise it when the same spec and inputs now give another result.
CODE_SCHEMA = 1
# Separators elsewhere, and what no name holds.
FOREIGN = {"\\", ":", *map(chr, range(32)), "\x7f"}


def _checked_path(path: str) -> str:
    """A path that means the same file, inside the artifact, on every system."""
    if not is_inside(path) or path == MANIFEST or is_hidden(path) or set(path) & FOREIGN:
        raise ValueError(f"{path!r} is not a relative path inside the artifact")
    return path


RelativePath = Annotated[str, AfterValidator(_checked_path)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class FileRecord(BaseModel):
    """One file: hex digest of its content and its size in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: Digest
    size: int = Field(ge=0)


def _checked_files(files: dict[str, FileRecord]) -> dict[str, FileRecord]:
    """Files that can lie beside each other, also where names that only look alike are one name."""
    names: dict[str, str] = {}
    for path in files:
        alike = unicodedata.normalize("NFC", path).casefold()
        if alike in names:
            raise ValueError(f"{path!r} and {names[alike]!r} are one name on some systems")
        names[alike] = path
    for path in files:
        folder = next((str(above) for above in PurePosixPath(path).parents if str(above) in files), None)
        if folder:
            raise ValueError(f"{folder!r} is a file, and the folder of {path!r}")
    return files


class InputRecord(BaseModel):
    """One input artifact: where it was read and the key that identifies it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    uri: str
    key: str


class Draft(BaseModel):
    """What the maker of an artifact knows before its files are stored.

    kind, family, stage: its place in the graph (stage is "parent" for shared kinds). inputs: lineage, by
    role. spec: the recipe section that made it. versions: library -> version. hardware: what it ran on.
    tokens: tokens processed. flops: floating-point operations of the whole node. teacher_flops: those of them
    that teachers took (none counted before schema version 2). seconds: wall clock.
    facts: results that depend on the kind (JSON). run: the run that made it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: str
    key: Digest
    family: str
    stage: str
    inputs: dict[str, InputRecord] = {}
    spec: dict[str, Any] = {}
    versions: dict[str, str] = {}
    seed: int = 0
    hardware: dict[str, str | int] = {}
    tokens: int = Field(default=0, ge=0)
    flops: int = Field(default=0, ge=0)
    teacher_flops: int = Field(default=0, ge=0)
    seconds: float = Field(default=0.0, ge=0)
    facts: dict[str, Any] = {}
    run: str = ""


class Manifest(Draft):
    """A stored artifact: the draft, its files (relative path -> record), their bytes, and when (ISO, UTC)."""

    schema_version: int = SCHEMA_VERSION
    files: Annotated[dict[RelativePath, FileRecord], AfterValidator(_checked_files)]
    bytes: int = Field(ge=0)
    created: str


def encode_manifest(manifest: Manifest) -> bytes:
    """JSON as it is stored. CascadeError when a fact or the spec has no JSON form (such as NaN)."""
    try:
        text = json.dumps(manifest.model_dump(), indent=1, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CascadeError(
            "the manifest has no JSON form",
            value=error,
            where=f"{manifest.kind} of {manifest.stage}",
            remedy="nothing was published; look for a figure that is not finite",
        ) from error
    return (text + "\n").encode()


def parse_manifest(data: bytes, where: str) -> Manifest:
    """The manifest in `data`. IntegrityError, naming `where`, when it is damaged or from a newer version."""
    try:
        content = parse_json(data, finite=True)
        version = content.get("schema_version") if isinstance(content, dict) else None
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise NewerVersion(
                f"the manifest has schema version {version}; this cascade reads up to {SCHEMA_VERSION}",
                value=version,
                where=where,
                remedy="update cascade",
            )
        return Manifest.model_validate(content)
    except ValidationError as error:
        reason = problem_lines(error)[0]
    except ValueError as error:
        reason = f"not JSON: {error}"
    raise IntegrityError(
        "the manifest is damaged",
        value=reason,
        where=where,
        remedy=REPAIR,
    )


def read_manifest(location: Location) -> Manifest | None:
    """The manifest of the artifact here; None means that it is not done. IntegrityError when damaged."""
    place = location / MANIFEST
    try:
        data = place.read_bytes()
    except FileNotFoundError:
        return None
    return parse_manifest(data, str(place))


def artifact_key(kind: str, section: object, inputs: dict[str, str]) -> str:
    """The identity of an artifact before it exists: 64 hex digits; the first 12 name its folder.

    section: the JSON of the recipe section it depends on. inputs: role -> key of the input artifact.
    sha256 of the canonical JSON (sorted, no spaces, ASCII) of these and CODE_SCHEMA.
    """
    identity = {"kind": kind, "section": section, "inputs": inputs, "code_schema": CODE_SCHEMA}
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
