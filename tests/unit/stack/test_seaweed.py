"""The bucket's browser, which asks for no key: its own pages may use it, those of others may not."""

from __future__ import annotations

from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from tests.s3_server import S3Server


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_its_own_pages_may_write(s3_server: S3Server, host: str) -> None:
    origin = f"http://{host}:{s3_server.ports['filer']}"
    page = s3_server.browser.format(bucket=s3_server.bucket, prefix="page")
    for method in ("PUT", "DELETE"):
        with urlopen(Request(page, b"text", {"Origin": origin}, method=method)) as answer:
            assert answer.headers["Access-Control-Allow-Origin"] == origin


@pytest.mark.parametrize("method", ["OPTIONS", "GET", "PUT", "DELETE"])
def test_pages_of_others_may_do_nothing(s3_server: S3Server, method: str) -> None:
    page = s3_server.browser.format(bucket=s3_server.bucket, prefix="")
    asked = Request(page, headers={"Origin": "http://elsewhere.example"}, method=method)
    with pytest.raises(HTTPError, match="403") as caught:
        urlopen(asked)
    caught.value.close()
