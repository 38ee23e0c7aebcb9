"""The course of a training, from its `steps.jsonl`, with as many points as a picture can show."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from cascade.cards.svg import Point

MOST = 200


@dataclass
class Thinned:
    """Points of a line, at most `MOST` however many are added: means of ever more neighbours."""

    width: int = 1
    done: list[Point] = field(default_factory=list)
    open: list[Point] = field(default_factory=list)

    def add(self, x: float, y: float) -> None:
        """The next point; one that is not finite is left out."""
        if not math.isfinite(x) or not math.isfinite(y):
            return
        self.open.append((x, y))
        if len(self.open) == self.width:
            self.done.append(mean(self.open))
            self.open = []
        if len(self.done) == MOST:
            self.done = [mean(self.done[place : place + 2]) for place in range(0, MOST, 2)]
            self.width *= 2

    @property
    def points(self) -> list[Point]:
        """What there is so far."""
        return self.done + ([mean(self.open)] if self.open else [])


def mean(points: list[Point]) -> Point:
    """Of points of one line."""
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


@dataclass(frozen=True)
class Course:
    """A training. loss, watched: over tokens from its beginning, in nats a token. tokens: all it trained."""

    kind: str
    loss: list[Point]
    watched: list[Point]
    tokens: float


def course(kind: str, lines: Iterable[str]) -> Course:
    """Read the lines of a `steps.jsonl`; ValueError, KeyError or TypeError when they are something else."""
    loss, watched, tokens = Thinned(), Thinned(), 0.0
    for line in lines:
        step = json.loads(line)
        tokens = float(step["tokens"])
        loss.add(tokens, float(step["loss"]))
        # Older versions measured nothing in between.
        if step.get("watched_ce") is not None:
            watched.add(tokens, float(step["watched_ce"]))
    return Course(kind, loss.points, watched.points, tokens)
