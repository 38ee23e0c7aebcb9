"""Credentials are in nothing that a build writes or says: some are planted, and all of it is searched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL

from cascade.storage.locations import open_location
from tests.e2e.conftest import Command
from tests.tiny_family import tiny_tree, write_recipe
from tests.waiting import LONG, wait_until

SECRET = "pl4nted-s3cret"
Tree = dict[str, Any]

ADDRESSES = [
    f"s3://key:{SECRET}@bucket/folder",
    f"s3://{SECRET}@bucket/folder/x.jsonl",
    f"s3://bucket/folder/x.jsonl?token={SECRET}",
    f"https://user:{SECRET}@host.invalid/x.jsonl",
    f"https://host.invalid/x.jsonl?X-Amz-Signature={SECRET}",
    f"hf://user:{SECRET}@host.invalid/x",
]


def as_parent(tree: Tree, address: str) -> None:
    tree["parent"] = address


def as_corpus(tree: Tree, address: str) -> None:
    tree["corpus"]["sources"] = [address]


def as_teacher(tree: Tree, address: str) -> None:
    tree["teacher"] = {"policy": "model", "models": [address]}


def as_student(tree: Tree, address: str) -> None:
    tree["stages"][1] = {"name": "b", "student": "given", "checkpoint": address, "distill": {"tokens": 64}}


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("plant", [as_parent, as_corpus, as_teacher, as_student])
def test_an_address_with_a_secret_in_it_is_refused_and_not_repeated(
    plant: Callable[[Tree, str], None],
    address: str,
    command: Command,
    tiny_parent: Path,
    tiny_corpus: Path,
    tmp_path: Path,
) -> None:
    """Recipes are stored with what they make, so no secret may be in one."""
    tree = tiny_tree(tiny_parent, tiny_corpus)
    plant(tree, address)
    recipe = write_recipe(tmp_path / "recipe.yaml", tree)
    code, said = command("build", str(recipe), "--direct", "--store", str(tmp_path / "store"))
    assert code == 2, said
    assert "way out: " in said
    assert SECRET not in said
    recipe.unlink()
    assert holders(tmp_path, SECRET) == []


@pytest.mark.parametrize("verb", ["build", "show", "verify", "gc"])
@pytest.mark.parametrize("address", ADDRESSES)
def test_a_store_with_a_secret_in_its_address_is_refused_and_not_repeated(
    address: str, verb: str, command: Command, tiny_parent: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_tree(tiny_parent, tiny_corpus))
    code, said = command(
        *(["build", str(recipe), "--direct", "--store"] if verb == "build" else [verb]), address
    )
    assert code == 2, said
    assert SECRET not in said


@pytest.mark.parametrize(
    "url",
    [
        f"http://user:{SECRET}@127.0.0.1:9",
        f"http://127.0.0.1:9/?k={SECRET}",
        f"127.0.0.1:9/?key={SECRET}",
        f"ftp://{SECRET}@127.0.0.1:9/?k={SECRET}",
    ],
    ids=["user", "query", "no scheme", "other scheme"],
)
def test_an_endpoint_with_a_secret_in_it_is_refused_and_not_repeated(
    url: str, s3: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    code, said = command("gc", s3)
    assert code == 2, said
    assert "AWS_ENDPOINT_URL" in said
    assert SECRET not in said


def holders(folder: Path, *secrets: str) -> list[str]:
    """Files and folders below this one whose name or content holds one of them.

    What disappears meanwhile holds nothing: a node may be about to end.
    """
    found = []
    for root, folders, names in os.walk(folder):
        for path in (Path(root, name) for name in (*folders, *names)):
            content = b""
            with suppress(FileNotFoundError):
                content = path.read_bytes() if path.is_file() else b""
            if any(secret in str(path) or secret.encode() in content for secret in secrets):
                found.append(str(path))
    return found


@pytest.fixture
def planted(s3: str) -> dict[str, str]:
    """Secrets in the environment of a build, by name; those of the store are real."""
    return {
        "HF_TOKEN": f"hf_{SECRET}-1",
        "HUGGING_FACE_HUB_TOKEN": f"hf_{SECRET}-2",
        "WANDB_API_KEY": f"{SECRET}-3",
        "DATABASE_URL": f"postgresql://user:{SECRET}-4@127.0.0.1/x",
        "AWS_SECRET_ACCESS_KEY": os.environ["AWS_SECRET_ACCESS_KEY"],
    }


def build(recipe: Path, store: str, folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """A build through Prefect whose every file lies below a folder, but for the store and the server's."""
    command = [sys.executable, "-m", "cascade.cli", "build", str(recipe), "--store", store]
    command += ["--cache", str(folder / "cache"), "--checkpoint-seconds", "0"]
    for name in ("cache", "tmp", "prefect", "hub"):
        (folder / name).mkdir(exist_ok=True)
    homes = {"TMPDIR": folder / "tmp", "PREFECT_HOME": folder / "prefect", "HF_HOME": folder / "hub"}
    with (folder / "said").open("ab") as said:
        return subprocess.Popen(
            command,
            env={**os.environ, **environment, **{name: str(path) for name, path in homes.items()}},
            stdout=said,
            stderr=said,
            start_new_session=True,
        )


def trains(store: str) -> bool:
    """Whether a training has stored its state there."""
    return any(path.endswith("/record.json") for path in open_location(store).walk())


def searched(store: str, folder: Path, secrets: list[str]) -> list[str]:
    """Everything that holds one of them: in the store, on this machine, in the Prefect server's database."""
    place = open_location(store)
    names = [entry.path for entry in place.listing()]
    assert names
    found = [name for name in names if any(secret in name for secret in secrets)]
    for name in names:
        # A node that has just lost its parent may still remove an older snapshot.
        with suppress(FileNotFoundError):
            content = (place / name).read_bytes()
            found += [name for secret in secrets if secret.encode() in content]
    database = Path(str(PREFECT_API_DATABASE_CONNECTION_URL.value()).partition("///")[2])
    assert database.is_file()
    # What SQLite has not yet moved into the file lies beside it.
    for path in database.parent.glob(f"{database.name}*"):
        found += [str(path) for secret in secrets if secret.encode() in path.read_bytes()]
    return found + holders(folder, *secrets)


@pytest.mark.slow
def test_nothing_that_a_build_writes_holds_a_credential(
    s3: str,
    prefect_server: str,
    planted: dict[str, str],
    tiny_parent: Path,
    tiny_corpus: Path,
    tmp_path: Path,
) -> None:
    """Killed in the middle, with all that it had open, and run to the end."""
    tree = tiny_tree(tiny_parent, tiny_corpus)
    tree["stages"] = tree["stages"][:1]
    recipe, folder = write_recipe(tmp_path / "recipe.yaml", tree), tmp_path / "machine"
    folder.mkdir()
    secrets = list(planted.values())
    # The search finds what is there.
    (folder / "known").write_text(planted["HF_TOKEN"])
    assert holders(folder, *secrets) == [str(folder / "known")]
    (folder / "known").unlink()
    environment = {**planted, "PREFECT_API_URL": prefect_server}

    process = build(recipe, s3, folder, environment)
    assert wait_until(lambda: process.poll() is not None or trains(s3), rest=0.02)
    assert process.poll() is None, (folder / "said").read_text()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert searched(s3, folder, secrets) == []

    assert build(recipe, s3, folder, environment).wait(LONG) == 0, (folder / "said").read_text()
    assert searched(s3, folder, secrets) == []
    assert "resumed" in (folder / "said").read_text()
