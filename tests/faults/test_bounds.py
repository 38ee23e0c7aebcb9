"""What is downloaded is never more than the manifest says, whatever lies in the store."""

from __future__ import annotations

from pathlib import Path

import pytest

from cascade.errors import IntegrityError
from cascade.storage.artifacts import fetch, fetch_file, publish, require_manifest
from cascade.storage.connection import PatientS3
from cascade.storage.locations import Location, open_location
from cascade.storage.manifest import Draft

SIZE = 1000


@pytest.mark.parametrize("moment", ["before it is looked at", "after it was looked at"])
@pytest.mark.parametrize("whole", [True, False], ids=["artifact", "shard"])
def test_an_object_that_has_grown_is_refused_before_it_fills_the_disk(
    whole: bool, moment: str, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, cache, place = tmp_path / "made", tmp_path / "cache", open_location(f"{s3}/x")
    made.mkdir()
    (made / "weights").write_bytes(bytes(SIZE))
    publish(made, place, Draft(kind="pruned", key="ab" * 32, family="tiny", stage="a"))
    # Its beginning differs too: only so much is fetched, and the same beginning would be what was stored.
    (place / "weights").write_bytes(b"\1" * (100 * SIZE))
    if moment.startswith("after"):
        monkeypatch.setattr(Location, "size", lambda location: SIZE)
    largest, original = [0], Path.open

    def measured(path: Path, *arguments: object, **options: object) -> object:
        largest.append(max((file.stat().st_size for file in cache.rglob("weights*")), default=0))
        return original(path, *arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", measured)
    asked: list[int] = []
    fetched = PatientS3._cat_file

    async def counted(
        store: PatientS3, path: str, version_id: None = None, start: int | None = None, end: int | None = None
    ) -> bytes:
        if start is not None and end is not None:
            asked.append(end - start)
        return await fetched(store, path, version_id, start, end)

    monkeypatch.setattr(PatientS3, "_cat_file", counted)

    def bring() -> Path:
        if whole:
            return fetch(place, cache)
        return fetch_file(place, require_manifest(place), "weights", cache / "signals")

    with pytest.raises(IntegrityError, match="not what was stored") as caught:
        bring()
    assert caught.value.where == f"{place.uri}/weights"
    assert max(largest) == (SIZE if moment.startswith("after") else 0)
    if moment.startswith("after"):
        assert asked == [SIZE]
    assert list(cache.rglob("weights*")) == []
