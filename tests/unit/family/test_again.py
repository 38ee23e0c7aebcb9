"""What is made again is set aside once, however often the rebuild starts from the top."""

from __future__ import annotations

from pathlib import Path

from cascade.family.again import set_aside
from cascade.storage.artifacts import publish, read_manifest
from cascade.storage.locations import Location, open_location
from cascade.storage.manifest import Draft

PLACE = f"tiny/small/pruned/{'0' * 12}"


def make(store: Location, tmp_path: Path, run: str) -> None:
    work = tmp_path / run
    work.mkdir()
    draft = Draft(kind="pruned", key="0" * 64, family="tiny", stage="small", run=run)
    publish(work, store / PLACE, draft)


def test_what_the_rebuild_itself_has_made_stays(tmp_path: Path) -> None:
    store = open_location(str(tmp_path / "store"))
    make(store, tmp_path, "first")
    wanted = {PLACE: "first"}
    assert len(set_aside(wanted, store)) == 1
    assert read_manifest(store / PLACE) is None
    make(store, tmp_path, "again")
    assert set_aside(wanted, store) == []
    manifest = read_manifest(store / PLACE)
    assert manifest is not None
    assert manifest.run == "again"
