"""Every storage test runs against a folder and against a real S3 server."""

from __future__ import annotations

from pathlib import Path

import pytest

from cascade.storage.locations import Location, open_location
from cascade.storage.manifest import Draft, artifact_key


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """An empty place in a store."""
    if request.param == "folder":
        return open_location(str(tmp_path / "store"))
    return open_location(request.getfixturevalue("s3"))


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A finished work folder: two files, one of them nested, and a hidden one."""
    folder = tmp_path / "work"
    (folder / "nested").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "nested" / "weights.bin").write_bytes(bytes(range(256)) * 40)
    (folder / ".cache").write_text("not part of it")
    return folder


@pytest.fixture
def draft() -> Draft:
    """What the maker of the artifact says about it."""
    return Draft(
        kind="pruned",
        key=artifact_key("pruned", {"ratio": 0.85}, {"parent": "0" * 64}),
        family="tiny",
        stage="first",
        facts={"held_out_ce": 3.25},
    )
