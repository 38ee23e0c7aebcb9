"""The packaged recipe `smoke`: what somebody runs first to see that an installation works."""

from __future__ import annotations

from pathlib import Path

import pytest

from cascade.family.aliases import alias_runs
from cascade.family.index import read_index
from cascade.recipe_files import load_recipe
from cascade.storage.locations import open_location
from tests.e2e.conftest import Command


def test_the_smoke_recipe_needs_no_download() -> None:
    recipe = load_recipe("smoke")
    assert recipe.parent == "random:llama"
    assert [source.path for source in recipe.corpus.sources] == ["embedded"]


@pytest.mark.slow
def test_the_smoke_build_completes_and_becomes_stable(
    prefect_server: str, tmp_path: Path, command: Command
) -> None:
    code, said = command("build", "smoke", "--store", str(tmp_path / "store"))
    assert code == 0, said
    family = open_location(str(tmp_path / "store" / "smoke"))
    index = read_index(family)
    assert [stage["name"] for stage in index["stages"]] == ["large", "small"]
    assert alias_runs(family) == {"latest": index["run"], "stable": index["run"]}
    code, said = command("build", "smoke", "--store", str(tmp_path / "store"))
    assert (code, said.count("reused │")) == (0, 2), said
