"""Two small charts as SVG: lines over tokens, and models by size and quality."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from cascade.cards.svg import (
    BOTTOM,
    CHARACTER,
    COLOURS,
    GREY,
    HEIGHT,
    INK,
    LEFT,
    LINE,
    PAPER,
    RIGHT,
    TOP,
    WIDTH,
    Point,
    Scale,
    axes,
    dot,
    path,
    scale,
    sheet,
    stroke,
    words,
)

# Between a dot and its name.
GAP = 11.0
LONGEST_NAME = 28
# So few points are drawn as such.
FEW = 24


@dataclass(frozen=True)
class Series:
    """A line. points: by x, finite."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Model:
    """A dot with its name. kind: `parent`, `child` (a line joins them, from the parent on) or `control`."""

    name: str
    x: float
    y: float
    kind: str


def line_chart(
    title: str, series: Sequence[Series], x: str, y: str, ends: Sequence[tuple[float, str]] = ()
) -> str:
    """Lines over a common x. x, y: what the axes show. ends: where another phase begins, and its name."""
    points = [point for one in series for point in one.points]
    across, up = _scales(points)
    parts = axes(title, across, up, x, y)
    for place, name in ends:
        at = across(place)
        parts.append(stroke(at, TOP, at, HEIGHT - BOTTOM, GREY, dashed=True))
        parts.append(words(at + 4, TOP + 12, name, colour=GREY, size=11))
    for one, colour in zip(series, _colours(len(series)), strict=True):
        drawn = [(across(px), up(py)) for px, py in one.points]
        parts.append(path(drawn, colour))
        if len(drawn) <= FEW:
            parts += [dot(px, py, colour, 3) for px, py in drawn]
    if len(series) > 1:
        parts += _legend([one.name for one in series])
    return sheet(title, parts)


def model_chart(title: str, models: Sequence[Model], x: str, y: str) -> str:
    """Models as named dots: further left is smaller, further down is better."""
    sizes = [model.x for model in models]
    # No dot lies on an axis.
    margin = (max(sizes) - min(sizes)) / 20
    corners = [(min(sizes) - margin, models[0].y), (max(sizes) + margin, models[0].y)]
    across, up = _scales([*corners, *((model.x, model.y) for model in models)])
    parts = axes(title, across, up, x, y)
    line = [(across(model.x), up(model.y)) for model in models if model.kind != "control"]
    parts.append(path(line, COLOURS[0], width=1.5))
    # The family is drawn over its controls, and named first.
    for model in sorted(models, key=lambda model: model.kind != "control"):
        parts.append(MARKS[model.kind](across(model.x), up(model.y)))
    dots = [(across(model.x), up(model.y)) for model in models]
    # A name that is struck through can still be read, one that is on another cannot.
    taken = [(4.0, Box(px - 3, py - 3, 6, 6)) for px, py in along(line)]
    taken += [(3.0, Box(px - 7, py - 7, 14, 14)) for px, py in dots]
    for model in sorted(models, key=lambda model: model.kind == "control"):
        text = short(model.name)
        box = free_place(across(model.x), up(model.y), CHARACTER * len(text), taken)
        taken.append((10.0, box))
        colour = GREY if model.kind == "control" else INK
        if abs(middle := box.y + LINE / 2 - up(model.y)) > LINE:
            # So far from its dot a name needs a line to it.
            edge = box.x - 2 if box.x > across(model.x) else box.x + box.width + 2
            parts.insert(0, stroke(across(model.x), up(model.y), edge, up(model.y) + middle, GREY))
        parts.append(words(box.x, box.y + LINE - 4, text, colour=colour))
    return sheet(title, parts)


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels, from its upper left corner."""

    x: float
    y: float
    width: float
    height: float

    def common(self, other: Box) -> float:
        """The area that both cover."""
        across = min(self.x + self.width, other.x + other.width) - max(self.x, other.x)
        down = min(self.y + self.height, other.y + other.height) - max(self.y, other.y)
        return max(across, 0.0) * max(down, 0.0)


PLOT = Box(LEFT, TOP, WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM)


def free_place(x: float, y: float, width: float, taken: Sequence[tuple[float, Box]]) -> Box:
    """Where the name of a dot covers least of what is there, and leaves the plot least; near, if it can.

    taken: boxes, each with how bad it is to cover it.
    """
    places = [
        Box(x + GAP if right else x - GAP - width, y + down - LINE / 2, width, LINE)
        for down in sorted((step * LINE / 4 for step in range(-24, 25)), key=abs)
        for right in (True, False)
    ]

    def lost(place: Box) -> float:
        outside = width * LINE - place.common(PLOT)
        covered = sum(weight * place.common(box) for weight, box in taken)
        return 10 * outside + covered + LINE * abs(place.y + LINE / 2 - y)

    return min(places, key=lost)


def along(points: Sequence[Point], step: float = 6.0) -> list[Point]:
    """Places on a line, one every `step` pixels."""
    found = list[Point]()
    for (x, y), (right, down) in pairwise(points):
        count = math.ceil(math.hypot(right - x, down - y) / step)
        found += [(x + (right - x) * i / count, y + (down - y) * i / count) for i in range(count)]
    return found


def short(name: str) -> str:
    """The name, or its beginning."""
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 3] + "..."


def _scales(points: Sequence[Point]) -> tuple[Scale, Scale]:
    """Of both axes."""
    across = scale([x for x, _ in points], LEFT, WIDTH - RIGHT)
    return across, scale([y for _, y in points], HEIGHT - BOTTOM, TOP, most=5)


def _legend(names: Sequence[str]) -> list[str]:
    """Names of the lines, from the right end of the line above the plot."""
    parts, right = list[str](), float(WIDTH - RIGHT)
    for name, colour in reversed(list(zip(names, _colours(len(names)), strict=True))):
        text = short(name)
        right -= CHARACTER * len(text)
        parts.append(words(right, TOP - 12, text))
        parts.append(stroke(right - 24, TOP - 16, right - 6, TOP - 16, colour, width=3))
        right -= 40
    return parts


def _colours(count: int) -> list[str]:
    return [COLOURS[place % len(COLOURS)] for place in range(count)]


def _square(x: float, y: float) -> str:
    return f'<rect x="{x - 6:.1f}" y="{y - 6:.1f}" width="12" height="12" rx="2" fill="{INK}"/>'


def _ring(x: float, y: float) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{PAPER}" stroke="{COLOURS[1]}" stroke-width="2"/>'


MARKS: dict[str, Callable[[float, float], str]] = {
    "parent": _square,
    "child": lambda x, y: dot(x, y, COLOURS[0], 6),
    "control": _ring,
}
