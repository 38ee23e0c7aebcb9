"""Credentials out of a Prefect block: in the environment for as long as they are needed, and never shown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from prefect.blocks.system import Secret

from cascade.errors import InputError
from flows.credentials import credentials
from flows.operations import collect_garbage, promote

PLANTED = "planted-4d1f0c"


def block(value: Any) -> str:
    """A new block with this value; its name."""
    name = f"trial-{uuid.uuid4().hex[:8]}"
    Secret(value=value).save(name)  # type: ignore[unused-coroutine]
    return name


@pytest.mark.parametrize("form", [json.dumps, dict])
def test_what_a_block_holds_reaches_processes_and_is_gone_afterwards(
    form: Any, prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "the worker's own")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    name = block(form({"AWS_ACCESS_KEY_ID": "the block's", "AWS_SECRET_ACCESS_KEY": PLANTED}))
    before = dict(os.environ)
    script = "import os; print(os.environ['AWS_ACCESS_KEY_ID'], os.environ['AWS_SECRET_ACCESS_KEY'])"
    with credentials(name):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == f"the block's {PLANTED}\n"
    assert dict(os.environ) == before
    with pytest.raises(InputError), credentials(name):
        raise InputError("the work failed", where="here", remedy="none")
    assert dict(os.environ) == before
    with credentials(""):
        assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (PLANTED, "no JSON object"),
        (json.dumps([PLANTED]), "no JSON object"),
        (json.dumps({"AWS_SECRET_ACCESS_KEY": {"key": PLANTED}}), "no JSON object"),
        (json.dumps({"PATH": PLANTED, PLANTED: "x"}), "2 names that are neither"),
    ],
)
def test_a_block_of_another_form_is_refused_and_not_repeated(
    value: str, words: str, prefect_server: str
) -> None:
    name, path = block(value), os.environ["PATH"]
    with pytest.raises(InputError, match=words) as caught, credentials(name):
        pass
    assert caught.value.value == name
    assert caught.value.where == "options.credentials"
    error: BaseException | None = caught.value
    while error:
        assert PLANTED not in f"{error} {error!r}"
        error = error.__context__
    assert os.environ["PATH"] == path


def test_the_workers_session_token_is_not_sent_with_the_keys_of_a_block(
    prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "the worker's own")
    with credentials(block({"AWS_ACCESS_KEY_ID": "the block's", "AWS_SECRET_ACCESS_KEY": PLANTED})):
        assert "AWS_SESSION_TOKEN" not in os.environ
    with credentials(block({"AWS_ACCESS_KEY_ID": "the block's", "AWS_SESSION_TOKEN": "and its token"})):
        assert os.environ["AWS_SESSION_TOKEN"] == "and its token"
    with credentials(block({"HF_TOKEN": PLANTED})):
        assert os.environ["AWS_SESSION_TOKEN"] == "the worker's own"
    assert os.environ["AWS_SESSION_TOKEN"] == "the worker's own"


@pytest.mark.parametrize("operation", [partial(promote, family="tiny"), collect_garbage])
def test_operations_read_a_block_too(
    operation: Callable[..., Any], prefect_server: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no Prefect block of type Secret"):
        operation(store=str(tmp_path), credentials="nobody")


def test_a_block_that_is_not_there_is_named(prefect_server: str) -> None:
    with pytest.raises(InputError, match="no Prefect block of type Secret") as caught, credentials("nobody"):
        pass
    assert caught.value.value == "nobody"
    assert caught.value.remedy
