"""Check what a store holds against its manifests."""

from __future__ import annotations

from dataclasses import dataclass, field

from cascade.errors import InputError, IntegrityError
from cascade.family.addresses import INDEX
from cascade.family.index import read_index
from cascade.storage.artifacts import MANIFEST, problems, read_manifest
from cascade.storage.locations import Location, open_location


@dataclass
class Audit:
    """What was checked and what is wrong, one line each: where, what, value.

    damaged: the artifacts with a problem. absent: those that an index names and that are not there. indexes:
    the families whose index has a problem.
    """

    artifacts: int = 0
    files: int = 0
    problems: list[str] = field(default_factory=list)
    damaged: list[Location] = field(default_factory=list)
    absent: list[Location] = field(default_factory=list)
    indexes: list[Location] = field(default_factory=list)


def audit(location: Location) -> Audit:
    """Hash every file of every artifact at or below `location`, and of what a family's index there names.

    Raises InputError when there is nothing of ours at all.
    """
    report, names = Audit(), location.walk()
    uris = {folder_of(name, location).uri for name in names if last_part(name) == MANIFEST}
    for name in names:
        # <root>/<family>/family.json or <family>/family.json: seen from a store, or from a family.
        if last_part(name) == INDEX and name.count("/") <= 1:
            uris |= named_by_index(folder_of(name, location), report)
    for uri in sorted(uris):
        check(open_location(uri), report)
    if not report.artifacts and not report.problems:
        raise InputError(
            "there is no artifact here",
            value=location.uri,
            where=f"no {MANIFEST} at or below it",
            remedy="give a store, a family or an artifact",
        )
    return report


def last_part(name: str) -> str:
    """The file's own name."""
    return name.rsplit("/", 1)[-1]


def folder_of(name: str, location: Location) -> Location:
    """The folder of a file that lies at or below `location`."""
    folder = name.rpartition("/")[0]
    return location / folder if folder else location


def named_by_index(family: Location, report: Audit) -> set[str]:
    """URIs of the artifacts that a family's index names, shared ones too; none if it is damaged."""
    try:
        return {open_location(artifact["uri"]).uri for artifact in read_index(family)["artifacts"]}
    except IntegrityError as error:
        report.problems.append(f"{family.uri}: {error.what}: {error.value}")
    except (KeyError, TypeError, InputError):
        report.problems.append(f"{family.uri}: {INDEX} is damaged: it names no artifacts")
    report.indexes.append(family)
    return set()


def check(location: Location, report: Audit) -> None:
    """Add one artifact's findings to the report."""
    report.artifacts += 1
    try:
        manifest = read_manifest(location)
    except IntegrityError as error:
        report.problems.append(f"{error.where}: {error.what}: {error.value}")
        report.damaged.append(location)
        return
    if manifest is None:
        report.problems.append(f"{location.uri}: the family's index names it, but it has no {MANIFEST}")
        report.absent.append(location)
        return
    report.files += len(manifest.files)
    if found := problems(location):
        report.problems += found
        report.damaged.append(location)
