"""What lies where in a store, told by the path alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from cascade.kinds import SHARED, Kind
from cascade.storage.listing import Entry
from cascade.storage.manifest import MANIFEST

NAME = r"[a-z0-9][a-z0-9-]*"
KEY12 = r"[0-9a-f]{12}"
SHARED_KINDS = "|".join(SHARED)
OWN_KINDS = "|".join(kind for kind in Kind if kind not in SHARED)
ARTIFACT = rf"(?:shared/(?:{SHARED_KINDS})|(?!shared/){NAME}/{NAME}/(?:{OWN_KINDS}))/{KEY12}"
# A pilot's store lies within a store: its shared folder is no stage.
TRAINING = rf"(?:shared|(?!shared/){NAME}/(?!shared/){NAME})/training/{KEY12}"
# What a stage's folder shows to a person: written again by every build, and of no use without its artifacts.
CARD = rf"(?!shared/){NAME}/{NAME}/(?:card\.md|[a-z]+\.svg)"
# What `cascade repair` set aside, and what a rebuild did.
DAMAGED, REPLACED = ".damaged", ".replaced"
# Of files that were being written when their process was killed: ours alone, other hidden files stay.
LEFTOVER = rf"(?:[^/]+/)*\.(?:[^/]+\.(?:incoming|remains|{KEY12})|probe-[0-9a-f]{{32}})"


class What(StrEnum):
    """What is found at a place."""

    ARTIFACT = "artifact"
    UNFINISHED = "unfinished artifact"
    TRAINING = "training state"
    LEFTOVER = "leftover of a killed process"
    DAMAGED = "set aside as damaged"
    REPLACED = "replaced by a rebuild"
    BUILD = "build record"
    CARD = "card of a stage"


@dataclass(frozen=True)
class Thing:
    """A folder, or a file, that is kept or removed as a whole. modified: of its youngest file, since 1970."""

    what: What
    place: str
    bytes: int
    modified: float

    @property
    def key(self) -> str:
        """Of an artifact or a training state: the first digits of the key."""
        return self.place.rsplit("/", 1)[-1]

    @property
    def owner(self) -> str:
        """Of an artifact, a training state or a card: `<family>/<stage>`, or `shared`."""
        return self.place.rsplit("/", 1 if self.what is What.CARD else 2)[0]


KINDS = (
    (What.DAMAGED, re.compile(rf"((?:[^/]+/)*{re.escape(DAMAGED)})/")),
    (What.REPLACED, re.compile(rf"((?:[^/]+/)*{re.escape(REPLACED)}/[^/]+)/")),
    (What.LEFTOVER, re.compile(rf"({LEFTOVER})(?:/|$)")),
    (What.ARTIFACT, re.compile(rf"({ARTIFACT})/")),
    (What.TRAINING, re.compile(rf"({TRAINING})/")),
    (What.BUILD, re.compile(rf"({NAME}/builds/[^/]+\.json)$")),
    (What.CARD, re.compile(rf"({CARD})$")),
)
NAMED = re.compile(rf"(?:^|/)({ARTIFACT})/?$")


def things(listing: Iterable[Entry]) -> list[Thing]:
    """What a store holds, but for what is never removed: indexes, aliases, and what is not ours."""
    found: dict[tuple[What, str], list[Entry]] = {}
    for entry in listing:
        if place := place_of(entry.path):
            found.setdefault(place, []).append(entry)
    return [thing(what, place, entries) for (what, place), entries in found.items()]


def place_of(path: str) -> tuple[What, str] | None:
    """What a file belongs to; None for what is none of these."""
    for what, pattern in KINDS:
        if match := pattern.match(path):
            return what, match[1]
    return None


def thing(what: What, place: str, entries: list[Entry]) -> Thing:
    """The files of one place, together."""
    whole = any(entry.path == f"{place}/{MANIFEST}" for entry in entries)
    if what is What.ARTIFACT and not whole:
        what = What.UNFINISHED
    size, modified = sum(entry.size for entry in entries), max(entry.modified for entry in entries)
    return Thing(what, place, size, modified)


def named(tree: object) -> set[str]:
    """The places of all artifacts that the texts in a JSON tree name, by URI or by path."""
    return {match[1] for text in texts(tree) if (match := NAMED.search(text))}


def texts(tree: object) -> Iterator[str]:
    """Every text in a JSON tree, but for the keys of objects."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict | list):
        for inner in tree.values() if isinstance(tree, dict) else tree:
            yield from texts(inner)
