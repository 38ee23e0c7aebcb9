"""The README's own words: every command in it is run, and its tables are current."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from cascade.dials import Prune
from cascade.recipe import Stage
from cascade.recipe_files import load_recipe, validate_recipe
from cascade.roles import Policy
from cascade.teacher import Teacher
from cascade.trainings import OnPolicy
from tests.deployment_file import FILE, rendered
from tests.docs import README, ROOT, with_derived
from tests.e2e.conftest import Command
from tests.tiny_family import tiny_tree, write_recipe

# Run elsewhere, for the reason given.
ELSEWHERE = {
    "make quickstart": "by whoever publishes the figures: it takes minutes",
    "make test": "it runs this file",
    "make test-full": "the rest of the tests",
    "make bench": "by whoever publishes the figures: it takes minutes",
    "make up": "tests/e2e/test_up.py",
    "make audit": "by whoever updates constraints.txt: it asks PyPI",
    "pip install .": "test_the_wheel_holds_what_the_command_needs",
    "cascade pilot A.yaml B.yaml --tokens 50k": "tests/e2e/test_pilot.py",
    "cascade up": "tests/e2e/test_up.py",
    "cascade promote families/quickstart --run RUN": "tests/flows/test_family.py",
    "cascade promote families/quickstart --rollback": "tests/flows/test_family.py",
    "prefect automation create --from-file promoted.yaml": "tests/flows/test_events.py",
}


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Every command line, without its comment."""
    lines = [line.split(" #")[0].strip() for block in blocks("") for line in block.splitlines()]
    return [line for line in lines if re.match(r"(cascade|make|pip|prefect|python) ", line)]


def test_the_reference_and_the_deployment_are_current() -> None:
    readme = README.read_text("utf-8")
    assert with_derived(readme) == readme, "run: python -m tests.docs"
    assert FILE.read_text("utf-8") == rendered(), "run: python -m tests.docs"


def test_the_recipe_in_the_readme_is_a_short_form_of_the_packaged_one() -> None:
    (text,) = [block for block in blocks("yaml") if block.startswith("family:")]
    shown, packaged = validate_recipe(yaml.safe_load(text), where="README.md"), load_recipe("quickstart")
    assert (shown.parent, shown.corpus.sources) == (packaged.parent, packaged.corpus.sources)
    for stage, full in zip(shown.stages, packaged.stages, strict=False):
        assert (stage.name, stage.distill, stage.prune.ratio) == (full.name, full.distill, full.prune.ratio)


def test_every_piece_of_a_recipe_in_the_readme_is_one() -> None:
    """A list holds stages; a line of its own is a section of a recipe or of a stage."""
    pieces = [block for block in blocks("yaml") if not block.startswith("family:")]
    sections: dict[str, type[Prune | Teacher]] = {"prune": Prune, "teacher": Teacher}
    seen: set[str] = set()
    for piece in pieces:
        if piece.startswith("- "):
            stages = [Stage.model_validate(stage) for stage in yaml.safe_load(piece)]
            seen |= {f"student.{stage.student}" for stage in stages}
            continue
        if "stages:" in piece:
            whole = {"family": "f", "parent": "p", **yaml.safe_load(piece)}
            seen |= {f"extend.{validate_recipe(whole, where='README.md').stages[0].extend.rope.type}"}
            continue
        for line in piece.splitlines():
            ((name, tree),) = yaml.safe_load(line).items()
            given = sections[name].model_validate(tree)
            seen |= {f"{name}.{field}" for field in given.model_fields_set}
            seen |= {f"policy.{given.policy}"} if isinstance(given, Teacher) else set()
    assert {f"policy.{policy}" for policy in Policy} <= seen
    assert {
        "student.given",
        "student.scratch",
        "prune.ratio",
        "prune.shape",
        "prune.latency",
        "teacher.signals",
        "teacher.token_bytes",
        "extend.yarn",
    } <= seen


def test_the_on_policy_stage_in_the_readme_is_one() -> None:
    [text] = [piece for piece in blocks("yaml") if "on_policy:" in piece]
    [stage] = [Stage.model_validate(stage) for stage in yaml.safe_load(text)]
    defaults = OnPolicy(tokens=stage.on_policy.tokens, prompt_tokens=stage.on_policy.prompt_tokens)
    assert stage.on_policy == defaults
    assert len(stage.on_policy.model_fields_set) == 5


def test_every_command_is_either_run_here_or_named_as_run_elsewhere(
    tiny_parent: Path,
    tiny_corpus: Path,
    tmp_path: Path,
    s3: str,
    prefect_server: str,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tree = tiny_tree(tiny_parent, tiny_corpus) | {"family": "quickstart"}
    tree["stages"] = tree["stages"][:1]
    # A file of this name is taken before the packaged recipe, so the commands run exactly as printed.
    for name in ("quickstart", "RECIPE.yaml"):
        write_recipe(tmp_path / name, tree)
    monkeypatch.chdir(tmp_path)
    ran = 0
    for line in commands():
        if line in ELSEWHERE:
            continue
        assert line.startswith("cascade "), f"nobody runs this: {line}"
        code, said = command(*shlex.split(line.replace("s3://bucket/prefix", s3))[1:])
        assert code == 0, f"{line}\n{said}"
        ran += 1
    assert ran >= 5
    (snippet,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", snippet], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("target", ["quickstart", "test", "test-full", "bench", "up", "audit"])
def test_the_make_targets_exist(target: str) -> None:
    assert subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True).returncode == 0


def test_the_wheel_holds_what_the_command_needs(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("cascade-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"cascade/recipes/quickstart.yaml", "cascade/py.typed", "flows/family.py"} <= set(names)
    assert zipfile.ZipFile(wheel).read("flows/prefect.yaml").decode() == rendered()
    (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
    assert "cascade = cascade.cli:main" in zipfile.ZipFile(wheel).read(entry_points).decode()
