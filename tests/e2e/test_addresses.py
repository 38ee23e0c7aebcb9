"""What `cascade show` makes of an address that is near a family, and `cascade --version`."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest

from cascade.family.addresses import NAMED
from cascade.storage.artifacts import publish
from cascade.storage.locations import open_location
from cascade.storage.manifest import Draft
from tests.e2e.conftest import Command

KEY = "0" * 12
CHILD = f"tiny/small/pruned/{KEY}"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Two families, one of them with an artifact."""
    store, work = tmp_path / "store", tmp_path / "work"
    work.mkdir()
    (work / "weights.bin").write_bytes(bytes(100))
    draft = Draft(kind="pruned", key="0" * 64, family="tiny", stage="small")
    publish(work, open_location(str(store / CHILD)), draft)
    for family in ("other", "tiny"):
        (store / family).mkdir(exist_ok=True)
        (store / family / "family.json").write_text(json.dumps({"family": family}))
    return store


@pytest.mark.parametrize(
    ("place", "shown"),
    [
        ("tiny/family.json", {"family": "tiny"}),
        (f"{CHILD}/manifest.json", {"family": "tiny", "stage": "small", "kind": "pruned"}),
        (f"{CHILD}/weights.bin", {"family": "tiny", "stage": "small", "kind": "pruned"}),
    ],
)
def test_a_file_is_shown_as_its_folder(
    store: Path, command: Command, place: str, shown: dict[str, str]
) -> None:
    answers = [command("show", str(path), "--json") for path in (store / place, (store / place).parent)]
    assert answers[0] == answers[1]
    code, said = answers[0]
    assert code == 0
    assert shown.items() <= json.loads(said).items()


@pytest.mark.parametrize(
    ("place", "right", "what"),
    [
        ("tiny/small", "tiny", "family"),
        ("tiny/small/pruned", "tiny", "family"),
        ("tiny/small/pruned/1234", "tiny", "family"),
        ("tiny/no-such-stage", "tiny", "family"),
        (f"{CHILD}/no-such-file", CHILD, "artifact"),
    ],
)
def test_a_place_within_a_family_names_the_address_that_can_be_shown(
    store: Path, command: Command, place: str, right: str, what: str
) -> None:
    code, said = command("show", str(store / place))
    assert code == 2
    assert f"give {store / right}, the {what} that it belongs to" in said


def test_a_store_names_its_families(store: Path, command: Command) -> None:
    code, said = command("show", str(store))
    assert code == 2
    assert f"give one of its families: {store}/other, {store}/tiny\n" in said
    for number in range(NAMED):
        (store / f"a{number}").mkdir()
        (store / f"a{number}" / "family.json").write_text("{}")
    _, said = command("show", str(store))
    assert f"{store}/a4 (and 2 more)" in said
    assert "other" not in said


def test_elsewhere_nothing_is_made_up(tmp_path: Path, command: Command) -> None:
    code, said = command("show", str(tmp_path / "nowhere"))
    assert code == 2
    assert "give <root>/<family>, or the folder of an artifact" in said


def test_the_version_is_that_of_the_package(command: Command) -> None:
    assert command("--version") == (0, f"cascade {version('cascade')}\n")
