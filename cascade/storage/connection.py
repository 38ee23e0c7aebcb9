"""The connection to S3: s3fs, but that every request waits out a store that fails."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import lru_cache
from typing import Any

import aiohttp
import s3fs
from botocore.exceptions import BotoCoreError, ClientError
from fsspec.asyn import sync_wrapper

from cascade.storage.patience import SETTING, ShortAnswer, patience, patiently

# Parts of 32 MiB, 4 at a time: 128 MiB of memory however large the file, and up to 312 GiB in the
# 10,000 parts that S3 allows.
PART_BYTES = 32 * 2**20
PARTS_AT_ONCE = 4

# Seconds of one attempt: to connect, and until the next bytes come. Repeating it is up to `patiently` alone.
ONE_ATTEMPT = {"total_max_attempts": 1}
WORK_LIMITS = {"connect_timeout": 5, "read_timeout": 30, "retries": ONE_ATTEMPT}
# The preflight makes about four requests and must not take minutes.
CHECK_LIMITS = {"connect_timeout": 3, "read_timeout": 8, "retries": ONE_ATTEMPT}
CHECK_SECONDS = 4.0


class PatientS3(s3fs.S3FileSystem):
    """s3fs whose requests are made `patiently`.

    All but the bodies of answers goes through `_call_s3`; those are read in `_cat_file`, which is why a file
    is read by nothing else. patience: seconds for each request.
    """

    retries = 1
    patience = 0.0

    async def _call_s3(self, method: str, *arguments: Any, **parameters: Any) -> Any:
        request = super()._call_s3
        return await patiently(
            lambda: request(method, *arguments, **parameters), _told(method, parameters), self.patience
        )

    call_s3 = sync_wrapper(_call_s3)

    async def _cat_file(
        self, path: str, version_id: None = None, start: int | None = None, end: int | None = None
    ) -> bytes:
        """The object, or its bytes from `start` to before `end`, in one answer that has to be whole."""
        bucket, key, _ = self.split_path(path)
        request, place = super()._call_s3, {"Bucket": bucket, "Key": key}
        part = {} if start is None or end is None else {"Range": f"bytes={start}-{end - 1}"}

        async def attempt() -> bytes:
            answer = await request("get_object", **place, **part)
            try:
                data = bytes(await answer["Body"].read())
            finally:
                answer["Body"].close()
            # The length that an answer gives itself may be that of a part of it.
            size = (
                (await request("head_object", **place))["ContentLength"]
                if start is None or end is None
                else end - start
            )
            if len(data) != size:
                raise ShortAnswer(f"{len(data)} bytes of {size}")
            return data

        return await patiently(attempt, _told("get_object", place), self.patience)

    async def _abort_mpu(self, bucket: str, key: str, mpu: str) -> None:
        """One attempt: what made the upload fail was waited for, and is what has to be said."""
        with suppress(OSError, BotoCoreError, ClientError, aiohttp.ClientError):
            await super()._call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=mpu)


def _told(method: str, parameters: dict[str, Any]) -> str:
    """A request as the log names it."""
    name = "/".join(str(parameters[part]) for part in ("Bucket", "Key", "Prefix") if parameters.get(part))
    return f"{method} s3://{name}"


def connect(*, check: bool = False) -> PatientS3:
    """The connection of this process with today's variables. check: one that says soon what is wrong."""
    settings = tuple(
        sorted(item for item in os.environ.items() if item[0].startswith("AWS_") or item[0] == SETTING)
    )
    return _connect_once(os.getpid(), settings, check)


@lru_cache(maxsize=4)
def _connect_once(process: int, settings: tuple[tuple[str, str], ...], check: bool) -> PatientS3:
    """A connection, kept for the process (s3fs does not survive a fork) and the variables it was made with.

    s3fs keeps instances too, but by their arguments alone: it would go on with credentials that have
    been replaced in the environment.
    """
    connection = PatientS3(
        skip_instance_cache=True,
        # Another process may write at any time: what was listed before says nothing.
        use_listings_cache=False,
        default_block_size=PART_BYTES,
        max_concurrency=PARTS_AT_ONCE,
        config_kwargs=CHECK_LIMITS if check else WORK_LIMITS,
    )
    connection.patience = min(CHECK_SECONDS, patience()) if check else patience()
    return connection
