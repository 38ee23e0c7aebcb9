"""What a store holds that nobody needs any more, and its removal.

A build in progress is safe by this order: it first records what it refers to, then looks whether some of that
has been announced for removal; a removal is first announced, then judged once more by the records. So at
least one of them sees the other.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from cascade.errors import InputError
from cascade.family.builds import (
    COLLECTING,
    COLLECTING_SECONDS,
    FOLDER,
    Recorded,
    damaged,
    read_tree,
    recorded,
)
from cascade.family.index import INDEX
from cascade.family.places import NAME, Thing, What, named, texts, things
from cascade.kinds import SHARED_FOLDER
from cascade.storage.cache import Copy, discard, unused
from cascade.storage.listing import Entry
from cascade.storage.locations import Location, check_store
from cascade.storage.manifest import MANIFEST

DAY = 24 * 3600.0
POINTER = re.compile(rf"{NAME}/(?:{re.escape(INDEX)}|aliases/[^/]+\.json)$")
OnRemoved = Callable[[Thing], None]


@dataclass(frozen=True)
class Judgement:
    """A store at one moment. days: of the retention window. now: seconds since 1970.

    Kept is: what was made or written in the window (and always in the last day, for it may belong to a build
    that is running); what a build refers to that was recorded in the window, is running, is the newest
    finished one of its family or has an alias; and what an alias or a family's index names itself.
    """

    store: Location
    days: float
    now: float
    listing: list[Entry] = field(repr=False)

    @cached_property
    def things(self) -> list[Thing]:
        """All there is."""
        return things(self.listing)

    @cached_property
    def waste(self) -> list[Thing]:
        """What may be removed; the records come after what they refer to."""
        return sorted(
            filter(self.is_waste, self.things), key=lambda thing: (thing.what is What.BUILD, thing.place)
        )

    @cached_property
    def damaged(self) -> list[Thing]:
        """What was set aside; a person decides."""
        return [thing for thing in self.things if thing.what is What.DAMAGED]

    def is_waste(self, thing: Thing) -> bool:
        """Whether nobody needs it."""
        age = self.now - thing.modified
        if thing.what is What.DAMAGED or age < DAY:
            return False
        if thing.what is What.LEFTOVER:
            return True
        if thing.what is What.TRAINING and self.is_done(thing):
            return True
        if age < self.days * DAY:
            return False
        if thing.what is What.CARD:
            return thing.owner not in self.shown
        if thing.what is What.BUILD:
            return thing.place not in {build.path for build in self.needed_builds}
        if thing.what is What.TRAINING:
            return thing.key not in self.needed_keys
        return thing.place not in self.needed

    def is_done(self, training: Thing) -> bool:
        """Whether the artifact that a training state led to is there."""
        owners = (training.owner, SHARED_FOLDER)
        same = (thing for thing in self.things if thing.key == training.key and thing.owner in owners)
        return any(thing.what is What.ARTIFACT for thing in same)

    @cached_property
    def shown(self) -> set[str]:
        """Whose cards stay: stages of which something stays, and the families of a store within this one."""
        others = [
            thing for thing in self.things if thing.what in (What.ARTIFACT, What.UNFINISHED, What.TRAINING)
        ]
        stages = {thing.owner for thing in others if not self.is_waste(thing)}
        return stages | {
            entry.path.removesuffix(f"/{INDEX}") for entry in self.listing if entry.path.endswith(INDEX)
        }

    @cached_property
    def needed(self) -> set[str]:
        """Places of artifacts that are kept whatever their age."""
        direct = {place for tree in self.pointers for place in named(tree)}
        return direct.union(*(build.places for build in self.needed_builds))

    @cached_property
    def needed_keys(self) -> set[str]:
        """The first digits of their keys."""
        return {place.rsplit("/", 1)[-1] for place in self.needed}

    @cached_property
    def needed_builds(self) -> list[Recorded]:
        """Builds whose artifacts are kept."""
        pointed = {text for tree in self.pointers for text in texts(without_makers(tree))}
        newest: dict[str, Recorded] = {}
        # Runs are named by their start: of those that ended in one second, as S3 tells it, the later counts.
        for build in sorted(self.builds, key=lambda build: (build.modified, build.run)):
            if build.finished:
                newest[build.family] = build
        return [
            build
            for build in self.builds
            if self.now - build.modified < self.days * DAY
            or build.run in pointed
            or build is newest.get(build.family)
            or self.is_running(build)
        ]

    def is_running(self, build: Recorded) -> bool:
        """Whether an unfinished build, or its training state, was written in the last day."""
        states = [thing for thing in self.things if thing.what is What.TRAINING and thing.key in build.keys]
        youngest = max([build.modified, *(state.modified for state in states)])
        return not build.finished and self.now - youngest < DAY

    @cached_property
    def builds(self) -> list[Recorded]:
        """All that were recorded."""
        places = {thing.place for thing in self.things if thing.what is What.BUILD}
        found = [recorded(self.store, entry) for entry in self.listing if entry.path in places]
        return [build for build in found if build]

    @cached_property
    def pointers(self) -> list[dict[str, object]]:
        """The families' indexes and aliases. Raises IntegrityError for one that cannot be understood."""
        found = []
        runs = {build.run for build in self.builds}
        for path in (entry.path for entry in self.listing if POINTER.match(entry.path)):
            tree = read_tree(self.store, path)
            if tree is not None and not named(tree) and not runs & set(texts(tree)):
                raise damaged(self.store / path, "it names neither an artifact nor a build that is recorded")
            # What was rolled back is named to stay away, not to stay in the store.
            found += [{name: part for name, part in tree.items() if name != "refused"}] if tree else []
        return found


def without_makers(tree: object) -> object:
    """A JSON tree without its lists of artifacts: each is named by its own address, and the build that once
    made it may have made much that is of no use any more."""
    if isinstance(tree, dict):
        return {name: without_makers(inner) for name, inner in tree.items() if name != "artifacts"}
    return [without_makers(inner) for inner in tree] if isinstance(tree, list) else tree


@dataclass(frozen=True)
class Collected:
    """What was removed, or would be: of a store and of a cache. damaged: stays, for a person to decide."""

    waste: list[Thing]
    damaged: list[Thing]
    copies: list[Copy]


def collect(store: Location, keep_days: float, cache: Path, *, delete: bool, now: float) -> Collected:
    """Find what nobody needs in a store and in this machine's cache; with `delete` remove it.

    now: seconds since 1970. Raises as `judge`, and InputError when there is no such store.
    """
    check_store(store, create=False)
    found = judge(store, keep_days, now)
    waste, copies = found.waste, unused(cache, keep_days, now)
    if delete:
        waste = []
        remove(found, waste.append)
        for copy in copies:
            discard(copy.path)
    return Collected(waste, found.damaged, copies)


def judge(store: Location, days: float, now: float) -> Judgement:
    """Look at a whole store. Raises InputError for a single family, which does not know what others need."""
    listing = store.listing()
    paths = {entry.path for entry in listing}
    if paths & {INDEX, MANIFEST} or any(path.startswith(f"{FOLDER}/") for path in paths):
        raise InputError(
            "this is a family or an artifact; only of a whole store it can be said what nobody needs",
            value=store.uri,
            where="URI",
            remedy="give the store: the folder above the family's",
        )
    return Judgement(store, days, now, listing)


@dataclass
class Announcement:
    """Says to builds that are about to start what is being removed; gone when the block ends."""

    file: Location
    places: list[str]
    written: float = -COLLECTING_SECONDS

    def __enter__(self) -> Announcement:
        self.renew()
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.delete_tree()

    def renew(self) -> None:
        """Keep it young: an old one counts as forgotten."""
        if time.monotonic() - self.written > COLLECTING_SECONDS / 4:
            self.file.write_bytes(json.dumps(self.places).encode())
            self.written = time.monotonic()


def remove(judgement: Judgement, on_removed: OnRemoved) -> None:
    """Remove the waste that is still waste once its removal is announced.

    An artifact's manifest goes first: what a crash leaves does not count as an artifact, and the next call
    goes on with it. Raises StorageFault and InputError as `Location`.
    """
    store, doomed = judgement.store, {thing.place for thing in judgement.waste}
    if not doomed:
        return
    folder = store / COLLECTING
    forgotten = [name for name in folder.children() if (folder / name).age() > COLLECTING_SECONDS]
    with Announcement(folder / f"{uuid.uuid4().hex}.json", sorted(doomed)) as announcement:
        again = judge(store, judgement.days, judgement.now)
        for thing in (thing for thing in again.waste if thing.place in doomed):
            announcement.renew()
            if thing.what is What.ARTIFACT:
                (store / thing.place / MANIFEST).delete_tree()
            (store / thing.place).delete_tree()
            on_removed(thing)
    for name in forgotten:
        (folder / name).delete_tree()
