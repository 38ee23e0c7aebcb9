"""Set damaged artifacts aside, so that the next build makes them again. Nothing is deleted."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime

from cascade.errors import IntegrityError, NewerVersion
from cascade.family.addresses import INDEX
from cascade.family.audit import Audit, audit
from cascade.family.places import DAMAGED
from cascade.kinds import SHARED, Kind
from cascade.storage.artifacts import MANIFEST, problems, read_manifest
from cascade.storage.locations import Location
from cascade.storage.publishing import only_publisher


@dataclass
class Repair:
    """What was found, and lines: for what was set aside, for what is not there at all, for what was left."""

    found: Audit = field(default_factory=Audit)
    moved: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def repair(location: Location) -> Repair:
    """Check all that `audit` checks, and move what is damaged to `.damaged/<when stored>-<name>` beside it.

    An artifact that only has files too many keeps its place, and loses those; one of a newer version is left;
    one that is not there is for the next build. A damaged index is moved, too: a build writes it from the
    manifests. Raises as `audit`. A repair that is interrupted is finished by the next one.
    """
    report = Repair(audit(location))
    for place in report.found.absent:
        report.absent.append(f"{place}: there is nothing to set aside; {remade(place)}")
    for place in report.found.damaged:
        with alone(place):
            treat(place, report)
    for family in report.found.indexes:
        aside = unused(family / DAMAGED, family / INDEX)
        (family / INDEX).move(aside)
        report.moved.append(f"{family / INDEX} -> {aside}")
    return report


def treat(place: Location, report: Repair) -> None:
    """Set one artifact aside, or what does not belong to it, if that is still called for."""
    try:
        manifest = read_manifest(place)
    except NewerVersion as error:
        report.left.append(f"{place}: {error.what}; {error.remedy}")
        return
    except IntegrityError:
        report.moved.append(f"{place} -> {move(place, DAMAGED)}; {remade(place)}")
        return
    if manifest is None:
        # Another repair was faster.
        return
    found = problems(place)
    surplus = [path for path in place.walk() if path != MANIFEST and path not in manifest.files]
    if len(found) > len(surplus):
        report.moved.append(f"{place} -> {move(place, DAMAGED)}; {remade(place)}")
    elif surplus:
        aside = unused(parent(place) / DAMAGED, place / MANIFEST, place.name)
        for path in surplus:
            (place / path).move(aside / path)
            report.moved.append(f"{place / path} -> {aside / path}: the rest is intact and stays")


def move(place: Location, folder: str) -> Location:
    """Set a whole artifact aside, into a hidden folder beside it: a folder by one rename, objects one by one.

    The manifest goes last. While it stands no builder stores anything here, so that what is moved is what
    was judged; whoever reads the rest meanwhile is refused, as before; and a repair that was killed is seen
    by the next, which goes on into the same folder: its name is the manifest's time.
    """
    aside = unused(parent(place) / folder, place / MANIFEST, place.name)
    if place.local_path is not None:
        place.move(aside)
    else:
        judged = (place / MANIFEST).version()
        for path in [*(path for path in place.walk() if path != MANIFEST), MANIFEST]:
            # Another repair may be ahead of us, and a builder behind it.
            with suppress(FileNotFoundError):
                if (place / MANIFEST).version() == judged:
                    (place / path).move(aside / path)
    return aside


def unused(folder: Location, stamp: Location, name: str = INDEX) -> Location:
    """The place in `folder` for what was stored when the file `stamp` was; free, in a local store."""
    stored = datetime.fromtimestamp(round(time.time() - stamp.age()), UTC)
    place = folder / f"{stored:%Y%m%dT%H%M%SZ}-{name}"
    number = 1
    while place.local_path is not None and place.local_path.exists():
        number += 1
        place = folder / f"{stored:%Y%m%dT%H%M%SZ}-{name}-{number}"
    return place


@contextmanager
def alone(place: Location) -> Iterator[None]:
    """While no builder stores into the same folder; in a bucket nobody can be kept out."""
    if place.local_path is None:
        yield
        return
    with only_publisher(place.local_path.parent):
        yield


def remade(place: Location) -> str:
    """Which command makes an artifact again."""
    kind = parent(place)
    shared = kind.name in [kind.value for kind in SHARED]
    known = kind.name in [kind.value for kind in Kind]
    if not known:
        return "`cascade build` makes it again"
    root = parent(parent(kind)) if shared else parent(parent(parent(kind)))
    whose = "a family that uses it" if shared else f"family {parent(parent(kind)).name}"
    return f"`cascade build RECIPE --store {root}` with the recipe of {whose} makes it again"


def parent(place: Location) -> Location:
    """The folder that holds it."""
    return Location(place.uri.rpartition("/")[0])
