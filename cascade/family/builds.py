"""`<family>/builds/<run>.json`: every build, from its first second, with all artifacts it refers to.

Written before a build looks for what it can reuse, so that `cascade gc` never takes that away: see
`cascade.family.space`. The keys are stable for programs: more may be added, none is renamed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from cascade.errors import CascadeError, IntegrityError
from cascade.family.graph import Graph
from cascade.family.places import named
from cascade.kinds import SHARED_FOLDER
from cascade.storage.listing import Entry
from cascade.storage.locations import Location

FOLDER = "builds"
# Announced removals: a build that wants one of them waits for the end.
COLLECTING = f"{SHARED_FOLDER}/collecting"
# Whoever removes announces it anew more often than this; what is older was left by one that was killed.
COLLECTING_SECONDS = 3600.0


def now() -> str:
    """UTC in ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass
class Build:
    """The build that runs here. run: its name, which no other build has."""

    store: Location
    run: str
    started: str = field(default_factory=now)

    def refer(self, graph: Graph, *, index: dict[str, Any] | None = None) -> None:
        """Record all that the graph refers to; call it before anything of the graph is looked for.

        index: the family's, of a build that is finished. Raises CascadeError while a `cascade gc` is removing
        some of it.
        """
        artifacts = [
            {"node": node.name, "key": node.key, "place": node.location(self.store).uri[len(self.root) :]}
            for node in graph
        ]
        record = {
            "family": graph.recipe.family,
            "run": self.run,
            "started": self.started,
            "finished": now() if index else None,
            "recipe": graph.recipe.model_dump(mode="json"),
            "artifacts": artifacts,
            "index": index,
        }
        text = json.dumps(record, indent=1) + "\n"
        (self.store / graph.recipe.family / FOLDER / f"{self.run}.json").write_bytes(text.encode())
        require_not_collected(self.store, named(artifacts))

    @property
    def root(self) -> str:
        """What every URI in the store begins with."""
        return self.store.uri.rstrip("/") + "/"


def require_not_collected(store: Location, places: set[str]) -> None:
    """Raise CascadeError while one of these places is being removed."""
    folder = store / COLLECTING
    for name in folder.children():
        try:
            if (folder / name).age() > COLLECTING_SECONDS:
                continue
            doomed = set(json.loads((folder / name).read_bytes())) & places
        except FileNotFoundError:
            continue
        if doomed:
            raise CascadeError(
                "a `cascade gc` is removing artifacts that this build would use",
                value=", ".join(sorted(doomed)[:3]),
                where=(folder / name).uri,
                remedy="run it again when that has ended; if it was killed, delete this file first",
            )


@dataclass(frozen=True)
class Recorded:
    """A build as it was recorded. places: of the artifacts it refers to. modified: seconds since 1970."""

    family: str
    run: str
    path: str
    finished: bool
    modified: float
    places: frozenset[str]

    @property
    def keys(self) -> set[str]:
        """The first digits of these artifacts' keys."""
        return {place.rsplit("/", 1)[-1] for place in self.places}


def recorded(store: Location, entry: Entry) -> Recorded | None:
    """A build's record; None when it has just been removed. Raises IntegrityError for a damaged one."""
    record = read_tree(store, entry.path)
    if record is None:
        return None
    family, _, run = entry.path.removesuffix(".json").split("/")
    finished = record.get("finished") is not None
    return Recorded(family, run, entry.path, finished, entry.modified, frozenset(named(record)))


def record_of(family: Location, run: str) -> dict[str, Any] | None:
    """The record of a build; None when there is none of this name, which is a run's as a person gave it."""
    known = f"{run}.json" in (family / FOLDER).children()
    return read_tree(family, f"{FOLDER}/{run}.json") if known else None


def runs_with_index(family: Location, most: int = 5) -> list[str]:
    """Finished builds whose index is recorded, the newest ones."""
    names = sorted((name.removesuffix(".json") for name in (family / FOLDER).children()), reverse=True)
    found = (run for run in names if (record_of(family, run) or {}).get("index"))
    return list(islice(found, most))


def read_tree(store: Location, path: str) -> dict[str, Any] | None:
    """A JSON object that says what may not be removed. Raises IntegrityError when it cannot be read."""
    try:
        tree = json.loads((store / path).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise damaged(store / path, str(error)) from error
    if not isinstance(tree, dict):
        raise damaged(store / path, "it is not an object")
    return tree


def damaged(place: Location, reason: str) -> IntegrityError:
    """The refusal to remove anything while it is not known what is needed."""
    return IntegrityError(
        "nothing is removed, because this file says what is needed, and cannot be read",
        value=reason,
        where=place.uri,
        remedy="mend it, or delete it if what it named may go; `cascade build` writes family.json again",
    )
