"""An S3-compatible store of this machine: SeaweedFS, all of it in one process, on the loopback interface."""

from __future__ import annotations

import json
import os
import shutil
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from cascade.errors import CascadeError, InputError
from cascade.stack.ports import GRPC_OFFSET, HOST, found, own_origins
from cascade.stack.processes import Service

REGION = "us-east-1"
USUAL_PORTS = {"s3": 8333, "filer": 8888}
SERVICES = ("s3", "filer", "master", "volume", "admin")
# Variables that would change what it does.
OWN_VARIABLES = ("AWS_", "S3_", "WEED_")
START_SECONDS = 180.0
STOP_SECONDS = 15.0
TRIES = 5
# The same in deploy/compose.yaml.
OPTIONS = (
    # A wrong bucket has to fail here as it does on AWS.
    "-s3.autoCreateBucket=false",
    "-s3.iam=false",
    "-s3.port.iceberg=0",
    "-s3.port.lance=0",
    "-webdav=false",
    "-admin.ui=false",
    "-filer.ui.deleteDir=false",
    "-master.telemetry=false",
)
# The option -filer.allowedOrigins is not heeded by `weed mini`.
ORIGINS = "WEED_CORS_ALLOWED_ORIGINS_VALUES"
EVERYTHING = ("Admin", "Read", "Write", "List", "Tagging")


@dataclass(frozen=True)
class Identity:
    """A key of the store and what it may do: Admin, Read, Write, List, Tagging."""

    name: str
    access_key: str
    secret_key: str = field(repr=False)
    actions: tuple[str, ...] = EVERYTHING

    def record(self) -> dict[str, Any]:
        """As SeaweedFS reads it."""
        keys = {"accessKey": self.access_key, "secretKey": self.secret_key}
        return {"name": self.name, "credentials": [keys], "actions": list(self.actions)}


class Seaweed:
    """`weed mini` in a folder, with one bucket; `with` starts it and takes it down, what is stored stays.

    identities: who may use it, the first one everything. s3_port: 0 for the usual one or any free one.
    log: of the process; a file in the folder when None. Several run side by side in folders of their own.
    Raises InputError when SeaweedFS is not installed, CascadeError (with the end of its log) when it does
    not come up.
    """

    def __init__(
        self,
        folder: Path,
        bucket: str,
        identities: tuple[Identity, ...],
        *,
        s3_port: int = 0,
        usual_ports: bool = True,
        log: Path | None = None,
    ) -> None:
        self.folder, self.bucket, self.identities = folder, bucket, identities
        self.program = weed()
        self.log = log or folder / "log"
        self.ports: dict[str, int] = {}
        self._s3_port, self._usual_ports = s3_port, usual_ports
        self._service: Service | None = None

    @property
    def endpoint(self) -> str:
        """The URL that S3 clients talk to."""
        return f"http://{HOST}:{self.ports['s3']}"

    @property
    def browser(self) -> str:
        """The pattern of the pages that show what is stored, as in CASCADE_BROWSER_URL."""
        return f"http://{HOST}:{self.ports['filer']}/buckets/{{bucket}}/{{prefix}}"

    @property
    def service(self) -> Service:
        """The process, within the block."""
        if self._service is None:
            raise ValueError("the store has not been started")
        return self._service

    def variables(self, identity: Identity) -> dict[str, str]:
        """The AWS_* variables of a client with this key."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": identity.access_key,
            "AWS_SECRET_ACCESS_KEY": identity.secret_key,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def __enter__(self) -> Seaweed:
        deadline = time.monotonic() + START_SECONDS
        # Another process may take one of the ports between our look and the server's bind.
        for left in reversed(range(TRIES)):
            try:
                self._start(deadline)
                break
            except CascadeError:
                if not left or time.monotonic() > deadline:
                    raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._service is None:
            return
        self._stop(self._service)

    def _stop(self, service: Service) -> None:
        service.stop()
        # SeaweedFS leaves its local sockets behind when it is killed.
        for port in self.ports.values():
            for number in (port, port + GRPC_OFFSET):
                for left in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):
                    left.unlink(missing_ok=True)

    def _start(self, deadline: float) -> None:
        """Start a server on freshly chosen ports and wait for it; when that fails, nothing of it is left."""
        self.ports = self._free_ports()
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(OWN_VARIABLES)
        }
        # The bucket's browser asks for no key, so that any page could write through it.
        environment[ORIGINS] = own_origins(self.ports["filer"])
        self._service = Service("SeaweedFS", self._command(), environment, self.log, grace=STOP_SECONDS)
        try:
            self._service.wait_until(self._ready, deadline - time.monotonic())
        except BaseException:
            self._stop(self._service)
            raise

    def _free_ports(self) -> dict[str, int]:
        """An HTTP port for each of its services."""
        usual = USUAL_PORTS if self._usual_ports else {}
        ports = {"s3": self._s3_port} if self._s3_port else {}
        for service in SERVICES:
            if service not in ports:
                ports[service] = found(usual.get(service), ports.values(), pair=True)
        return ports

    def _command(self) -> list[str]:
        data, identities = self.folder / "data", self.folder / "identities.json"
        data.mkdir(exist_ok=True)
        identities.touch(0o600)
        identities.write_text(json.dumps({"identities": [one.record() for one in self.identities]}))
        return [
            self.program,
            "-logtostderr=true",
            "mini",
            f"-dir={data}",
            f"-ip={HOST}",
            f"-ip.bind={HOST}",
            f"-bucket={self.bucket}",
            *(f"-{service}.port={port}" for service, port in self.ports.items()),
            f"-s3.config={identities}",
            *OPTIONS,
        ]

    def _ready(self) -> bool:
        """Whether an object can be written: the S3 port answers before the volume server has joined."""
        first = self.identities[0]
        client = botocore.session.Session().create_client(
            "s3",
            region_name=REGION,
            endpoint_url=self.endpoint,
            aws_access_key_id=first.access_key,
            aws_secret_access_key=first.secret_key,
            config=Config(retries={"max_attempts": 0}, connect_timeout=2, read_timeout=5),
        )
        try:
            client.put_object(Bucket=self.bucket, Key="ready", Body=b"ready")
            client.delete_object(Bucket=self.bucket, Key="ready")
        except (BotoCoreError, ClientError):
            return False
        finally:
            client.close()
        return True


def weed() -> str:
    """The path of SeaweedFS's program; InputError when it is not installed."""
    beside = Path(sysconfig.get_path("scripts")) / "weed"
    program = str(beside) if beside.is_file() else shutil.which("weed")
    if program is None:
        raise InputError(
            "SeaweedFS, the store that `cascade up` starts, is not installed",
            value="weed",
            where="PATH",
            remedy="pip install 'cascade[up]', or use a store that runs: cascade up --store URI",
        )
    return program
