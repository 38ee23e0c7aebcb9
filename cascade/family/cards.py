"""The cards of a build: made when there is news, stored beside the index that says the same."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from cascade.cards.card import Card
from cascade.cards.curves import Course, course
from cascade.cards.family import family_card
from cascade.cards.links import BROWSER, RECIPE, Links
from cascade.cards.stage import stage_card
from cascade.errors import CascadeError
from cascade.family.index import Json, write_index
from cascade.kinds import CHILD_TRAININGS
from cascade.recipe import Recipe
from cascade.storage.locations import Location, open_location
from cascade.storage.scratch import scratch_folder

OnCard = Callable[[Card], None]
STEPS = "steps.jsonl"


class Cards:
    """on_card: receives every card that is new. unstored: files below the family's folder that its store does
    not have yet; they wait as long as another build's index stands there.
    """

    def __init__(self, store: Location, recipe: Recipe, cache: Path, on_card: OnCard) -> None:
        self.store, self.cache, self.on_card = store, cache, on_card
        self.links = Links(store.uri, os.environ.get(BROWSER, ""))
        self.unstored = {RECIPE: recipe_file(recipe)}
        # Digests: a card with its pictures is large, and there may be many stages.
        self._shown: dict[str, str] = {}
        self._courses: dict[str, Course | None] = {}

    def publish(self, index: Json, complete: bool) -> None:
        """Show what is new, and store it beside the index; see `write_index`."""
        for card in self.news(index, complete):
            self.unstored |= card.files
            self.on_card(card)
        if write_index(index, self.store, complete, self.unstored):
            self.unstored.clear()

    def news(self, index: Json, complete: bool) -> Iterator[Card]:
        """Cards of stages and controls, then of the family, that say what none before them did.

        The family's own comes while something is being made, and when all is there: a build that finds
        everything done shows it once. The others are not even made again: each shows all that it comes from,
        and there may be many.
        """
        rows = [*index["stages"], *index["controls"]]
        for row in rows:
            if self._is_new(row["name"], basis(index, row)):
                yield stage_card(index, row, self.courses(index, row["name"]), self.links)
        if rows and (complete or not all(row["reused"] for row in rows)):
            card = family_card(index, self.links)
            if self._is_new("", card):
                yield card

    def _is_new(self, name: str, said: object) -> bool:
        digest = hashlib.sha256(repr(said).encode()).hexdigest()
        known, self._shown[name] = self._shown.get(name), digest
        return known != digest

    def courses(self, index: Json, stage: str) -> list[Course]:
        """Of a stage's trainings, in their order; each is read once."""
        names = [f"{stage}/{kind}" for kind in CHILD_TRAININGS]
        made = {one["node"]: one["uri"] for one in index["artifacts"] if one["node"] in names}
        for name, uri in made.items():
            if uri not in self._courses:
                self._courses[uri] = read_course(open_location(uri), name.rpartition("/")[2], self.cache)
        found = (self._courses[made[name]] for name in names if name in made)
        return [one for one in found if one]


def basis(index: Json, row: Json) -> list[Json]:
    """All of an index that a stage's card shows and that may change while its artifacts stay the same."""
    long = [other for other in index.get("extended", []) if other["of"] == row["name"]]
    limits = [limit for limit in index.get("gate", []) if limit["stage"] == row["name"]]
    return [row, *long, *limits]


def read_course(place: Location, kind: str, cache: Path) -> Course | None:
    """Of one training; None when its steps cannot be read: a picture is not worth a build."""
    try:
        with scratch_folder(cache, "card") as folder:
            (place / STEPS).download(folder / STEPS)
            with (folder / STEPS).open(encoding="utf-8") as lines:
                return course(kind, lines)
    except (CascadeError, FileNotFoundError, LookupError, TypeError, ValueError):
        return None


def recipe_file(recipe: Recipe) -> bytes:
    """The recipe with every default written out, so that it means the same to every version."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=False).encode()
