"""The image for a CPU, built and tried: see tests/deploy/image.py. Minutes, so `make test-full` runs it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.image import PACKAGES, Builder, missing

pytestmark = pytest.mark.slow

LARGEST = 2.5e9
"""Bytes, of the image for a CPU."""


@pytest.fixture(scope="module")
def builder() -> Iterator[Builder]:
    """With the base image; skips, and says what is missing, where it cannot work."""
    if missing():
        pytest.skip(f"{', '.join(missing())} not installed: apt-get install {' '.join(PACKAGES)}")
    with Builder(Path(tempfile.mkdtemp(prefix="cascade-image-"))) as made:
        made.make_base()
        yield made


@pytest.fixture(scope="module")
def image(builder: Builder) -> str:
    """The built image's name."""
    return builder.build("cpu")


def test_its_settings_are_the_dockerfiles(builder: Builder, image: str) -> None:
    described = json.loads(builder.buildah("inspect", "--type", "image", image))
    config = described["Docker"]["config"]
    assert config["User"] == "1001:1001"
    assert config["Entrypoint"] == ["/usr/bin/tini", "--"]
    assert config["Cmd"] == ["python", "-m", "flows.worker", "cpu"]
    assert config["Healthcheck"]["Test"][0] == "CMD"
    (row,) = json.loads(builder.buildah("images", "--json", image))
    assert size(row["size"]) < LARGEST


def size(text: str) -> float:
    """Bytes, of a size such as `2.05 GB`."""
    number, unit = text.split()
    return float(number) * {"KB": 1e3, "MB": 1e6, "GB": 1e9}[unit]


def test_it_runs_as_a_user_who_can_write_only_his_own(builder: Builder, image: str) -> None:
    places = "/opt/cascade /opt/venv /usr/bin /cache $HOME /tmp"
    tried = f"for place in {places}; do test -w $place && echo $place; done"
    assert builder.run(image, "id", "-u").stdout.strip() == "1001"
    assert builder.run(image, "sh", "-c", tried).stdout.split() == ["/cache", "/home/cascade", "/tmp"]


def test_it_holds_nothing_to_build_with_and_no_leftovers(builder: Builder, image: str) -> None:
    tools = "for tool in gcc cc g++ make git curl pip pip3; do command -v $tool; done"
    assert builder.run(image, "sh", "-c", tools).stdout == ""
    left = "ls -A /var/lib/apt/lists /var/cache /root /build /lent /opt/cascade/deploy 2> /dev/null"
    assert "pkg" not in builder.run(image, "sh", "-c", left).stdout
    found = builder.run(image, "find", "/", "-xdev", "-name", ".git", "-o", "-xdev", "-name", "families")
    assert found.stdout == ""


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("cascade plan smoke", "smoke"),
        ("prefect version", "3.8.8"),
        ("python -c 'import torch; print(torch.__version__)'", "+cpu"),
        ("python -c 'import prefect_kubernetes, peft, asyncpg; print(asyncpg.__name__)'", "asyncpg"),
        ("python -c 'import cascade.node, flows.worker; print(flows.worker.__file__)'", "/opt/cascade/flows"),
        ("prefect worker start --help", "--with-healthcheck"),
    ],
)
def test_what_it_is_started_with_works(builder: Builder, image: str, command: str, said: str) -> None:
    done = builder.run(image, "sh", "-c", command)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


def test_the_bootstrap_knows_its_deployments(builder: Builder, image: str) -> None:
    listed = "from flows.deployments import definitions; print(len(definitions('s3://a/b', 'cpu')))"
    assert builder.run(image, "python", "-c", listed).stdout.strip() == "7"
    done = builder.run(image, "python", "-m", "flows.bootstrap")
    assert done.returncode == 2
    assert "CASCADE_STORE is not set" in done.stderr


def test_a_family_is_built_in_it(builder: Builder, image: str) -> None:
    done = builder.run(image, "cascade", "build", "smoke", "--direct", "--store", "/cache/families")
    assert done.returncode == 0, done.stdout + done.stderr
