"""`cascade build --compile`: the same family but for rounding, and a refusal where none can be compiled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cascade.family.index import read_index
from cascade.storage.locations import open_location
from tests.e2e.conftest import Command
from tests.tiny_family import tiny_tree, write_recipe

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


@pytest.fixture
def recipe_file(tiny_parent: Path, tiny_corpus: Path, tmp_path: Path) -> str:
    tree = tiny_tree(tiny_parent, tiny_corpus)
    tree["stages"] = tree["stages"][1:]
    return str(write_recipe(tmp_path / "tiny.yaml", tree))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_family_is_built_and_found_again_without_the_option(
    recipe_file: str, tmp_path: Path, command: Command
) -> None:
    store = str(tmp_path / "store")
    code, said = command("build", recipe_file, "--store", store, "--direct", "--compile")
    assert code == 0, said
    assert "compiles the student's layers" in said
    (stage,) = read_index(open_location(store) / "tiny")["stages"]
    assert 0 < stage["kl_to_parent"] < stage["pruned_kl_to_parent"]
    code, said = command("build", recipe_file, "--store", store, "--direct")
    assert code == 0, said
    (again,) = read_index(open_location(store) / "tiny")["stages"]
    assert again["reused"]
    assert again["checkpoint"] == stage["checkpoint"]


def test_without_a_compiler_nothing_is_started(recipe_file: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    done = subprocess.run(
        [sys.executable, "-m", "cascade.cli", "build", recipe_file, "--store", str(store), "--compile"],
        env={**os.environ, "CXX": "/nonexistent", "CASCADE_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "error: torch.compile does not work here" in done.stderr
    for part in ("value: ", "where: --compile on ", "way out: leave --compile out"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert not store.exists() or not any(store.iterdir())
