"""Manifests: read back as written, refused when damaged, unsafe or newer; keys are stable identities."""

from __future__ import annotations

import hashlib
import json

import pytest

from cascade.errors import CascadeError, IntegrityError
from cascade.storage.locations import Location
from cascade.storage.manifest import (
    Draft,
    FileRecord,
    Manifest,
    artifact_key,
    encode_manifest,
    parse_manifest,
    read_manifest,
)

RECORD = FileRecord(sha256="a" * 64, size=3)


def finished(draft: Draft, path: str = "config.json") -> Manifest:
    """A manifest with one file."""
    return Manifest(**dict(draft), files={path: RECORD}, bytes=3, created="2026-01-01T00:00:00+00:00")


def test_a_manifest_is_read_back_as_written(draft: Draft, store: Location) -> None:
    manifest = finished(draft)
    assert read_manifest(store) is None
    (store / "manifest.json").write_bytes(encode_manifest(manifest))
    assert read_manifest(store) == manifest


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "", "a//b", "manifest.json", "."])
def test_unsafe_paths_are_refused(draft: Draft, path: str) -> None:
    content = json.loads(encode_manifest(finished(draft)))
    content["files"] = {path: content["files"]["config.json"]}
    with pytest.raises(IntegrityError, match="not a relative path inside"):
        parse_manifest(json.dumps(content).encode(), "s3://b/x/manifest.json")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"kind": "pruned"}'])
def test_damage_is_named_with_its_place(data: bytes) -> None:
    with pytest.raises(IntegrityError, match="damaged") as caught:
        parse_manifest(data, "s3://b/x/manifest.json")
    assert caught.value.where == "s3://b/x/manifest.json"
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("seconds", ["inf", "9" * 400])
def test_a_figure_that_becomes_infinite_is_damage(draft: Draft, seconds: str) -> None:
    content = json.loads(encode_manifest(finished(draft)))
    with pytest.raises(IntegrityError, match="seconds: a finite number is needed"):
        parse_manifest(json.dumps(content | {"seconds": seconds}).encode(), "here")


def test_a_newer_schema_names_both_versions(draft: Draft) -> None:
    content = json.loads(encode_manifest(finished(draft)))
    content |= {"schema_version": 7, "something": "new"}
    with pytest.raises(IntegrityError, match=r"schema version 7; this cascade reads up to 2"):
        parse_manifest(json.dumps(content).encode(), "here")


def test_a_fact_without_json_form_is_refused(draft: Draft) -> None:
    with pytest.raises(CascadeError, match="JSON"):
        encode_manifest(finished(draft).model_copy(update={"facts": {"loss": float("nan")}}))


def test_the_key_depends_on_content_alone() -> None:
    key = artifact_key("pruned", {"ratio": 0.85, "axes": ["ffn"]}, {"parent": "p", "scores": "s"})
    assert key == artifact_key("pruned", {"axes": ["ffn"], "ratio": 0.85}, {"scores": "s", "parent": "p"})
    assert len(key) == 64
    others = {
        artifact_key("distilled", {"ratio": 0.85, "axes": ["ffn"]}, {"parent": "p", "scores": "s"}),
        artifact_key("pruned", {"ratio": 0.84, "axes": ["ffn"]}, {"parent": "p", "scores": "s"}),
        artifact_key("pruned", {"ratio": 0.85, "axes": ["ffn"]}, {"parent": "s", "scores": "p"}),
        key,
    }
    assert len(others) == 4


def test_the_key_carries_the_code_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    before = artifact_key("pruned", {}, {})
    monkeypatch.setattr("cascade.storage.manifest.CODE_SCHEMA", 2)
    assert artifact_key("pruned", {}, {}) != before


def test_the_key_is_pinned() -> None:
    """A changed key rebuilds every family in the world: it may change only with CODE_SCHEMA."""
    canonical = b'{"code_schema":1,"inputs":{},"kind":"corpus","section":{"a":1}}'
    assert artifact_key("corpus", {"a": 1}, {}) == hashlib.sha256(canonical).hexdigest()
