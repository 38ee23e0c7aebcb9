"""Real English text that every machine with Python has: its language reference and its documentation strings.

Taken: `pydoc_data.topics` and the docstrings of the standard library's modules, classes and functions, read
with `ast` (nothing is imported or run), paragraph by paragraph. Left out: doctests, code, grammars, tables
and headings (not prose), the test suites, codec tables, and the packages that Linux distributions ship
separately, because the text must depend on the Python version alone. A paragraph is taken once, wherever it
first occurs: topics quote each other at length, and held-out text must not be a copy of training text.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from cascade.errors import InputError

# Part of the fingerprint: raise it when the rules below select other text from the same files.
RULES = 1
SEPARATELY_SHIPPED = {
    "distutils",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "test",
    "tkinter",
    "turtle",
    "turtledemo",
    "venv",
}
LEFT_OUT = SEPARATELY_SHIPPED | {"encodings", "pydoc_data"}
TEST_FOLDERS = {"test", "tests"}

# Characters of a document: a few paragraphs of context, and still enough documents for a fair sample of them.
DOCUMENT_CHARACTERS = 3000
SHORTEST_DOCUMENT = 200
# A paragraph is prose when most of its words are plain words and it begins and ends as sentences do. One that
# ends with a colon, or goes on in lower case, belongs to an example that was left out.
FEWEST_WORDS = 5
PLAIN_SHARE = 0.75
SENTENCE_START = re.compile(r"[\"'(*`\u201c\u2018-]*\s*[A-Z]")
SENTENCE_ENDS = (".", "!", "?")
PLAIN_WORD = re.compile(r"[\"'(*`\u201c\u2018]*[A-Za-z][A-Za-z'\u2019-]*[.,;:!?)\"'*`\u201d\u2019]*$")
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
BLANK_LINES = re.compile(r"\n\s*\n")
BULLET = re.compile(r"\n(?=\s*(?:[-*o]|\d+[.)])\s)")


def documents() -> Iterator[str]:
    """Documents of about 3 kB of prose in a fixed order: topics by name, then modules by path.

    Paragraphs are unwrapped to one line (a bullet list to one line an item), a blank line between them.
    InputError if this Python came without its source files.
    """
    seen: set[str] = set()
    for text in texts():
        yield from documents_of(prose_paragraphs(text, seen))


def fingerprint() -> str:
    """Hex sha256 of the files the text is taken from, the Python version and the rules that select it.

    Hashing files takes a tenth of a second, collecting their text several seconds.
    """
    digest = hashlib.sha256(f"embedded {RULES} {sys.version_info[:2]}".encode())
    for path in [standard_library() / "pydoc_data" / "topics.py", *source_files()]:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def texts() -> Iterator[str]:
    """The raw text of every topic, then of every module (its docstrings, a blank line between them)."""
    files = source_files()
    from pydoc_data.topics import topics

    for _, text in sorted(topics.items()):
        yield text
    for path in files:
        yield "\n\n".join(docstrings(path))


def standard_library() -> Path:
    """The folder of the standard library's Python sources; InputError if there are none."""
    folder = Path(sysconfig.get_path("stdlib"))
    if not (folder / "pydoc_data" / "topics.py").is_file():
        raise InputError(
            "this Python came without the source files of its standard library",
            value="embedded",
            where=str(folder),
            remedy="use a full Python installation, or name a text, JSONL or Parquet file as the source",
        )
    return folder


def source_files() -> list[Path]:
    """The modules whose docstrings are taken, sorted by their path inside the standard library."""
    folder = standard_library()
    found: list[Path] = []
    for name in sys.stdlib_module_names - LEFT_OUT:
        module = folder / f"{name}.py"
        found += [module] if module.is_file() else (folder / name).rglob("*.py")
    inside = {path.relative_to(folder).as_posix(): path for path in found}
    return [path for name, path in sorted(inside.items()) if TEST_FOLDERS.isdisjoint(name.split("/"))]


def docstrings(path: Path) -> list[str]:
    """The docstrings of a module, its classes and its functions, in the order of the source."""
    with warnings.catch_warnings():
        # Old modules hold escapes that newer parsers warn about; their docstrings are still text.
        warnings.simplefilter("ignore")
        tree = ast.parse(path.read_bytes())
    return [text for node in (tree, *definitions(tree)) if (text := ast.get_docstring(node))]


def definitions(node: ast.AST) -> Iterator[Definition]:
    """The classes and functions inside a module or statement, outer before inner (no expression has one)."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            yield child
        if isinstance(child, (ast.stmt, ast.ExceptHandler, ast.match_case)):
            yield from definitions(child)


def prose_paragraphs(text: str, seen: set[str]) -> Iterator[str]:
    """The paragraphs of a text that are prose and not in `seen`, unwrapped; adds them to `seen`."""
    for paragraph in BLANK_LINES.split(text):
        unwrapped = "\n".join(" ".join(item.split()) for item in BULLET.split(paragraph)).strip()
        if is_prose(unwrapped) and unwrapped not in seen:
            seen.add(unwrapped)
            yield unwrapped


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is English sentences rather than code, a grammar, a table or a heading."""
    words = paragraph.split()
    plain = sum(PLAIN_WORD.match(word) is not None for word in words)
    return (
        len(words) >= FEWEST_WORDS
        and plain >= PLAIN_SHARE * len(words)
        and SENTENCE_START.match(paragraph) is not None
        and paragraph.rstrip("\"')*`\u201d\u2019").endswith(SENTENCE_ENDS)
    )


def documents_of(paragraphs: Iterable[str]) -> Iterator[str]:
    """Join the paragraphs of one text to documents that end at the first paragraph past 3000 characters."""
    document = ""
    for paragraph in paragraphs:
        document = f"{document}\n\n{paragraph}" if document else paragraph
        if len(document) >= DOCUMENT_CHARACTERS:
            yield document
            document = ""
    if len(document) >= SHORTEST_DOCUMENT:
        yield document
