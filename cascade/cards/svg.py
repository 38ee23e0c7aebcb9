"""What charts are made of: a sheet with axes, and marks on it, as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 760, 360
# Of the plot inside the picture.
LEFT, RIGHT, TOP, BOTTOM = 76, 24, 64, 56
# Readable on white, and told apart by people who do not see red and green alike (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK, GREY, GRID, PAPER = "#1f2937", "#6b7280", "#e5e7eb", "#ffffff"
FONT = "ui-sans-serif, system-ui, 'Helvetica Neue', Arial, sans-serif"
# Of the average character at 12 pixels, on the safe side.
CHARACTER = 6.9
LINE = 16.0

Point = tuple[float, float]


@dataclass(frozen=True)
class Scale:
    """From values to pixels, with round ticks; both ends are ticks."""

    ticks: tuple[float, ...]
    first: float
    last: float

    def __call__(self, value: float) -> float:
        low, high = self.ticks[0], self.ticks[-1]
        return self.first + (value - low) / (high - low) * (self.last - self.first)


def scale(values: Sequence[float], first: float, last: float, most: int = 6) -> Scale:
    """A scale around the values, in steps of 1, 2 or 5 times a power of ten, with about `most` of them."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
        margin = abs(high) / 10 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    begin, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    # Divided by whole numbers where the step is below 1, so that 0.3 stays 0.3.
    inverse = round(1 / step) if step < 1 else 0
    return Scale(tuple(i / inverse if inverse else i * step for i in range(begin, end + 1)), first, last)


def tick(value: float) -> str:
    """`135M`, `0.25`: as short as a tick can be."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.6g}{unit}"
    return f"{value:.6g}"


def axes(title: str, across: Scale, up: Scale, x: str, y: str) -> list[str]:
    """Title, grid, ticks and what the axes show."""
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [words(LEFT, 26, title, size=15, weight=600), words(LEFT, TOP - 12, y, colour=GREY, size=12)]
    for value in up.ticks:
        parts.append(stroke(LEFT, up(value), right, up(value), GRID))
        parts.append(words(LEFT - 8, up(value) + 4, tick(value), anchor="end", colour=GREY))
    for value in across.ticks:
        parts.append(stroke(across(value), bottom, across(value), bottom + 5, GREY))
        parts.append(words(across(value), bottom + 20, tick(value), anchor="middle", colour=GREY))
    parts.append(stroke(LEFT, bottom, right, bottom, GREY))
    parts.append(words((LEFT + right) / 2, HEIGHT - 14, x, anchor="middle", colour=GREY))
    return parts


def sheet(title: str, parts: Sequence[str]) -> str:
    """The SVG. Its own background keeps it readable on a dark page."""
    begin = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-family="{FONT}" font-size="12">'
    )
    edge = f'x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8"'
    paper = f'<rect {edge} fill="{PAPER}" stroke="{GRID}"/>'
    return "\n".join([begin, f"<title>{escape(title)}</title>", paper, *parts, "</svg>"]) + "\n"


def words(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    colour: str = INK,
    size: int = 12,
    weight: int = 400,
) -> str:
    """A line of text. x, y: of its base line's start, middle or end."""
    placed = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"'
    return f'<text {placed} font-size="{size}" font-weight="{weight}">{escape(text)}</text>'


def stroke(
    x1: float, y1: float, x2: float, y2: float, colour: str, *, width: float = 1, dashed: bool = False
) -> str:
    """A straight line."""
    dash = ' stroke-dasharray="4 4"' if dashed else ""
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"{dash}/>'


def path(points: Sequence[Point], colour: str, *, width: float = 2) -> str:
    """A line through points in pixels."""
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return (
        f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="{width}" '
        'stroke-linejoin="round" stroke-linecap="round"/>'
    )


def dot(x: float, y: float, colour: str, radius: float) -> str:
    """A filled circle."""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"/>'
