"""The Dockerfile: what can be seen without building it. tests/deploy/test_image.py builds it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
TEXT = DOCKERFILE.read_text()


def stage(name: str) -> str:
    """The text of one stage."""
    found = re.search(rf"^FROM \S+ AS {name}\n(.*?)(?=^FROM |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def test_the_linter_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_a_target_only_receives_what_was_built(target: str) -> None:
    assert "RUN" not in stage(target)
    assert re.findall(r"COPY --from=(\S+)", stage(target)) == [f"packages-{target}", "program"]


def test_it_runs_as_a_user_and_its_signals_arrive() -> None:
    runtime = stage("runtime")
    assert "USER 1001:1001" in runtime
    # In exec form: a shell in between would keep SIGTERM to itself.
    assert 'ENTRYPOINT ["/usr/bin/tini", "--"]' in runtime
    assert 'CMD ["python", "-m", "flows.worker", "cpu"]' in runtime
    assert "USER" not in stage("cpu") + stage("gpu")


@pytest.mark.parametrize("name", ["installer", "packages-cpu", "packages-gpu"])
def test_every_package_has_the_version_of_the_constraints(name: str) -> None:
    installs = re.findall(r"pip install (.*?)(?: \\|$)", stage(name), re.MULTILINE)
    assert installs
    assert all("--constraint constraints.txt" in install for install in installs)


def test_the_requirements_are_the_projects() -> None:
    done = subprocess.run(
        [sys.executable, "docker/requirements.py", "kubernetes"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert {"torch>=2.7", "prefect>=3.8.8,<3.9", "prefect-kubernetes>=0.8"} <= set(lines)


def test_the_context_holds_what_is_copied_and_nothing_else() -> None:
    first, *rest = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert first == "*"
    allowed = {line.removeprefix("!") for line in rest if line.startswith("!")}
    copied = {
        source.removeprefix("./")
        for line in re.findall(r"^COPY (?!--from)(.+) \S+$", TEXT, re.MULTILINE)
        for source in line.split()
    }
    assert copied == allowed
    assert all((ROOT / source).exists() for source in copied)
