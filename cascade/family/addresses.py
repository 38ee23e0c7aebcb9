"""What a person meant by an address that is near a family or an artifact but not theirs."""

from __future__ import annotations

from cascade.errors import CascadeError
from cascade.storage.artifacts import MANIFEST
from cascade.storage.locations import Location

INDEX = "family.json"
# Of `<family>/<stage>/<kind>/<key>`, and of a file in that folder.
LEVELS = 4
# Of families that are named at most.
NAMED = 5


def record_folder(location: Location) -> Location:
    """Where a record lies: the folder itself, or that of a file; of one in a bucket the name must tell."""
    around, path = location.parent, location.local_path
    is_file = location.name in (INDEX, MANIFEST) or (path is not None and path.is_file())
    return around if around and is_file else location


def right_address(location: Location) -> str:
    """A remedy that names the artifact or family around the location, or the families in it; "" if there is
    none, or if the store does not let us look."""
    try:
        place = location.parent
        for _ in range(LEVELS):
            if place is None:
                break
            for name, what in ((MANIFEST, "artifact"), (INDEX, "family")):
                if (place / name).exists():
                    return f"give {place.uri}, the {what} that it belongs to"
            place = place.parent
        families = [name for name in location.children() if (location / name / INDEX).exists()]
    except CascadeError:
        return ""
    if not families:
        return ""
    more = f" (and {len(families) - NAMED} more)" if len(families) > NAMED else ""
    return f"give one of its families: {', '.join((location / name).uri for name in families[:NAMED])}{more}"
