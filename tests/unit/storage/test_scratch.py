"""Scratch folders: those of the living stay, those of the dead go."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from cascade.storage.scratch import FOLDER, scratch_folder, temporary_files_in

HOLDER = """
    import sys, time
    from pathlib import Path
    from cascade.storage.scratch import scratch_folder
    with scratch_folder(Path(sys.argv[1]), "killed") as folder:
        (folder / "weights").write_bytes(b"weights")
        print("made", flush=True)
        time.sleep(600)
"""


def test_folders_of_the_living_stay_and_of_the_dead_go(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    process.stdout.readline()
    with scratch_folder(tmp_path, "own"):
        assert len(list(tmp_path.glob(f"{FOLDER}/killed-*/files/weights"))) == 1
    process.kill()
    process.communicate()
    (tmp_path / FOLDER / "never-locked").mkdir()
    with scratch_folder(tmp_path, "own") as folder:
        assert [path.name for path in (tmp_path / FOLDER).iterdir()] == [folder.parent.name]
    assert list((tmp_path / FOLDER).iterdir()) == []


@pytest.mark.parametrize("removed", range(5))
def test_one_that_is_killed_while_it_removes_its_folder_leaves_nothing_either(
    removed: int, tmp_path: Path
) -> None:
    """After none, some or all of: its two files, the folder around them, the lock."""
    script = f"""
import os, signal, sys
from pathlib import Path
from cascade.storage.scratch import scratch_folder

def dying(kind):
    original = getattr(os, kind)
    def remove(*arguments, **options):
        removed.pop() if removed else os.kill(os.getpid(), signal.SIGKILL)
        original(*arguments, **options)
    setattr(os, kind, remove)

removed = [None] * {removed}
with scratch_folder(Path(sys.argv[1]), "killed") as folder:
    (folder / "a").write_bytes(b"a")
    (folder / "b").write_bytes(b"b")
    dying("unlink"), dying("rmdir")
"""
    died = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert died.returncode == -signal.SIGKILL
    assert list((tmp_path / FOLDER).iterdir()) != []
    with scratch_folder(tmp_path, "own"):
        pass
    assert list((tmp_path / FOLDER).iterdir()) == []


def test_a_failure_removes_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), scratch_folder(tmp_path, "own"):
        raise ZeroDivisionError
    assert list((tmp_path / FOLDER).iterdir()) == []


def test_what_is_no_scratch_folder_stays(tmp_path: Path) -> None:
    (tmp_path / FOLDER / "somebodys").mkdir(parents=True)
    (tmp_path / FOLDER / "somebodys" / "file").write_bytes(b"")
    (tmp_path / FOLDER / "file").write_bytes(b"")
    with scratch_folder(tmp_path, "own"):
        pass
    assert (tmp_path / FOLDER / "somebodys" / "file").exists()
    assert (tmp_path / FOLDER / "file").exists()


def test_temporary_files_lie_there(tmp_path: Path) -> None:
    before = tempfile.gettempdir()
    with temporary_files_in(tmp_path), tempfile.NamedTemporaryFile() as file:
        assert Path(file.name).parent == tmp_path
    assert tempfile.gettempdir() == before
