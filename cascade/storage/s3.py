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
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError

from cascade.errors import InputError
from cascade.storage.connection import PART_BYTES, PARTS_AT_ONCE, PatientS3, connect
from cascade.storage.faults import KeepsFailing, client_error, endpoint, refused, s3_code
from cascade.storage.listing import Entry

# Names the call that wrote an object, in its metadata: a repeated request is refused although its first try
# was done and only the answer was lost.
WRITER = "cascade-writer"
TAKEN = ("PreconditionFailed", "412")
NO_UPLOAD = "NoSuchUpload"


class S3Store:
    """Objects under `bucket/key` paths."""

    def read(self, path: str) -> bytes:
        """The whole object."""
        return bytes(connect().cat_file(path))

    def write(self, path: str, data: bytes, create: bool) -> None:
        """One PUT; with `create`, a conditional one."""
        with _written(connect(), path) as mark:
            connect().pipe_file(path, data, mode="create" if create else "overwrite", **mark)

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
        digest = hashlib.sha256()
        for part in _parts(path):
            digest.update(part)
        return digest.hexdigest()

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
            for key in connect().find(path)
            if key.startswith(path + "/") and not key.endswith("/")
        ]

    def listing(self, path: str) -> list[Entry]:
        """All objects below the prefix."""
        return [
            Entry(key.removeprefix(path + "/"), int(found["size"]), found["LastModified"].timestamp())
            for key, found in connect().find(path, detail=True).items()
            if key.startswith(path + "/") and found["type"] == "file"
        ]

    def upload(self, source: Path, path: str, create: bool) -> None:
        """One PUT, or a multi-part upload for a large file; the object appears when it is complete."""
        with _written(connect(), path) as mark:
            connect().put_file(
                str(source),
                path,
                chunksize=PART_BYTES,
                max_concurrency=PARTS_AT_ONCE,
                mode="create" if create else "overwrite",
                **mark,
            )

    def download(self, path: str, target: Path, size: int | None) -> None:
        """Fetch the object in parts; of one that is larger than `size` only so much."""
        with target.open("wb") as stream:
            stream.writelines(_parts(path, size))

    @contextmanager
    def staged(self, path: str) -> Iterator[Path]:
        """A file in the temporary folder that is uploaded on leaving."""
        with tempfile.TemporaryDirectory(prefix="cascade-") as folder:
            local = Path(folder) / path.rsplit("/", 1)[-1]
            yield local
            self.upload(local, path, create=False)

    def move(self, path: str, target: str) -> None:
        """Copy in the store, then delete."""
        connect().cp_file(path, target)
        connect().rm_file(path)

    def delete_tree(self, path: str) -> None:
        """Delete every object below the prefix."""
        if "/" not in path:
            raise ValueError(f"refusing to empty the bucket {path}")
        connection = connect()
        for key in connection.find(path):
            with suppress(FileNotFoundError):
                connection.rm_file(key)

    def provide(self, path: str) -> bool:
        """Make the bucket if there is none; InputError if that is refused or nobody answers."""
        uri = f"s3://{path}"
        _require_valid_endpoint(uri)
        try:
            return _made_bucket(connect(check=True), path.partition("/")[0])
        except (OSError, BotoCoreError, ClientError) as error:
            if isinstance(error, KeepsFailing) and client_error(error.__cause__):
                raise
            raise refused(error, uri) or _unreachable(error.__cause__ or error, uri) from error

    def check(self, path: str, create: bool, wait: bool) -> None:
        """List, then with `create` write a hidden object twice: the second one must be refused."""
        uri = f"s3://{path}"
        _require_valid_endpoint(uri)
        try:
            connection = connect(check=not wait)
            bucket, _, prefix = path.partition("/")
            connection.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1)
            if create:
                _require_exclusive_writes(connection, f"{path}/.probe-{uuid.uuid4().hex}", uri)
        except (OSError, BotoCoreError, ClientError) as error:
            if isinstance(error, KeepsFailing) and (wait or client_error(error.__cause__)):
                raise
            raise refused(error, uri) or _unreachable(error.__cause__ or error, uri) from error


@contextmanager
def _written(connection: PatientS3, path: str) -> Iterator[dict[str, Any]]:
    """Around one call that writes; it takes what this yields along.

    A refusal of our own repeated request is none. FileExistsError for a refused conditional write, which
    stores word in different ways.
    """
    writer = uuid.uuid4().hex
    try:
        yield {"Metadata": {WRITER: writer}}
    except OSError as error:
        code = s3_code(error)
        if code not in (*TAKEN, NO_UPLOAD):
            raise
        if _writer(connection, path) == writer:
            return
        if code == NO_UPLOAD:
            raise OSError(errno.EIO, "the store has lost the parts of an upload") from error
        raise FileExistsError(errno.EEXIST, "the object exists already") from error


def _writer(connection: PatientS3, path: str) -> str:
    """Which call wrote the object; "" when that is not known, or there is none."""
    bucket, _, key = path.partition("/")
    try:
        found = connection.call_s3("head_object", Bucket=bucket, Key=key)
    except FileNotFoundError:
        return ""
    return str(found.get("Metadata", {}).get(WRITER, ""))


def _parts(path: str, size: int | None = None) -> Iterator[bytes]:
    """The object in parts, a few fetched at once. size: its bytes, asked for when None."""
    size = int(_object(path)["size"]) if size is None else size
    ahead = PART_BYTES * PARTS_AT_ONCE
    for place in range(0, size, ahead):
        starts = list(range(place, min(place + ahead, size), PART_BYTES))
        ends = [min(start + PART_BYTES, size) for start in starts]
        yield from connect().cat_ranges([path] * len(starts), starts, ends, on_error="raise")


def _first_key(bucket: str, prefix: str) -> str | None:
    answer = connect().call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1)
    return next((str(entry["Key"]) for entry in answer.get("Contents", [])), None)


def _object(path: str) -> dict[str, Any]:
    """What s3fs knows of an object; FileNotFoundError when there is none, though there be a prefix."""
    found: dict[str, Any] = connect().info(path)
    if found["type"] != "file":
        raise FileNotFoundError(errno.ENOENT, "no such object", path)
    return found


def _made_bucket(connection: PatientS3, bucket: str) -> bool:
    """Whether there was none and it was made."""
    try:
        connection.call_s3("head_bucket", Bucket=bucket)
    except FileNotFoundError:
        region = connection.s3.meta.region_name
        # Amazon's first region is the one that must not be named.
        named = {"CreateBucketConfiguration": {"LocationConstraint": region}} if region != "us-east-1" else {}
        connection.call_s3("create_bucket", Bucket=bucket, **named)
        return True
    return False


def _require_valid_endpoint(uri: str) -> None:
    """botocore says ValueError to a URL without a scheme, and calls a password in it a network fault."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        url = os.environ.get(name, "")
        parts = urlsplit(url)
        secret = "@" in parts.netloc or parts.query
        if url and (parts.scheme not in ("http", "https") or not parts.hostname or secret):
            raise InputError(
                f"{name} is not the plain URL of a service",
                value=url.partition("?")[0].rpartition("@")[2],
                where=f"environment, for {uri}",
                remedy="write it as http://host:port or https://host, without a user, a password or a query",
            )


def _require_exclusive_writes(connection: PatientS3, probe: str, uri: str) -> None:
    """Write an object, see a second create refused, remove it."""

    def create() -> None:
        with _written(connection, probe) as mark:
            connection.pipe_file(probe, b"probe", mode="create", **mark)

    create()
    try:
        create()
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
