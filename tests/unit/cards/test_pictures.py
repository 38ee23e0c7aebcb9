"""Charts as SVG: well-formed, marks where they belong, names that can be read."""

from __future__ import annotations

import re
from itertools import combinations
from xml.etree import ElementTree

import pytest

from cascade.cards.pictures import Box, Model, Series, free_place, line_chart, model_chart
from cascade.cards.svg import BOTTOM, CHARACTER, HEIGHT, LEFT, LINE, RIGHT, TOP, WIDTH, scale, tick

SVG = "{http://www.w3.org/2000/svg}"


def elements(svg: str, tag: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(svg).iter(SVG + tag))


def points(line: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (one.split(",") for one in line.attrib["points"].split())]


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ((0.0, 7000.0), (0, 2000, 4000, 6000, 8000)),
        ((2.51, 2.9), (2.5, 2.6, 2.7, 2.8, 2.9)),
        ((3.0, 3.0), (2.7, 2.8, 2.9, 3.0, 3.1, 3.2, 3.3)),
        ((0.0, 0.0), (-1.0, -0.5, 0.0, 0.5, 1.0)),
        ((-0.2, 0.3), (-0.2, -0.1, 0.0, 0.1, 0.2, 0.3)),
    ],
)
def test_ticks_are_round_and_hold_all_values(values: tuple[float, ...], ticks: tuple[float, ...]) -> None:
    found = scale(values, 0, 100)
    assert found.ticks == pytest.approx(ticks, abs=1e-12)
    assert found(found.ticks[0]) == 0
    assert found(found.ticks[-1]) == 100
    assert len({tick(value) for value in found.ticks}) == len(ticks)


@pytest.mark.parametrize(
    ("value", "text"), [(134_500_000, "134.5M"), (2e9, "2B"), (20_480, "20.48k"), (0.3, "0.3"), (0, "0")]
)
def test_ticks_are_short(value: float, text: str) -> None:
    assert tick(value) == text


def test_a_line_goes_through_its_points() -> None:
    svg = line_chart("Loss", [Series("loss", [(0, 4.0), (50, 3.0), (100, 2.0)])], "tokens", "nats")
    (line,) = elements(svg, "polyline")
    left, right, bottom, top = LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM, TOP
    assert points(line) == [(left, top), ((left + right) / 2, (bottom + top) / 2), (right, bottom)]
    assert len(elements(svg, "circle")) == 3
    # Nothing to tell apart, so no legend.
    assert "loss" not in [text.text for text in elements(svg, "text")]
    assert elements(svg, "rect")[0].attrib["fill"] == "#ffffff"


def test_lines_have_a_legend_and_phases_have_names() -> None:
    both = [Series("distillation", [(1, 2.0), (2, 1.0)]), Series("on-policy", [(3, 1.0), (4, 0.5)])]
    svg = line_chart("Loss", both, "tokens", "nats", [(2, "then")])
    texts = [text.text for text in elements(svg, "text")]
    assert {"distillation", "on-policy", "then", "Loss", "tokens", "nats"} <= set(texts)
    colours = [line.attrib["stroke"] for line in elements(svg, "polyline")]
    assert len(set(colours)) == 2
    (phase,) = [line for line in elements(svg, "line") if "stroke-dasharray" in line.attrib]
    first, second = map(points, elements(svg, "polyline"))
    assert float(phase.attrib["x1"]) == pytest.approx(first[-1][0])
    assert second[0][0] > first[-1][0]


def test_smaller_models_stand_further_left_and_better_ones_further_down() -> None:
    models = [
        Model("parent", 1000, 2.5, "parent"),
        Model("large", 800, 2.7, "child"),
        Model("small", 500, 3.0, "child"),
        Model("small-scratch", 500, 4.0, "control"),
    ]
    svg = model_chart("Family", models, "parameters", "nats")
    (line,) = elements(svg, "polyline")
    (parent, large, small) = points(line)
    assert parent[0] > large[0] > small[0]
    # Up is less in SVG.
    assert parent[1] > large[1] > small[1]
    circles = [(float(one.attrib["cx"]), float(one.attrib["cy"])) for one in elements(svg, "circle")]
    assert large in circles
    assert small in circles
    (control,) = [place for place in circles if place not in (large, small)]
    assert control[0] == small[0]
    assert control[1] < small[1]


def boxes_of_names(svg: str, names: list[str]) -> dict[str, Box]:
    return {
        str(one.text): Box(
            float(one.attrib["x"]), float(one.attrib["y"]) - LINE + 4, CHARACTER * len(str(one.text)), LINE
        )
        for one in elements(svg, "text")
        if one.text in names
    }


def test_names_cover_neither_each_other_nor_the_edge() -> None:
    models = [Model("parent", 1000, 3.0, "parent"), Model("small", 500, 3.31, "child")]
    models += [Model(f"small-control-{i}", 500, 3.3 + i / 100, "control") for i in range(5)]
    svg = model_chart("Family", models, "parameters", "nats")
    boxes = boxes_of_names(svg, [model.name for model in models])
    assert len(boxes) == len(models)
    for (_, one), (_, other) in combinations(boxes.items(), 2):
        assert one.common(other) == 0
    plot = Box(LEFT, TOP, WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM)
    for box in boxes.values():
        assert box.common(plot) == pytest.approx(box.width * box.height)


def test_a_name_stands_right_of_its_dot_where_there_is_room() -> None:
    box = free_place(200, 150, 50, [])
    assert (box.x, box.y + LINE / 2) == (211, 150)
    assert free_place(WIDTH - RIGHT - 20, 150, 50, []).x < WIDTH - RIGHT - 20


def test_hostile_names_stay_text() -> None:
    name = '</text><script>alert("1")</script>&'
    svg = model_chart(name, [Model("parent", 2, 1.0, "parent"), Model(name, 1, 2.0, "child")], "x<y", "a&b")
    assert elements(svg, "script") == []
    texts = [text.text for text in elements(svg, "text")]
    assert name in texts
    assert "x<y" in texts
    # A long one is cut.
    assert name[:25] + "..." in texts


def test_one_model_alone_and_one_point_alone_are_drawn() -> None:
    ElementTree.fromstring(model_chart("Family", [Model("parent", 7, 2.0, "parent")], "x", "y"))
    svg = line_chart("Loss", [Series("loss", [(5, 1.0)])], "x", "y")
    assert len(elements(svg, "circle")) == 1
    assert not re.search("nan|inf", svg.lower())
