"""Wrong recipes and manifests, found by chance and by hand: each is refused in our words, or is right."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cascade.errors import InputError
from cascade.recipe_files import load_recipe, validate_recipe
from cascade.storage.manifest import FileRecord, Manifest, encode_manifest, parse_manifest
from tests.faults.errors import complaints
from tests.faults.spoil import WILD, damaged, inside, places
from tests.tiny_family import tiny_tree

Record = Callable[[str, object], None]
Tree = dict[str, Any]
T = TypeVar("T")
FEW, MANY = 150, 3000
# A tree is large beside what hypothesis is used to.
SLOW = list(HealthCheck)

RECIPE: Tree = tiny_tree(Path("parent"), Path("corpus.jsonl")) | {
    "teacher": {"policy": "mixture", "models": [{"path": "x", "weight": 0.5}, {"path": "y", "weight": 0.5}]},
    "controls": ["scratch"],
    "seed": 3,
}
RECIPE["stages"][1] |= {
    "on_policy": {"tokens": 64, "mixture": 0.5, "prompt_tokens": 8},
    "extend": {"sequence_length": 64, "tokens": "2k", "rope": {"type": "yarn", "factor": 2.0}},
}
MANIFEST: Tree = Manifest(
    kind="pruned",
    key="0" * 64,
    family="tiny",
    stage="small",
    spec={"ratio": 0.5, "axes": ["ffn"]},
    facts={"loss": 1.5, "kept": {"ffn": [1, 2]}},
    versions={"torch": "2"},
    hardware={"cores": 2},
    files={"config.json": FileRecord(sha256="a" * 64, size=3)},
    bytes=3,
    created="2026-01-01T00:00:00+00:00",
).model_dump()

keys = st.text(max_size=8) | st.integers() | st.booleans() | st.none()
leaves = st.one_of(
    *(
        st.none(),
        st.booleans(),
        st.integers(),
        st.integers(min_value=10**15),
        st.floats(),
        st.text(max_size=20),
    ),
    # A copy: what is drawn first may be spoiled by the next draw.
    *(st.binary(max_size=5), st.dates(), st.sampled_from(WILD).map(copy.deepcopy)),
)
anything = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)


@st.composite
def spoiled(draw: st.DrawFn, whole: Tree) -> Tree:
    """The tree with one to three values replaced, left out, or put under another key."""
    tree = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(tree) or [("family",)]))
        holder, key = inside(tree, path), path[-1]
        how = draw(st.sampled_from(["replace", "replace", "leave out", "rename"]))
        value = holder.pop(key, None) if isinstance(holder, dict) else holder[key]
        if how == "replace":
            holder[key] = draw(anything)
        elif how == "rename" and isinstance(holder, dict):
            holder[draw(keys)] = value
        elif isinstance(holder, list):
            del holder[key]
    return tree


def tried(strategy: st.SearchStrategy[Tree], check: Callable[[Tree], None], count: int) -> int:
    """Check about so many trees, always the same; one that takes ten seconds hangs. How many there were."""
    seen = 0

    @settings(
        max_examples=count, deadline=10_000, derandomize=True, database=None, suppress_health_check=SLOW
    )
    @given(strategy)
    def example(tree: Tree) -> None:
        nonlocal seen
        seen += 1
        check(tree)

    example()
    return seen


def answer(read: Callable[[], T]) -> T | None:
    """What is read, or None when it is refused as it should be."""
    try:
        return read()
    except InputError as refusal:
        error = refusal
    assert complaints(str(error), error.record(), error.exit_code) == []
    return None


def check_recipe(tree: Tree) -> None:
    """It is a recipe, and then it survives its way through JSON; or it is refused as it should be."""
    recipe = answer(lambda: validate_recipe(tree, where="recipe.yaml"))
    if recipe is None:
        return
    assert validate_recipe(json.loads(recipe.model_dump_json()), where="again") == recipe


def check_manifest(data: bytes) -> None:
    """It is a manifest, and then it is stored and read as the same; or it is refused as it should be."""
    manifest = answer(lambda: parse_manifest(data, "s3://bucket/manifest.json"))
    if manifest is None:
        return
    assert parse_manifest(encode_manifest(manifest), "again") == manifest


HOW_MANY = pytest.mark.parametrize(
    "count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"]
)


@HOW_MANY
def test_a_spoiled_recipe_is_refused_in_our_words(count: int, record_property: Record) -> None:
    record_property("tried", tried(spoiled(RECIPE), check_recipe, count))


@HOW_MANY
def test_a_spoiled_manifest_is_refused_in_our_words(count: int, record_property: Record) -> None:
    def check(tree: Tree) -> None:
        check_manifest(json.dumps(tree, default=str, skipkeys=True).encode())

    record_property("tried", tried(spoiled(MANIFEST), check, count))


@HOW_MANY
def test_bytes_of_a_recipe_and_a_manifest_spoiled_anywhere(
    count: int, tmp_path: Path, record_property: Record
) -> None:
    for _, data in damaged(json.dumps(MANIFEST).encode(), count, seed=count):
        check_manifest(data)
    path = tmp_path / "recipe.yaml"
    for _, data in damaged(yaml.safe_dump(RECIPE).encode(), count, seed=count):
        path.write_bytes(data)
        answer(lambda: load_recipe(str(path)))
    record_property("tried", 2 * count)


GOOD = yaml.safe_dump(RECIPE)
# By name: the file, and words of the answer.
BROKEN: dict[str, tuple[bytes | str, list[str]]] = {
    "empty": ("", ["there is nothing here"]),
    "comment": ("# nothing\n", ["there is nothing here"]),
    "list": ("- a\n- b\n", ["keys with values are needed"]),
    "word": ("just words", ["keys with values are needed", "just words"]),
    "latin": (b"seed: 1\nfamily: caf\xe9\n", ["line 2 is not UTF-8", "0xe9"]),
    "utf16": (GOOD.encode("utf-16"), ["not UTF-8"]),
    "nul": ("seed: 1\nfamily: \x00\n", ["line 2", "0x0000"]),
    "tab": ("corpus:\n\tsources: [x]\n", ["line 2", "'\\t'"]),
    "bracket": ("seed: 1\nstages: [\n", ["line 3"]),
    "twice": (GOOD + "seed: 4\n", ["the key 'seed' is there twice"]),
    "twice inside": ("corpus: {sources: [x], sources: [y]}", ["'sources' is there twice", "line 1"]),
    "documents": (GOOD + "---\nseed: 4\n", ["found another document"]),
    "alias": ("family: *name\n", ["undefined alias 'name'"]),
    "itself": ("&a [*a]\n", ["keys with values are needed"]),
    "deep list": ("a: " + "[" * 30_000, ["levels deep"]),
    "deep mapping": ("{a: " * 5000 + "1" + "}" * 5000, ["levels deep"]),
    "tag": ("family: !!python/object/apply:os.system [true]\n", ["could not determine a constructor"]),
    "date": ("family: 2026-13-41\n", ["line 1", "month"]),
    "text for a date": (GOOD.replace("tiny", "2026-01-02"), ["family: text is needed", "quotes"]),
    "digits": ("seed: " + "9" * 5000, ["line 1", "limit"]),
    "large": ("# " + "x" * (1 << 20), ["1,048,576 bytes"]),
    "no number": (GOOD.replace("seed: 3", "seed: .nan"), ["seed: a finite number is needed"]),
    "fraction": (GOOD.replace("seed: 3", "seed: 1.5"), ["seed: a whole number is needed (got 1.5)"]),
    "word for a number": (GOOD.replace("seed: 3", "seed: three"), ["seed: a whole number is needed"]),
    "true for a number": (GOOD.replace("seed: 3", "seed: yes"), ["seed: true and false are no value here"]),
    "form": (GOOD.replace("family: tiny", "family: Not So"), ["family: lowercase letters", "'Not So'"]),
    "nothing": (GOOD.replace("parent: parent", "parent: ''"), ["parent: it must not be empty"]),
    "count": (GOOD.replace("tokens: 2k", "tokens: 2K"), ["tokens: a count such as 8000, 8k"]),
    "endless count": (GOOD.replace("tokens: 2k", f"tokens: {'9' * 400}T"), ["at most 30 digits"]),
    "more than 64 bits": (GOOD.replace("tokens: 2k", "tokens: 1.0e+30"), ["tokens: the number is too large"]),
    "choice": (
        GOOD.replace("policy: mixture", "policy: both"),
        ["teacher.policy: one of 'parent'", "'both'"],
    ),
    "escapes": (GOOD.replace("family: tiny", 'family: "\\e[31m"'), ["family: lowercase letters"]),
    "many": ("\n".join(f"k{number}: 1" for number in range(999)), ["and 983 more"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_recipe_says_what_is_wrong_and_where(name: str, tmp_path: Path) -> None:
    content, words = BROKEN[name]
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        load_recipe(str(path))
    message = str(caught.value)
    assert complaints(message, caught.value.record(), caught.value.exit_code) == []
    assert [word for word in words if word not in message] == [], message
    assert str(path) in message
    assert message.isprintable() or all(letter.isprintable() for letter in message.replace("\n", ""))


@pytest.mark.parametrize("name", ["", ".", "no\x00where", "\ud800", "a" * 5000, "absent.yaml", "/dev/null/x"])
def test_a_recipe_that_cannot_be_read_is_named(name: str) -> None:
    with pytest.raises(InputError, match="cannot read the recipe") as caught:
        load_recipe(name)
    assert caught.value.exit_code == 2
    str(caught.value).encode()


def test_a_key_may_still_come_from_a_merge(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "family: tiny\nparent: x\ncorpus: {sources: [x]}\nstages:\n"
        "- &first {name: a, prune: {ratio: 0.8}, distill: {tokens: 64}}\n"
        "- {<<: *first, name: b, prune: {ratio: 0.5}}\n"
    )
    assert [stage.name for stage in load_recipe(str(path)).stages] == ["a", "b"]


COMMAND = """
import sys
from cascade import cli
try:
    cli.main()
finally:
    print([name for name in ("torch", "transformers", "datasets") if name in sys.modules])
"""


REAL = [("plan", name) for name in list(BROKEN)[::4]] + [("build", "twice"), ("pilot", "deep mapping")]
MORE = [(verb, name) for verb in ("plan", "build") for name in BROKEN if (verb, name) not in REAL]


@pytest.mark.parametrize(
    ("verb", "name"), [*REAL, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in MORE)]
)
def test_the_command_refuses_a_broken_recipe_before_it_loads_what_takes_seconds(
    verb: str, name: str, tmp_path: Path
) -> None:
    content, words = BROKEN[name]
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    arguments = [verb, str(path), *([str(path), "--tokens", "1k"] if verb == "pilot" else [])]
    ended = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout.strip() == "[]"
    assert ended.stderr.startswith("error: ")
    assert "way out: " in ended.stderr
    assert "Traceback" not in ended.stderr
    assert [word for word in words if word not in ended.stderr] == [], ended.stderr
