"""Storage in S3 buckets through s3fs; endpoint and credentials come from the AWS environment or files."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import s3fs
from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError

from cascade.errors import InputError
from cascade.storage.faults import endpoint, refused, s3_code

# Parts of 32 MiB, 4 at a time: 128 MiB of memory however large the file, and up to 312 GiB in the
# 10,000 parts that S3 allows.
PART_BYTES = 32 * 2**20
PARTS_AT_ONCE = 4

# Seconds and attempts per request. Work is patient: an attempt of s3fs holds three of botocore.
WORK_LIMITS = {
    "connect_timeout": 5,
    "read_timeout": 30,
    "retries": {"total_max_attempts": 3, "mode": "standard"},
}
WORK_ATTEMPTS = 3
# The preflight makes about four requests and must not take minutes.
CHECK_LIMITS = {"connect_timeout": 3, "read_timeout": 8, "retries": {"total_max_attempts": 1}}
CHECK_ATTEMPTS = 1


class S3Store:
    """Objects under `bucket/key` paths."""

    def read(self, path: str) -> bytes:
        """The whole object."""
        return bytes(_connection().cat_file(path))

    def write(self, path: str, data: bytes, create: bool) -> None:
        """One PUT; with `create`, a conditional one."""
        with _create_conflicts():
            _connection().pipe_file(path, data, mode="create" if create else "overwrite")

    def exists(self, path: str) -> bool:
        """Whether there is an object, or one below this prefix."""
        bucket, _, key = path.partition("/")
        if not key:
            return _first_key(bucket, "") is not None
        # Keys are listed in order, so the object itself comes first among those that begin like it.
        return _first_key(bucket, key) == key or _first_key(bucket, f"{key}/") is not None

    def size(self, path: str) -> int:
        """Bytes of the object."""
        return int(_object(path)["size"])

    def age(self, path: str) -> float:
        """Seconds since the object was written."""
        return time.time() - float(_object(path)["LastModified"].timestamp())

    def sha256(self, path: str) -> str:
        """Hex digest, streamed."""
        with _connection().open(path, "rb", block_size=PART_BYTES, cache_type="readahead") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def version(self, path: str) -> str:
        """ETag, time and size."""
        found = _object(path)
        return f"{found['ETag']} {found['LastModified'].isoformat()} {found['size']}"

    def children(self, path: str) -> list[str]:
        """First parts of the keys below the prefix.

        Not a listing by delimiter: SeaweedFS goes on listing prefixes whose last object was deleted.
        """
        return list({key.split("/", 1)[0] for key in self.walk(path)})

    def walk(self, path: str) -> list[str]:
        """Keys below the prefix, relative to it."""
        return [
            key.removeprefix(path + "/")
            for key in _connection().find(path)
            if key.startswith(path + "/") and not key.endswith("/")
        ]

    def upload(self, source: Path, path: str, create: bool) -> None:
        """One PUT, or a multi-part upload for a large file; the object appears when it is complete."""
        with _create_conflicts():
            _connection().put_file(
                str(source),
                path,
                chunksize=PART_BYTES,
                max_concurrency=PARTS_AT_ONCE,
                mode="create" if create else "overwrite",
            )

    def download(self, path: str, target: Path) -> None:
        """Fetch the object in parts."""
        _connection().get_file(path, str(target))

    @contextmanager
    def staged(self, path: str) -> Iterator[Path]:
        """A file in the temporary folder that is uploaded on leaving."""
        with tempfile.TemporaryDirectory(prefix="cascade-") as folder:
            local = Path(folder) / path.rsplit("/", 1)[-1]
            yield local
            self.upload(local, path, create=False)

    def delete_tree(self, path: str) -> None:
        """Delete every object below the prefix."""
        if "/" not in path:
            raise ValueError(f"refusing to empty the bucket {path}")
        connection = _connection()
        for key in connection.find(path):
            with suppress(FileNotFoundError):
                connection.rm_file(key)

    def check(self, path: str, create: bool) -> None:
        """List, then with `create` write a hidden object twice: the second one must be refused."""
        uri = f"s3://{path}"
        _require_valid_endpoint(uri)
        probe = f"{path}/.probe-{uuid.uuid4().hex}"
        try:
            connection = _connect(CHECK_ATTEMPTS)
            bucket, _, prefix = path.partition("/")
            connection.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1)
            if create:
                _require_exclusive_writes(connection, probe, uri)
        except (OSError, BotoCoreError, ClientError) as error:
            raise refused(error, uri) or _unreachable(error, uri) from error


@contextmanager
def _create_conflicts() -> Iterator[None]:
    """FileExistsError for a refused conditional write: stores word that refusal in different ways."""
    try:
        yield
    except OSError as error:
        if s3_code(error) in ("PreconditionFailed", "412"):
            raise FileExistsError(errno.EEXIST, "the object exists already") from error
        raise


def _first_key(bucket: str, prefix: str) -> str | None:
    answer = _connection().call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1)
    return next((str(entry["Key"]) for entry in answer.get("Contents", [])), None)


def _object(path: str) -> dict[str, Any]:
    """What s3fs knows of an object; FileNotFoundError when there is none, though there be a prefix."""
    found: dict[str, Any] = _connection().info(path)
    if found["type"] != "file":
        raise FileNotFoundError(errno.ENOENT, "no such object", path)
    return found


def _connection() -> s3fs.S3FileSystem:
    return _connect(WORK_ATTEMPTS)


def _connect(attempts: int) -> s3fs.S3FileSystem:
    """The connection of this process with today's AWS_* variables."""
    settings = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    return _connect_once(os.getpid(), settings, attempts)


@lru_cache(maxsize=4)
def _connect_once(process: int, settings: tuple[tuple[str, str], ...], attempts: int) -> s3fs.S3FileSystem:
    """A connection, kept for the process (s3fs does not survive a fork) and the variables it was made with.

    s3fs keeps instances too, but by their arguments alone: it would go on with credentials that have
    been replaced in the environment.
    """
    connection = s3fs.S3FileSystem(
        skip_instance_cache=True,
        # Another process may write at any time: what was listed before says nothing.
        use_listings_cache=False,
        default_block_size=PART_BYTES,
        max_concurrency=PARTS_AT_ONCE,
        config_kwargs=CHECK_LIMITS if attempts == CHECK_ATTEMPTS else WORK_LIMITS,
    )
    connection.retries = attempts
    return connection


def _require_valid_endpoint(uri: str) -> None:
    """botocore says ValueError to a URL without a scheme, and calls a password in it a network fault."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        url = os.environ.get(name, "")
        parts = urlsplit(url)
        if url and (parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc):
            raise InputError(
                f"{name} is not the plain URL of a service",
                value=url.rpartition("@")[2],
                where=f"environment, for {uri}",
                remedy="write it as http://host:port or https://host, without a user or password",
            )


def _require_exclusive_writes(connection: s3fs.S3FileSystem, probe: str, uri: str) -> None:
    """Write an object, see a second create refused, remove it."""
    connection.pipe_file(probe, b"probe", mode="create")
    try:
        with _create_conflicts():
            connection.pipe_file(probe, b"probe", mode="create")
    except FileExistsError:
        return
    finally:
        connection.rm_file(probe)
    raise InputError(
        "the store overwrites where it was told to create, so two builders could damage each other",
        value=uri,
        where=endpoint(),
        remedy="use a store with conditional writes (If-None-Match), such as Amazon S3, SeaweedFS or MinIO",
    )


def _unreachable(error: BaseException, uri: str) -> InputError:
    """For the preflight, anything else means that no S3 service answers at this endpoint."""
    if isinstance(error, ConnectionError | HTTPClientError | TimeoutError):
        what, remedy = "the store cannot be reached", "start the service, or correct AWS_ENDPOINT_URL"
    else:
        what = f"the endpoint does not answer like S3 ({s3_code(error) or type(error).__name__})"
        remedy = "correct AWS_ENDPOINT_URL: it has to be the S3 port of the service"
    return InputError(what, value=uri, where=endpoint(), remedy=remedy)
