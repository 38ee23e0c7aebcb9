"""The folder of a local stack: its database, its objects, its keys and logs, and who runs in it."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shlex
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cascade.errors import InputError
from cascade.stack.seaweed import Identity

NAME = "cascade"
# Variables of the shell that would lead a client elsewhere or past the keys.
MISLEADING = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_REGION")


def default_home() -> Path:
    """`~/.cascade`."""
    return Path.home() / ".cascade"


@dataclass(frozen=True)
class Home:
    """A folder; what is in it survives a restart, and only its owner reads it, wherever the folder lies."""

    path: Path

    @property
    def prefect(self) -> Path:
        """Of the Prefect server: its SQLite database and settings."""
        return self._folder("prefect")

    @property
    def store(self) -> Path:
        """Of SeaweedFS: the objects."""
        return self._folder("store")

    def log(self, name: str) -> Path:
        """Of a process, since it was started last; of the time before, `<name>.log.1`."""
        return self.logs / f"{name}.log"

    @property
    def logs(self) -> Path:
        """Of all processes."""
        return self._folder("logs")

    @property
    def identity(self) -> Identity:
        """The store's key, made at the first start."""
        path = self.path / "keys.json"
        if not path.exists():
            keys = {"access_key": secrets.token_hex(10), "secret_key": secrets.token_hex(20)}
            write_private(path, json.dumps(keys))
        return Identity(NAME, **json.loads(path.read_text()))

    def write_environment(self, variables: Mapping[str, str]) -> Path:
        """A file for `source`: what another shell needs to reach the server and the store; its path."""
        lines = [f"unset {' '.join(MISLEADING)}"] if "AWS_ACCESS_KEY_ID" in variables else []
        lines += [f"export {name}={shlex.quote(value)}" for name, value in sorted(variables.items())]
        # Where `cascade` and `prefect` are.
        lines.append(f'export PATH={shlex.quote(sysconfig.get_path("scripts"))}:"$PATH"')
        path = self.path / "env"
        write_private(path, "\n".join(lines) + "\n")
        return path

    def _folder(self, name: str) -> Path:
        path = self.path / name
        path.mkdir(mode=0o700, exist_ok=True)
        # One of an earlier version, or copied: others could read the database.
        if path.stat().st_uid == os.geteuid():
            path.chmod(0o700)
        return path


@contextmanager
def opened(path: Path) -> Iterator[Home]:
    """The home, made if it is missing; InputError if it cannot be, or somebody runs in it already."""
    path = path.expanduser().absolute()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (path / "lock").open("w")
    except OSError as error:
        raise InputError(
            f"the stack's folder cannot be used: {error.strerror}",
            value=path,
            where="--home",
            remedy="give a folder that you may write to",
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                "a stack runs in this folder already",
                value=path,
                where="--home",
                remedy="use it or stop it, or give another folder",
            ) from None
        yield Home(path)


def write_private(path: Path, text: str) -> None:
    """Replace a file that only its owner may read."""
    new = path.with_suffix(".new")
    new.unlink(missing_ok=True)
    new.touch(0o600)
    new.write_text(text)
    new.replace(path)
