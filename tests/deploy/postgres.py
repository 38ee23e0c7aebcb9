"""A real PostgreSQL for a test: Debian's package, a cluster in a folder, on loopback, never as root."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from pathlib import Path
from types import TracebackType

from cascade.stack.ports import HOST, found

PACKAGE = "postgresql"
PASSWORD = "p@ss/word"


def programs() -> Path | None:
    """Where Debian keeps initdb and pg_ctl; None when there are none."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return folders[-1] if folders else None


class Postgres:
    """A server with the empty database `prefect` in `folder`; `with` starts it and takes it down."""

    def __init__(self, folder: Path) -> None:
        place = programs()
        if place is None:
            raise FileNotFoundError(f"no PostgreSQL: apt-get install {PACKAGE}")
        self.programs, self.folder, self.port = place, folder, found(None)
        # It refuses to run as root; the package makes this user.
        self.user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name

    @property
    def environment(self) -> dict[str, str]:
        """The variables of a Prefect server that uses it, named as in the compose file."""
        return {
            "PREFECT_SERVER_DATABASE_DRIVER": "postgresql+asyncpg",
            "PREFECT_SERVER_DATABASE_HOST": HOST,
            "PREFECT_SERVER_DATABASE_PORT": str(self.port),
            "PREFECT_SERVER_DATABASE_USER": "prefect",
            "PREFECT_SERVER_DATABASE_NAME": "prefect",
            "PREFECT_SERVER_DATABASE_PASSWORD": PASSWORD,
        }

    def __enter__(self) -> Postgres:
        self.folder.mkdir(parents=True)
        if os.geteuid() == 0:
            shutil.chown(self.folder, self.user)
        secret = self.folder / "password"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        data = self.folder / "data"
        self.run(
            *("initdb", "--pgdata", data, "--username", "prefect", "--pwfile", secret),
            *("--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C"),
        )
        options = f"-c listen_addresses={HOST} -c port={self.port} -c unix_socket_directories="
        log = self.folder / "log"
        self.run("pg_ctl", "start", "--wait", "--pgdata", data, "--log", log, "--options", options)
        self.query("CREATE DATABASE prefect")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.run("pg_ctl", "stop", "--wait", "--mode", "immediate", "--pgdata", self.folder / "data")

    def query(self, text: str, database: str = "postgres") -> str:
        """What psql prints for a statement, a row a line."""
        address = ("--host", HOST, "--port", str(self.port), "--username", "prefect", "--dbname", database)
        return self.run("psql", *address, "--tuples-only", "--no-align", "--command", text)

    def healthy(self, check: list[str]) -> bool:
        """Whether compose's health check, `pg_isready` with its options, is content."""
        program, *options = check
        asked = [self.programs / program, *options, "--port", str(self.port)]
        return subprocess.run(asked, capture_output=True, check=False).returncode == 0

    def run(self, program: str, *arguments: str | Path) -> str:
        """The output of one of its programs; CalledProcessError with what it said when it fails."""
        done = subprocess.run(
            [self.programs / program, *arguments],
            user=self.user if os.geteuid() == 0 else None,
            env={"PGPASSWORD": PASSWORD, "PATH": os.environ["PATH"]},
            cwd="/",
            # pg_ctl's server would keep a pipe open.
            stdout=subprocess.PIPE if program == "psql" else subprocess.DEVNULL,
            stderr=None,
            text=True,
            check=True,
        )
        return done.stdout or ""
