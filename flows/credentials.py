"""Credentials out of a Prefect block: in the environment of the run that named it, and nowhere else."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from prefect.blocks.system import Secret

from cascade.errors import InputError

WHERE = "options.credentials"
# What a store and the model hub read; anything else would change how a build runs.
ALLOWED = re.compile(r"AWS_[A-Z0-9_]+|HF_TOKEN")
KEY, TOKEN = "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN"


@contextmanager
def credentials(block: str) -> Iterator[None]:
    """While the block runs, its variables are in this process's environment, which nodes inherit.

    block: of type Secret; its value is a JSON object of AWS_... variables, and HF_TOKEN. "" for none.
    Raises InputError, which never repeats the value.
    """
    found = variables(block) if block else {}
    # The worker's session token belongs to its own keys: beside those of the block every store refuses it.
    given: dict[str, str | None] = {TOKEN: None, **found} if KEY in found else {**found}
    before = {name: os.environ.get(name) for name in given}
    try:
        put(given)
        yield
    finally:
        put(before)


def put(given: Mapping[str, str | None]) -> None:
    """Set variables of this process; None removes one."""
    for name, text in given.items():
        if text is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = text


def variables(block: str) -> dict[str, str]:
    """What the block holds."""
    try:
        value = cast(Secret[Any], Secret.load(block)).get()
    except ValueError:
        raise InputError(
            "there is no Prefect block of type Secret with this name",
            value=block,
            where=WHERE,
            remedy="create it in the UI (Blocks, Secret), or leave this empty for the worker's environment",
        ) from None
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise wrong("its value is no JSON object of texts", block)
    if unknown := [name for name in found if not ALLOWED.fullmatch(name)]:
        raise wrong(f"it holds {len(unknown)} names that are neither AWS_... nor HF_TOKEN", block)
    return found


def wrong(reason: str, block: str) -> InputError:
    """The error for a block of another form; names in it may be secrets by mistake."""
    return InputError(
        f"this Secret block cannot be used: {reason}",
        value=block,
        where=WHERE,
        remedy='give it a value like {"AWS_ACCESS_KEY_ID": "...", "AWS_SECRET_ACCESS_KEY": "..."}',
    )
