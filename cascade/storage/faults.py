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

from cascade.errors import CascadeError, InputError, StorageFault

BAD_CREDENTIALS = (
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "AuthorizationHeaderMalformed",
)
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


def s3_code(error: BaseException) -> str:
    """The S3 error code behind an exception of s3fs or botocore, or "" when there is none."""
    for candidate in (error, error.__cause__):
        if isinstance(candidate, ClientError):
            return str(candidate.response.get("Error", {}).get("Code", ""))
    return ""


@contextmanager
def store_faults(uri: str) -> Iterator[None]:
    """Turn what a store raises into cascade's errors; FileNotFoundError and FileExistsError stay as they are.

    InputError: refused for good. StorageFault: the network or the service failed. CascadeError: disk full.
    """
    try:
        yield
    except (OSError, BotoCoreError, ClientError, aiohttp.ClientError) as error:
        refusal = refused(error, uri)
        if refusal is not None:
            raise refusal from error
        if isinstance(error, FileNotFoundError | FileExistsError):
            raise
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CascadeError(
                "the disk is full", value=error.filename, where=uri, remedy="free space, then run it again"
            ) from error
        raise StorageFault(
            "the store failed",
            value=_reason(error),
            where=", ".join(part for part in (uri, _where(uri)) if part),
            remedy="check that the store is up and reachable, then run it again",
        ) from error


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
    if isinstance(error, NotADirectoryError | IsADirectoryError):
        return InputError(
            "a file is in the way of a folder, or a folder in the way of a file",
            value=uri,
            where=str(error.filename or ""),
            remedy="choose another folder",
        )
    return None


def _where(uri: str) -> str:
    return endpoint() if uri.startswith("s3://") else ""


def _errno(error: BaseException) -> int | None:
    return error.errno if isinstance(error, OSError) else None


def _reason(error: BaseException) -> str:
    """The kind of failure and its code. Not the message: it may quote a signed URL."""
    code = s3_code(error) or (os.strerror(number) if (number := _errno(error)) else "")
    return f"{type(error).__name__}{f' ({code})' if code else ''}"
