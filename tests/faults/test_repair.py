"""Damage of every kind: named exactly where it is met, found by `verify`, set aside by `repair`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cascade.errors import IntegrityError, NewerVersion, StorageFault
from cascade.family.audit import audit
from cascade.family.repair import repair
from cascade.storage import patience
from cascade.storage.artifacts import fetch, problems, publish
from cascade.storage.locations import Location, open_location
from cascade.storage.manifest import SCHEMA_VERSION, Draft
from tests.e2e.conftest import Command
from tests.faults.proxy import After, Fault, FaultyProxy

SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """A family of two artifacts, one of which is shared, with its index."""
    root = str(tmp_path / "store") if request.param == "folder" else request.getfixturevalue("s3")
    return filled(open_location(root), tmp_path / "work")


def filled(store: Location, work: Path) -> Location:
    """Publish two artifacts and an index that names them."""
    work.mkdir(exist_ok=True)
    for number in (1, 2):
        tensors = {"weight": torch.full((32, 32), float(number))}
        save_file(tensors, work / f"model-0000{number}-of-00002.safetensors")
    for place, kind in ((child(store), "distilled"), (corpus(store), "corpus")):
        publish(work, place, Draft(kind=kind, key="0" * 64, family="tiny", stage="small"))
    index = {"artifacts": [{"uri": child(store).uri}, {"uri": corpus(store).uri}]}
    (store / "tiny" / "family.json").write_bytes(json.dumps(index).encode())
    return store


def child(store: Location) -> Location:
    return store / "tiny" / "small" / "distilled" / ("0" * 12)


def corpus(store: Location) -> Location:
    return store / "shared" / "corpus" / ("0" * 12)


def flipped(place: Location) -> None:
    data = bytearray((place / SHARD).read_bytes())
    data[-1] ^= 1
    (place / SHARD).write_bytes(bytes(data))


def truncated(place: Location) -> None:
    """In the middle of the header."""
    (place / SHARD).write_bytes((place / SHARD).read_bytes()[:20])


def missing(place: Location) -> None:
    (place / SHARD).delete_tree()


def surplus(place: Location) -> None:
    (place / "model-00003-of-00002.safetensors").write_bytes(b"more")


def no_json(place: Location) -> None:
    (place / "manifest.json").write_bytes(b"{")


def newer(place: Location) -> None:
    content = json.loads((place / "manifest.json").read_bytes())
    content["schema_version"] = SCHEMA_VERSION + 1
    (place / "manifest.json").write_bytes(json.dumps(content).encode())


DAMAGES = {
    flipped: "a file is not what was stored",
    truncated: "a file is not what was stored",
    missing: "a file is missing",
    surplus: "a file is not in the manifest",
    no_json: "the manifest is damaged",
}
every_damage = pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
Damage = Callable[[Location], None]


def contents(store: Location) -> dict[str, str]:
    """Digest of every file, what was set aside and locks included."""
    if store.local_path is not None:
        found = [path for path in store.local_path.rglob("*") if path.is_file() and path.suffix != ".lock"]
        return {
            path.relative_to(store.local_path).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in found
        }
    names = store._store.walk(store._path)
    return {name: (store / name).sha256() for name in names}


@every_damage
def test_damage_is_named_at_first_use_and_by_verify(
    store: Location, tmp_path: Path, damage: Damage, command: Command
) -> None:
    whole = (child(store) / SHARD).sha256(), (child(store) / SHARD).size()
    damage(child(store))
    with pytest.raises(IntegrityError, match=DAMAGES[damage]) as caught:
        fetch(child(store), tmp_path / "cache")
    assert "cascade repair" in caught.value.remedy
    code, said = command("verify", str(store))
    assert code == 1
    assert "2 artifacts" in said
    assert "problems: 1" in said
    assert f"`cascade repair {store}`" in said
    name = {surplus: "model-00003-of-00002.safetensors", no_json: "manifest.json"}.get(damage, SHARD)
    line = said.splitlines()[0]
    for text in (str(caught.value), line):
        assert f"{child(store)}/{name}" in text
        assert DAMAGES[damage] in text
        if damage in (flipped, truncated):
            assert whole[0] in text
            assert (child(store) / SHARD).sha256() in text
        if damage is truncated:
            assert f"({whole[1]} bytes)" in text
            assert "(20 bytes)" in text
        if damage is missing:
            assert whole[0] in text


@every_damage
def test_repair_sets_the_damaged_aside_and_touches_nothing_else(
    store: Location, damage: Damage, command: Command, tmp_path: Path
) -> None:
    damage(child(store))
    before = contents(store)
    code, said = command("repair", str(store))
    assert code == 0, said
    after = contents(store)
    assert sorted(after.values()) == sorted(before.values())
    moved = {name for name in before if after.get(name) != before[name]}
    folder = "tiny/small/distilled"
    if damage is surplus:
        assert moved == {f"{folder}/{'0' * 12}/model-00003-of-00002.safetensors"}
        assert "the rest is intact and stays" in said
    else:
        assert moved == {name for name in before if name.startswith(folder)}
        assert f"`cascade build RECIPE --store {store}` with the recipe of family tiny" in said
    (aside,) = {name.split("/")[4] for name in after if "/.damaged/" in name}
    assert aside.endswith(f"Z-{'0' * 12}")
    assert f"{store}/{folder}/.damaged/{aside}" in said
    assert "set aside: 1, left: 0" in said

    filled(store, tmp_path / "work")
    again = contents(store)
    assert after.items() - again.items() <= {("tiny/family.json", after["tiny/family.json"])}
    code, said = command("repair", str(store))
    assert (code, contents(store)) == (0, again)
    assert "2 artifacts, 4 files: nothing is damaged" in said
    assert command("verify", str(store))[0] == 0


def test_a_newer_artifact_is_named_and_left_alone(store: Location, command: Command, tmp_path: Path) -> None:
    newer(child(store))
    with pytest.raises(NewerVersion, match=f"schema version {SCHEMA_VERSION + 1}"):
        fetch(child(store), tmp_path / "cache")
    before = contents(store)
    code, said = command("verify", str(store))
    assert code == 1
    assert f"{child(store)}/manifest.json: the manifest has schema version {SCHEMA_VERSION + 1}" in said
    code, said = command("repair", str(store))
    assert code == 1
    assert "update cascade" in said
    assert contents(store) == before


def test_a_shared_artifact_and_an_index_are_repaired_from_the_family(
    store: Location, command: Command
) -> None:
    flipped(corpus(store))
    code, said = command("repair", f"{store}/tiny")
    assert code == 0, said
    assert f"`cascade build RECIPE --store {store}` with the recipe of a family that uses it" in said
    (store / "tiny" / "family.json").write_bytes(b"{")
    report = repair(store / "tiny")
    assert len(report.moved) == 1
    assert not (store / "tiny" / "family.json").exists()
    assert audit(store / "tiny").problems == []


def test_what_is_not_there_is_for_the_next_build(store: Location, command: Command) -> None:
    child(store).delete_tree()
    code, said = command("repair", str(store))
    assert code == 0, said
    assert f"{child(store)}: there is nothing to set aside" in said
    code, said = command("verify", str(store))
    assert code == 1
    assert said.endswith("the next build makes again what is not there\n")
    assert "cascade repair" not in said


def test_a_second_damage_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    store = filled(open_location(str(tmp_path / "store")), tmp_path / "work")
    for _ in range(3):
        flipped(child(store))
        repair(store)
        filled(store, tmp_path / "work")
    assert sum(SHARD in name for name in contents(store) if ".damaged" in name) == 3


@pytest.mark.parametrize(
    ("damage", "step"),
    [(flipped, 9), *(pytest.param(damage, 2, marks=pytest.mark.slow) for damage in (missing, no_json))],
    ids=["flipped", "missing", "no_json"],
)
def test_a_repair_that_is_cut_off_anywhere_loses_nothing_and_is_finished_by_the_next(
    proxy: FaultyProxy,
    place: Location,
    tmp_path: Path,
    damage: Damage,
    step: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a kill would: after one request, after two, and so on, until it comes to its end."""
    monkeypatch.setenv(patience.SETTING, "0")
    # What comes first reads only.
    for budget in count(16, step):
        store = filled(place / str(budget), tmp_path / "work")
        damage(child(store))
        before = contents(store)
        plan = After(budget, Fault.RESET)
        proxy.plan = plan
        with suppress(StorageFault):
            repair(store)
        proxy.plan = lambda request: Fault.NONE
        kept = contents(store)
        assert set(before.values()) == set(kept.values())
        # Never half of it where a whole one is expected.
        assert not (child(store) / "manifest.json").exists() or problems(child(store))
        repair(store)
        after = contents(store)
        assert set(after.values()) == set(before.values())
        assert child(store).walk() == []
        assert len({name.split("/")[4] for name in after if "/.damaged/" in name}) == 1
        publish(
            tmp_path / "work",
            child(store),
            Draft(kind="distilled", key="0" * 64, family="tiny", stage="small"),
        )
        assert audit(store).problems == []
        if not plan.met:
            break
    assert budget > 20
