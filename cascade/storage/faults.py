"""What a failing store means for the user: wrong input, or a fault that a retry may heal."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import aiohttp
import botocore.exceptions as botocore_errors
from botocore.exceptions import BotoCoreError, ClientError
from safetensors import SafetensorError

from cascade.errors import CascadeError, InputError, StorageFault
from cascade.wording import short

BAD_CREDENTIALS = (
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "AuthorizationHeaderMalformed",
)
# As disks say it, and as stores do: Ceph, MinIO, and whoever answers with the status alone.
DISK_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota on this disk is used up",
    errno.EFBIG: "a file is larger than the disk, or the limit of this user (ulimit -f), allows",
}
STORE_FULL = (
    "InsufficientStorage",
    "QuotaExceeded",
    "XMinioAdminBucketQuotaExceeded",
    "XMinioStorageFull",
)
INSUFFICIENT_STORAGE = 507
CREDENTIALS_REMEDY = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN if the key needs one), "
    "or AWS_PROFILE for a profile of ~/.aws/credentials"
)
NO_CREDENTIALS = (
    botocore_errors.NoCredentialsError,
    botocore_errors.PartialCredentialsError,
    botocore_errors.CredentialRetrievalError,
    botocore_errors.ProfileNotFound,
)


def endpoint() -> str:
    """The S3 endpoint in use, for messages: scheme, host and port, without anything secret in the URL."""
    url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    if not url:
        return "Amazon S3 (AWS_ENDPOINT_URL is not set)"
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


class KeepsFailing(OSError):
    """A store was asked again and again for so many seconds; the cause is how it failed at last."""

    def __init__(self, seconds: float) -> None:
        super().__init__(errno.EIO, f"the store kept failing for {seconds:.0f} s")
        self.seconds = seconds


def client_error(error: BaseException | None) -> ClientError | None:
    """The answer of S3 behind an exception of s3fs or botocore; None when there is none."""
    found = error if isinstance(error, ClientError) else getattr(error, "__cause__", None)
    return found if isinstance(found, ClientError) else None


def s3_code(error: BaseException) -> str:
    """The S3 error code behind an exception of s3fs or botocore, or "" when there is none."""
    answer = client_error(error)
    return str(answer.response.get("Error", {}).get("Code", "")) if answer else ""


def s3_status(error: BaseException) -> int:
    """The HTTP status behind an exception of s3fs or botocore, or 0 when there is none."""
    answer = client_error(error)
    return int(answer.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) if answer else 0


@contextmanager
def store_faults(uri: str) -> Iterator[None]:
    """Turn what a store raises into cascade's errors; FileNotFoundError and FileExistsError stay as they are.

    InputError: refused for good. StorageFault: the network or the service failed. CascadeError: no space.
    """
    try:
        yield
    except SafetensorError as error:
        # A library in Rust wraps the kernel's error and keeps its words.
        if (fault := full(error, uri)) is None:
            raise
        raise fault from error
    except (OSError, BotoCoreError, ClientError, aiohttp.ClientError) as error:
        refusal = full(error, uri) or refused(error, uri)
        if refusal is not None:
            raise refusal from error
        if isinstance(error, FileNotFoundError | FileExistsError):
            raise
        waited = f", for {error.seconds:.0f} s" if isinstance(error, KeepsFailing) else ""
        raise StorageFault(
            f"the store failed{waited}",
            value=reason(error.__cause__ if waited and error.__cause__ else error),
            where=", ".join(part for part in (uri, _where(uri)) if part),
            remedy="check that the store is up and reachable, then run it again",
        ) from error


@contextmanager
def full_disk(path: str) -> Iterator[None]:
    """Within `store_faults`, around the writing of a local file, whose path a failed write does not tell."""
    try:
        yield
    except OSError as error:
        if (fault := full(error, path)) is None:
            raise
        raise fault from error


def full(error: BaseException, uri: str) -> CascadeError | None:
    """The error for a disk or a store that takes no more; None for any other."""
    what = next(
        (
            what
            for code, what in DISK_FULL.items()
            if code == _errno(error) or os.strerror(code) in str(error)
        ),
        None,
    )
    if s3_code(error) in STORE_FULL or s3_status(error) == INSUFFICIENT_STORAGE:
        what = f"the store is full, or its quota is used up ({s3_code(error)})"
    if what is None:
        return None
    return CascadeError(
        what,
        value=getattr(error, "filename", None) or uri,
        where=_where(uri) or f"writing to {uri}",
        remedy="make room (`cascade gc STORE` says what no build needs); run the same command to go on",
    )


def refused(error: BaseException, uri: str) -> InputError | None:
    """The InputError for a refusal that a retry cannot heal; None for any other error."""
    code = s3_code(error)
    if code == "NoSuchBucket":
        return InputError(
            "the bucket does not exist",
            value=uri,
            where=_where(uri),
            remedy="create the bucket, or correct the name or AWS_ENDPOINT_URL",
        )
    if isinstance(error, NO_CREDENTIALS):
        return InputError(
            "no usable S3 credentials were found", value=uri, where=_where(uri), remedy=CREDENTIALS_REMEDY
        )
    if code in BAD_CREDENTIALS:
        return InputError(
            f"the store does not accept the credentials ({code})",
            value=uri,
            where=_where(uri),
            remedy=CREDENTIALS_REMEDY,
        )
    if isinstance(error, botocore_errors.ParamValidationError) or code == "InvalidBucketName":
        return InputError(
            "this is not a valid bucket or key name",
            value=uri,
            where=_where(uri),
            remedy="write s3://bucket/prefix",
        )
    if isinstance(error, PermissionError) or _errno(error) == errno.EROFS:
        return InputError(
            "the store does not permit this" + (f" ({code})" if code else ""),
            value=uri,
            where=_where(uri) or str(getattr(error, "filename", None) or ""),
            remedy="grant the right to list, read, write and delete there, or choose another store",
        )
    if isinstance(error, OSError) and (fault := not_a_name(error, uri)):
        return fault
    if isinstance(error, NotADirectoryError | IsADirectoryError):
        return InputError(
            "a file is in the way of a folder, or a folder in the way of a file",
            value=uri,
            where=str(error.filename or ""),
            remedy="choose another folder",
        )
    return None


def not_a_name(error: OSError, where: str) -> InputError | None:
    """The InputError for what the kernel does not take as the name of a file; None for any other error."""
    if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
        return None
    return InputError(
        f"this cannot be the name of a file: {os.strerror(error.errno)}",
        value=short(str(error.filename or where)),
        where=short(where),
        remedy="choose another path",
    )


@contextmanager
def only_names(where: str) -> Iterator[None]:
    """Within it, or a function that it decorates, paths come from a person, and may be none: `not_a_name`."""
    try:
        yield
    except OSError as error:
        if (fault := not_a_name(error, where)) is None:
            raise
        raise fault from error


def _where(uri: str) -> str:
    return endpoint() if uri.startswith("s3://") else ""


def _errno(error: BaseException) -> int | None:
    return error.errno if isinstance(error, OSError) else None


def reason(error: BaseException) -> str:
    """The kind of failure and its code. Not the message: it may quote a signed URL."""
    code = s3_code(error) or (os.strerror(number) if (number := _errno(error)) else "")
    return f"{type(error).__name__}{f' ({code})' if code else ''}"
