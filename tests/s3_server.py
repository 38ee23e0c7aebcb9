"""A real S3 server for tests: SeaweedFS in one process, on loopback ports nobody else uses."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import TracebackType

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

BUCKET = "cascade-tests"
REGION = "us-east-1"
START_SECONDS = 180.0
SERVICES = ("master", "volume", "filer", "s3", "admin")

# SeaweedFS derives every gRPC port from its HTTP port; below 32768 no outgoing connection takes one.
GRPC_OFFSET = 10_000
HTTP_PORTS = range(12_000, 22_000)

# The kernel kills the server when the thread that started it ends, however the test process ended.
DIE_WITH_PARENT = (
    "import ctypes, os, sys\n"
    "libc = ctypes.CDLL(None)\n"
    "if hasattr(libc, 'prctl'):\n"
    "    libc.prctl(1, 9)\n"
    "if os.getppid() != int(sys.argv[1]):\n"
    "    sys.exit(1)\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)


class S3Server:
    """`weed mini` in `folder`, with one empty bucket; `with` starts it and takes it down.

    Nothing global is touched: a test that wants the server puts `environment` into its own
    environment. Several servers run side by side. RuntimeError (with the end of the server's log)
    when it does not come up.
    """

    bucket = BUCKET

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ports: dict[str, int] = {}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """The URL that S3 clients talk to."""
        return f"http://127.0.0.1:{self._ports['s3']}"

    @property
    def environment(self) -> dict[str, str]:
        """The AWS_* variables of a client that may do everything."""
        return self._variables("writer")

    @property
    def reader_environment(self) -> dict[str, str]:
        """The AWS_* variables of a client that may list and read, and nothing else."""
        return self._variables("reader")

    def _variables(self, identity: str) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": f"{identity}-key",
            "AWS_SECRET_ACCESS_KEY": f"{identity}-secret",
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def __enter__(self) -> S3Server:
        deadline = time.monotonic() + START_SECONDS
        while not self._start(deadline):
            # Another process took one of the ports between our look and the server's bind.
            if time.monotonic() > deadline:
                log = (self.folder / "log").read_text(errors="replace")
                raise RuntimeError(f"SeaweedFS did not start in {START_SECONDS:.0f} s:\n{log[-3000:]}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _start(self, deadline: float) -> bool:
        """Whether a server on freshly chosen ports became ready."""
        self._ports = free_ports()
        with (self.folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", DIE_WITH_PARENT, str(os.getpid()), *self._command()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        while time.monotonic() < deadline and self._process.poll() is None:
            if self._ready():
                return True
            time.sleep(0.1)
        self._stop()
        return False

    def _command(self) -> list[str]:
        data = self.folder / "data"
        data.mkdir(exist_ok=True)
        identities = self.folder / "identities.json"
        identities.write_text(json.dumps({"identities": [_identity("writer"), _identity("reader")]}))
        return [
            str(Path(sysconfig.get_path("scripts")) / "weed"),
            "-logtostderr=true",
            "mini",
            f"-dir={data}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-bucket={BUCKET}",
            *(f"-{service}.port={port}" for service, port in self._ports.items()),
            f"-s3.config={identities}",
            # A wrong bucket has to fail here as it does on AWS.
            "-s3.autoCreateBucket=false",
            "-s3.iam=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-webdav=false",
            "-admin.ui=false",
            "-master.telemetry=false",
        ]

    def _ready(self) -> bool:
        """Whether an object can be written: the S3 port answers before the volume server has joined."""
        client = botocore.session.Session().create_client(
            "s3",
            region_name=REGION,
            endpoint_url=self.endpoint,
            aws_access_key_id="writer-key",
            aws_secret_access_key="writer-secret",
            config=Config(retries={"max_attempts": 0}, connect_timeout=2, read_timeout=5),
        )
        try:
            client.put_object(Bucket=BUCKET, Key="ready", Body=b"ready")
            client.delete_object(Bucket=BUCKET, Key="ready")
        except (BotoCoreError, ClientError):
            return False
        finally:
            client.close()
        return True

    def _stop(self) -> None:
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None
        # SeaweedFS leaves its local sockets behind when it is killed.
        for port in self._ports.values():
            for number in (port, port + GRPC_OFFSET):
                for left in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):
                    left.unlink(missing_ok=True)


def free_ports() -> dict[str, int]:
    """One HTTP port a service such that it and its gRPC port are free on loopback at this moment."""
    # Not the global generator: tests that seed it would all choose the same ports.
    candidates = random.SystemRandom().sample(HTTP_PORTS, len(HTTP_PORTS))
    free = (port for port in candidates if _is_free(port) and _is_free(port + GRPC_OFFSET))
    return dict(zip(SERVICES, free, strict=False))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _identity(name: str) -> dict[str, object]:
    actions = ["Read", "List"] if name == "reader" else ["Admin", "Read", "Write", "List", "Tagging"]
    return {
        "name": name,
        "credentials": [{"accessKey": f"{name}-key", "secretKey": f"{name}-secret"}],
        "actions": actions,
    }
