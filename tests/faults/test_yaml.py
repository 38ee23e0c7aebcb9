"""A recipe is data: nothing in it runs, and a few lines cannot take all memory."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from cascade.parsing import MOST_NODES, parse_yaml

ROOT = Path(__file__).parents[2]
CODE = "touch {place}"
TAGS = [
    "!!python/object/apply:os.system ['{code}']",
    "!!python/object/apply:subprocess.check_output [[touch, '{place}']]",
    "!!python/object/new:os.system ['{code}']",
    "!!python/object/new:type {{args: [z, [], {{}}], listitems: !!python/name:exec }}",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/tuple [1, 2]",
    "!<tag:yaml.org,2002:python/object/apply:os.system> ['{code}']",
    "!recipe {{}}",
]


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("recipe", ["{tag}", "family: {tag}", "? {tag}\n: 1", "a: &a {tag}\nb: {{<<: *a}}"])
def test_a_tag_makes_nothing_and_runs_nothing(tag: str, recipe: str, tmp_path: Path) -> None:
    place = tmp_path / "ran"
    text = recipe.format(tag=tag.format(code=CODE.format(place=place), place=place))
    with pytest.raises(ValueError, match=r"line 1.*constructor"):
        parse_yaml(text.encode())
    assert not place.exists()


def laughs(kind: str, levels: int) -> str:
    """Lines of which each names the line before nine times."""
    lines = ["a0: &a0 {k: lol}" if "merge" in kind else "a0: &a0 [lol]"]
    for level in range(1, levels):
        nine = ", ".join([f"*a{level - 1}"] * 9)
        inner = {"list": f"[{nine}]", "merge": f"{{<<: [{nine}]}}"}[kind]
        lines.append(f"a{level}: &a{level} {inner}")
    return "\n".join(lines) + "\n"


BOMBED = """
    import resource, sys
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
    resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
    from cascade.parsing import parse_yaml
    try:
        parse_yaml(sys.stdin.buffer.read())
    except ValueError as error:
        print(error)
"""


@pytest.mark.parametrize("kind", ["list", "merge"])
def test_aliases_of_aliases_are_refused_before_they_take_all_memory(kind: str) -> None:
    """In a process of its own, of 1 GiB and 20 s."""
    command = [sys.executable, "-c", textwrap.dedent(BOMBED)]
    done = subprocess.run(command, input=laughs(kind, 12).encode(), capture_output=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert f"more than {MOST_NODES:,} values" in done.stdout.decode()
    assert done.stdout.startswith(b"line ")


@pytest.mark.parametrize("kind", ["list", "merge"])
def test_a_few_aliases_are_what_yaml_makes_of_them(kind: str) -> None:
    text = laughs(kind, 4)
    assert parse_yaml(text.encode()) == yaml.safe_load(text)


def test_the_count_is_of_what_is_written_out() -> None:
    many = "a: &a [" + "1, " * 1000 + "]\n"
    within = (MOST_NODES - 2000) // 1001
    parse_yaml(f"{many}b: [{'*a, ' * within}]\n".encode())
    with pytest.raises(ValueError, match="once every alias is written out"):
        parse_yaml(f"{many}b: [{'*a, ' * (within + 3)}]\n".encode())
