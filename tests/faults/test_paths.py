"""No name in a manifest, an index or a bucket leads out of the folder it belongs to."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cascade.data.files import download_s3
from cascade.errors import InputError, IntegrityError
from cascade.models.sources import resolve_parent
from cascade.storage import artifacts, s3
from cascade.storage.artifacts import fetch, fetch_file, problems, publish, require_manifest
from cascade.storage.locations import Location, open_location
from cascade.storage.manifest import Draft, encode_manifest, parse_manifest
from tests.tiny import make_parent

DRAFT = Draft(kind="pruned", key="ab" * 32, family="tiny", stage="a")
OUTSIDE = [
    "/etc/passwd",
    "../outside",
    "a/../../outside",
    "a/..",
    ".",
    "",
    "a//b",
    "a/",
    "..\\outside",
    "C:\\outside",
    "C:outside",
    "\\\\server\\share",
    "file:stream",
    "nul\0byte",
    "line\nbreak",
    "escape\x1b[2J",
    ".hidden",
    "a/.git/config",
    "manifest.json",
]


@pytest.fixture
def artifact(tmp_path: Path) -> Location:
    """A finished artifact in a folder, with one file."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work/weights").write_text("weights")
    place = open_location(str(tmp_path / "store/tiny/a/pruned/abababababab"))
    publish(tmp_path / "work", place, DRAFT)
    artifacts._verified.clear()
    return place


def renamed(artifact: Location, *paths: str) -> bytes:
    """The artifact's manifest, with these names for its one file."""
    tree = json.loads(encode_manifest(require_manifest(artifact)))
    (record,) = tree["files"].values()
    return json.dumps({**tree, "files": dict.fromkeys(paths, record)}).encode()


@pytest.mark.parametrize("path", OUTSIDE)
def test_a_manifest_names_only_files_inside(artifact: Location, path: str, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="not a relative path inside"):
        parse_manifest(renamed(artifact, path), "here")
    (artifact / "manifest.json").write_bytes(renamed(artifact, path))
    with pytest.raises(IntegrityError, match="damaged"):
        fetch(artifact, tmp_path / "cache")
    assert len(problems(artifact)) == 1


@pytest.mark.parametrize(
    "paths", [("a", "a/b"), ("a/b/c", "a"), ("caf\u00e9", "cafe\u0301"), ("Weights", "weights")]
)
def test_names_that_cannot_lie_beside_each_other_are_refused(
    artifact: Location, paths: tuple[str, ...]
) -> None:
    with pytest.raises(IntegrityError, match=r"one name on some systems|is a file, and the folder of"):
        parse_manifest(renamed(artifact, *paths), "here")


@pytest.mark.parametrize(
    "paths", [("a", "b"), ("ab", "a/b"), ("tokenizer.json", "chat/x.jinja"), ("caf\u00e9",)]
)
def test_other_names_are_not(artifact: Location, paths: tuple[str, ...]) -> None:
    assert set(parse_manifest(renamed(artifact, *paths), "here").files) == set(paths)


@pytest.mark.parametrize("whole", [True, False], ids=["artifact", "shard"])
def test_a_link_out_of_an_artifact_is_damage_though_its_content_is_right(
    artifact: Location, whole: bool, tmp_path: Path
) -> None:
    """Whoever may write where it leads could change the weights after they were hashed."""
    path = Path(artifact.uri) / "weights"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")

    def use() -> Path:
        if whole:
            return fetch(artifact, tmp_path)
        return fetch_file(artifact, require_manifest(artifact), "weights", tmp_path)

    with pytest.raises(IntegrityError, match="leads out of the artifact") as caught:
        use()
    assert str(path) in caught.value.where
    assert "leads out" in problems(artifact)[0]


def test_a_link_to_a_folder_out_of_an_artifact_is_no_part_of_it(artifact: Location, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/weights").write_text("weights")
    (Path(artifact.uri) / "a").symlink_to(tmp_path / "elsewhere")
    (artifact / "manifest.json").write_bytes(renamed(artifact, "weights", "a/weights"))
    assert "a/weights: a file is missing" in problems(artifact)[0]


def test_a_store_that_itself_lies_behind_a_link_is_like_any_other(artifact: Location, tmp_path: Path) -> None:
    os.symlink(tmp_path / "store", tmp_path / "link")
    assert problems(open_location(str(tmp_path / "link/tiny/a/pruned/abababababab"))) == []


@pytest.mark.parametrize(
    "name", ["../outside.jsonl", "a/../../outside.jsonl", "/outside.jsonl", "a//b.jsonl", "x/./y.jsonl"]
)
def test_an_object_whose_name_leads_out_is_never_downloaded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key of a bucket may hold anything; most servers refuse these, and the next one may not."""
    monkeypatch.setattr(s3.S3Store, "walk", lambda store, path: [name])
    monkeypatch.setattr(s3.S3Store, "download", lambda store, path, target, size: target.write_text("{}"))
    (tmp_path / "inside").mkdir()
    with pytest.raises(InputError, match=r"leads out of it|no corpus file"):
        download_s3("s3://bucket/corpus", tmp_path / "inside")
    assert os.listdir(tmp_path) == ["inside"]
    assert os.listdir(tmp_path / "inside") == []


def test_objects_of_which_one_is_the_folder_of_another_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3.S3Store, "walk", lambda store, path: ["a.jsonl", "a.jsonl/b.jsonl"])
    monkeypatch.setattr(s3.S3Store, "download", lambda store, path, target, size: target.write_text("{}"))
    with pytest.raises(InputError, match="in the way"):
        download_s3("s3://bucket/corpus", tmp_path)


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside"])
def test_a_pattern_that_leads_into_an_artifact_of_a_package_does_not_lead_out(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`package:NAME/FILE` stays inside the package."""
    (tmp_path / "carrier_of_weights").mkdir()
    (tmp_path / "carrier_of_weights/__init__.py").touch()
    make_parent(tmp_path / "outside")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="has no"):
        resolve_parent(f"package:carrier_of_weights/{name}", cache=tmp_path / "cache")


@pytest.mark.parametrize(
    "name", ["../other/model.safetensors", "/etc/passwd", "a/model.safetensors", "..", ""]
)
def test_an_index_of_weights_names_only_files_beside_it(name: str, tiny_parent: Path, tmp_path: Path) -> None:
    """What lies elsewhere is not in the parent's fingerprint, so it could change unnoticed."""
    parent = make_parent(tmp_path / "parent")
    (tmp_path / "other").mkdir()
    (tmp_path / "parent/model.safetensors").rename(tmp_path / "other/model.safetensors")
    (parent / "some.safetensors").write_bytes((tiny_parent / "model.safetensors").read_bytes())
    index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
    (parent / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"file beside it|it is missing") as caught:
        resolve_parent(str(parent), cache=tmp_path / "cache")
    assert caught.value.remedy
