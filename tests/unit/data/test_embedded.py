"""The embedded corpus is English prose, the same on every run, and repeats nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from cascade.data import embedded
from cascade.errors import InputError

MODULE = '''"""Open the door before the guests arrive.

    >>> open_door("front")
    True

goes on after an example that was left out.

Close it when the last one has left:
"""

def early():
    """Return the number of guests that came early."""

class Door:
    r"""A door keeps a count of everyone who passes."""

    def early(self):
        """Return the number of guests that came early."""

    async def late(self):
        """Wait for the guests that come late.

        * The first item is a complete sentence of
          two lines.
        * The second item is a sentence too.
        """
'''


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return list(embedded.documents())


def test_is_large_enough_to_train_on_and_has_documents_of_a_few_paragraphs(documents: list[str]) -> None:
    sizes = sorted(map(len, documents))
    assert sum(sizes) > 800_000
    assert sizes[0] >= embedded.SHORTEST_DOCUMENT
    assert sizes[len(sizes) // 2] > 1000
    assert sizes[-1] < 20_000


def test_no_paragraph_occurs_twice_so_held_out_text_is_no_copy_of_training_text(documents: list[str]) -> None:
    counts = Counter(paragraph for document in documents for paragraph in document.split("\n\n"))
    assert counts.most_common(1)[0][1] == 1


def test_is_prose_of_the_language_reference_and_the_standard_library(documents: list[str]) -> None:
    text = "\n".join(documents)
    assert "An assignment statement evaluates the expression list" in text
    assert "Close the connection to the SMTP server." in text
    assert ">>> " not in text
    letters = sum(character.isalpha() or character.isspace() for character in text)
    assert letters / len(text) > 0.93


def test_the_fingerprint_and_the_order_of_files_do_not_depend_on_the_process() -> None:
    code = (
        "import sys; from cascade.data import embedded as e; before = set(sys.modules);"
        "print(e.fingerprint(), [p.name for p in e.source_files()], next(e.documents())[:80]);"
        "assert not {'this', 'antigravity', 'idlelib'} & set(sys.modules)"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith(embedded.fingerprint())


def test_tests_codec_tables_and_separately_shipped_packages_are_left_out() -> None:
    parts = {part for path in embedded.source_files() for part in path.parts}
    assert parts.isdisjoint({"test", "tests", "encodings", "idlelib", "lib2to3", "tkinter", "site-packages"})
    assert {"email", "asyncio", "os.py"} <= parts


def test_docstrings_come_in_source_order_and_only_their_prose_is_kept(tmp_path: Path) -> None:
    module = tmp_path / "door.py"
    module.write_text(MODULE, encoding="utf-8")
    paragraphs = list(embedded.prose_paragraphs("\n\n".join(embedded.docstrings(module)), set()))
    assert paragraphs == [
        "Open the door before the guests arrive.",
        "Return the number of guests that came early.",
        "A door keeps a count of everyone who passes.",
        "Wait for the guests that come late.",
        "* The first item is a complete sentence of two lines.\n* The second item is a sentence too.",
    ]


def test_documents_end_at_a_paragraph_and_short_rests_are_dropped() -> None:
    paragraph = "A" * 999
    found = list(embedded.documents_of([paragraph] * 4 + ["short"]))
    assert found == ["\n\n".join([paragraph] * 3), paragraph + "\n\nshort"]
    assert list(embedded.documents_of(["short"])) == []


def test_a_python_without_sources_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(InputError, match="without the source files") as caught:
        next(embedded.documents())
    assert caught.value.where == str(tmp_path)
    with pytest.raises(InputError):
        embedded.fingerprint()
