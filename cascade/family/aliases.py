"""`<family>/aliases/{latest,stable}.json`: the newest complete build, and the newest that passed its gate.

Each names a run and its checkpoints and holds the run's index, so that whoever reads one needs nothing else.
The keys are stable for programs: more may be added, none is renamed.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from typing import Any

from cascade.errors import BelowGate, CascadeError, InputError, IntegrityError
from cascade.family.builds import now, record_of, require_not_collected, runs_with_index
from cascade.family.places import named
from cascade.family.quality import shortfalls, verdict_line, verdicts
from cascade.parsing import parse_json
from cascade.storage.artifacts import read_manifest
from cascade.storage.lease import Lease
from cascade.storage.locations import Location, open_location

FOLDER, WRITING = "aliases", ".aliases.writing"
LATEST, STABLE = "latest", "stable"
# Earlier targets of an alias that a rollback can go to; `cascade gc` keeps what they refer to.
KEPT = 3

Json = dict[str, Any]


@dataclass(frozen=True)
class Settled:
    """What a build that completed has moved. index: its own. moved: aliases. promoted: `stable` has other
    children than before. shortfalls: rows of the gate that were not passed, by stage. held: `stable` would
    have come back to what was rolled back."""

    index: Json
    moved: tuple[str, ...]
    promoted: bool = False
    shortfalls: dict[str, list[Json]] = field(default_factory=dict)
    held: bool = False


def read_alias(family: Location, name: str) -> Json | None:
    """What an alias says; None when it was never set. Raises IntegrityError when it cannot be read."""
    place = family / FOLDER / f"{name}.json"
    try:
        alias: Json = parse_json(place.read_bytes())
        lists = [alias["index"]["stages"], alias["previous"], alias["refused"]]
        if not isinstance(alias["run"], str) or not all(isinstance(part, list) for part in lists):
            raise ValueError("it does not name a build")
    except FileNotFoundError:
        return None
    except (LookupError, TypeError, ValueError) as error:
        raise IntegrityError(
            "this alias is damaged",
            value=f"{type(error).__name__}: {error}",
            where=place.uri,
            remedy="delete it: the next build sets `latest`, `cascade promote` sets `stable`",
        ) from error
    return alias


def stable_index(family: Location) -> Json | None:
    """The index that `stable` names; None when nothing was ever promoted."""
    alias = read_alias(family, STABLE)
    return alias["index"] if alias else None


def alias_runs(family: Location) -> dict[str, str]:
    """The run that each alias names, for those that are set."""
    found = {name: read_alias(family, name) for name in (LATEST, STABLE)}
    return {name: alias["run"] for name, alias in found.items() if alias}


def settle(index: Json, store: Location) -> Settled:
    """A build is complete: `latest` moves to it, and `stable` if it keeps the limits of its recipe.

    What a person rolled back does not come back by itself as long as its children are the same.
    """
    family = store / index["family"]
    with Lease(family / WRITING):
        stable = read_alias(family, STABLE)
        failed = shortfalls(verdicts(index, stable["index"] if stable else None))
        held = not failed and stable is not None and checkpoints(index) in stable["refused"]
        move(family, LATEST, index)
        if failed or held:
            return Settled(index, (LATEST,), shortfalls=failed, held=held)
        move(family, STABLE, index)
    promoted = stable is None or checkpoints(stable["index"]) != checkpoints(index)
    return Settled(index, (LATEST, STABLE), promoted)


def held_line(settled: Settled, store: Location) -> str:
    """Why `stable` stays although the gate was passed; empty where it does not."""
    if not settled.held:
        return ""
    return (
        "these children were rolled back by hand, so stable does not come back to them by itself; "
        f"cascade promote {shlex.quote((store / settled.index['family']).uri)} does it"
    )


def require_gate(settled: Settled, store: Location) -> None:
    """Raise BelowGate with everything that fell short, if anything did."""
    if not settled.shortfalls:
        return
    family = store / settled.index["family"]
    stable = read_alias(family, STABLE)
    lines = [verdict_line(row) for rows in settled.shortfalls.values() for row in rows]
    raise BelowGate(
        "the family is built and stored, but does not pass its gate:\n"
        + "\n".join(f"    {line}" for line in lines),
        value=settled.index["run"],
        where=f"`stable` stays at {stable['run'] if stable else 'no build'}, in {family}/{FOLDER}",
        remedy="teach these stages longer, or mend the limits in their `gate`; "
        f"`cascade promote {shlex.quote(family.uri)}` promotes it all the same",
    )


def promote(family: Location, run: str = "", rollback: bool = False) -> Json:
    """Move `stable` by hand: to a run, to that of `latest`, or back to where it was before; returns it.

    Raises InputError for a run that is not known or whose children are gone, and when there is no way back;
    CascadeError while a `cascade gc` is removing some of it. Then `stable` stays what it was.
    """
    if run and rollback:
        raise InputError(
            "a rollback goes to where `stable` was before",
            value=run,
            where="--run, --rollback",
            remedy="give only one of them",
        )
    # Wrong input is refused before anything is written, for the address may be wrong too.
    target(family, run, rollback)
    with Lease(family / WRITING):
        stable, index = read_alias(family, STABLE), target(family, run, rollback)
        require_children(index, family)
        if stable and stable["run"] == index["run"]:
            return stable
        alias = move(family, STABLE, index, rollback=rollback)
        try:
            # Only now: what an alias names a later removal finds, and an earlier one is found here.
            require_kept(index, family)
        except CascadeError:
            write(family, STABLE, stable)
            raise
        return alias


def move(family: Location, name: str, index: Json, *, rollback: bool = False) -> Json:
    """Set an alias, in one step; call it under the lease.

    Among the earlier targets are only those that had other children. A rollback takes its own off them, and
    notes the children that it came from as refused, until somebody moves there by hand.
    """
    before = read_alias(family, name)
    earlier = before["previous"] if before else []
    if before and checkpoints(before["index"]) != checkpoints(index):
        here = {"run": before["run"], "moved": before["moved"]}
        earlier = earlier[1:] if rollback else [here, *earlier][:KEPT]
    refused = [other for other in (before["refused"] if before else []) if other != checkpoints(index)]
    if before and rollback:
        refused.append(checkpoints(before["index"]))
    alias = {
        "alias": name,
        "family": index["family"],
        "run": index["run"],
        "moved": now(),
        "checkpoints": checkpoints(index),
        "previous": earlier,
        "refused": refused,
        "index": index,
    }
    write(family, name, alias)
    return alias


def write(family: Location, name: str, alias: Json | None) -> None:
    """Replace an alias by another, or by none."""
    place = family / FOLDER / f"{name}.json"
    if alias is None:
        place.delete_tree()
    else:
        place.write_bytes((json.dumps(alias, indent=2) + "\n").encode())


def checkpoints(index: Json) -> dict[str, str]:
    """Every child's folder, those with a long context too."""
    return {child["name"]: child["checkpoint"] for child in (*index["stages"], *index.get("extended", []))}


def target(family: Location, run: str, rollback: bool) -> Json:
    """The index of what `promote` goes to."""
    return previous(family, read_alias(family, STABLE)) if rollback else chosen(family, run)


def chosen(family: Location, run: str) -> Json:
    """The index of a run, or of `latest`."""
    latest = read_alias(family, LATEST)
    if latest and run in ("", latest["run"]):
        return dict(latest["index"])
    if not run:
        raise InputError(
            "no build of this family is complete, so there is nothing to promote",
            value=family.uri,
            where=f"{family}/{FOLDER}/{LATEST}.json",
            remedy="`cascade build` it first; URI is <root>/<family>",
        )
    record = record_of(family, run)
    if record is None or not record.get("index"):
        known = ", ".join(runs_with_index(family)) or "none"
        raise InputError(
            "no complete build of this name is recorded",
            value=run,
            where="--run",
            remedy=f"give one of: {known}",
        )
    return dict(record["index"])


def previous(family: Location, stable: Json | None) -> Json:
    """The index of what `stable` named before."""
    if not stable or not stable["previous"]:
        raise InputError(
            "`stable` was nothing else before, so there is no way back",
            value=stable["run"] if stable else "not set",
            where=f"{family}/{FOLDER}/{STABLE}.json",
            remedy="`cascade promote URI --run RUN` names the build that it should be",
        )
    return chosen(family, stable["previous"][0]["run"])


def require_children(index: Json, family: Location) -> None:
    """Raise InputError for a build of which something is not in the store any more."""
    for name, uri in checkpoints(index).items():
        if read_manifest(open_location(uri)) is None:
            raise InputError(
                f"the child {name} of this build is not in the store any more",
                value=index["run"],
                where=uri,
                remedy=f"build it again, or promote another run of {family}",
            )


def require_kept(index: Json, family: Location) -> None:
    """Raise CascadeError while a `cascade gc` removes parts of a build, InputError if children are gone."""
    if family.parent:
        require_not_collected(family.parent, named(index))
    require_children(index, family)
