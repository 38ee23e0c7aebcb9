"""The audit: what it finds, and how a line says it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cascade.errors import InputError
from cascade.family.audit import audit
from cascade.storage.artifacts import publish
from cascade.storage.locations import Location, open_location
from cascade.storage.manifest import Draft


@pytest.fixture
def store(tmp_path: Path) -> Location:
    """A store with one family of one artifact."""
    store = open_location(str(tmp_path / "store"))
    work = tmp_path / "work"
    work.mkdir()
    (work / "weights.bin").write_bytes(bytes(100))
    artifact = store / "tiny" / "small" / "pruned" / ("0" * 12)
    publish(work, artifact, Draft(kind="pruned", key="0" * 64, family="tiny", stage="small"))
    write_index(store, [artifact.uri])
    return store


def write_index(store: Location, uris: list[str]) -> None:
    text = json.dumps({"artifacts": [{"uri": uri} for uri in uris]})
    (store / "tiny" / "family.json").write_bytes(text.encode())


def artifact(store: Location) -> Path:
    return Path(store.uri) / "tiny" / "small" / "pruned" / ("0" * 12)


def test_an_intact_store_has_no_problems(store: Location) -> None:
    report = audit(store)
    assert (report.artifacts, report.files, report.problems) == (1, 1, [])


@pytest.mark.parametrize("place", ["", "tiny"])
def test_what_an_index_names_must_exist_seen_from_the_store_or_the_family(
    store: Location, place: str
) -> None:
    lost = f"{store.uri}/shared/corpus/{'1' * 12}"
    write_index(store, [str(artifact(store)), lost])
    report = audit(store / place if place else store)
    assert report.problems == [f"{lost}: the family's index names it, but it has no manifest.json"]


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_damaged_index_is_a_problem_and_the_rest_is_checked(store: Location, text: str) -> None:
    (store / "tiny" / "family.json").write_bytes(text.encode())
    for place in (store, store / "tiny"):
        report = audit(place)
        (line,) = report.problems
        assert line.startswith(f"{store.uri}/tiny: family.json is damaged")
        assert report.artifacts == 1


def test_a_line_names_the_file_once_and_says_what_is_wrong(store: Location) -> None:
    (artifact(store) / "weights.bin").write_bytes(bytes(99))
    (line,) = audit(store).problems
    assert line.startswith(f"{artifact(store)}/weights.bin: ")
    assert line.count(str(store)) == 1
    assert "100 bytes" in line
    assert "99 bytes" in line


def test_a_damaged_manifest_is_one_line_with_its_reason(store: Location) -> None:
    (artifact(store) / "manifest.json").write_text('{"kind": 3}')
    (line,) = audit(store).problems
    assert line.startswith(f"{artifact(store)}/manifest.json: ")
    assert line.count(str(store)) == 1
    assert "kind: " in line


def test_a_place_with_nothing_of_ours_is_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no artifact here"):
        audit(open_location(str(tmp_path)))
