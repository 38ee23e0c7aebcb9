"""The cards of a stage and of a family: what they say, and that no name breaks them."""

from __future__ import annotations

import base64
import re
from typing import Any

import pytest

from cascade.cards.card import Card
from cascade.cards.curves import Course
from cascade.cards.family import family_card
from cascade.cards.gate import gate_part
from cascade.cards.links import Links
from cascade.cards.markdown import code, label, plain, table
from cascade.cards.stage import stage_card
from tests.unit.cards.indexes import ROOT, SIZES, artifact, cost, index, key, row

LINKS = Links("s3://bucket")
COURSE = Course("distilled", [(64, 2.0), (128, 1.0)], [], 128)
END = {"tokens": 64, "ce": 4.5, "kl": 1.0}


def tables(text: str) -> list[list[list[str]]]:
    """Every table's rows of cells; a bar behind a backslash belongs to its cell."""
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif found[-1]:
            found.append([])
    return [rows for rows in found if rows]


def assert_even(text: str) -> None:
    """All rows of a table have as many cells."""
    for rows in tables(text):
        assert len({len(cells) for cells in rows}) == 1, rows


def section(text: str, heading: str) -> str:
    """What stands below a heading."""
    return text.split(f"## {heading}\n\n")[1].split("\n## ")[0]


def small_card(**changes: Any) -> Card:
    tree = index()
    tree["stages"][1].update(changes)
    return stage_card(tree, tree["stages"][1], [COURSE], LINKS)


def test_a_stage_stands_beside_its_parent() -> None:
    text = small_card().text
    assert text.startswith("# Stage small of family tiny\n")
    assert "**50.0 % of the parent's parameters; held-out cross-entropy 3.000 nats a token" in text
    assert "against 2.500 (+0.500)" in text
    assert "from 1.600 to 0.400 nats: 75.0 % less" in text
    (figures, costs) = tables(text)
    assert figures[0] == ["figure", "parent", "untrained", "child"]
    rows = {cells[0]: cells[1:] for cells in figures}
    assert rows["parameters"] == ["1,000", "", "500"]
    assert rows["held-out cross-entropy, nats a token"] == ["2.5000", "4.0000", "3.0000"]
    assert rows["held-out perplexity"] == ["12.18", "54.60", "20.09"]
    assert rows["stored bytes"] == ["1,013", "", "1,015"]
    assert [cells[0] for cells in costs] == ["node", "---", "small/pruned", "**small**"]
    assert_even(text)


def test_a_stage_says_where_it_lies_and_how_to_load_it() -> None:
    uri = artifact("small/distilled")["uri"]
    text = small_card().text
    assert section(text, "Where it lies").strip() == f"- `{uri}`"
    assert f"get('{uri}/', folder + '/', recursive=True)" in text
    assert f"cascade show {uri}\n" in text
    # Without a bucket there is nothing to fetch.
    here = small_card(checkpoint="/a store/small").text
    assert "fsspec" not in here
    assert "folder = '/a store/small'" in here
    assert "cascade show '/a store/small'\n" in here


@pytest.mark.parametrize(
    ("pattern", "address"),
    [
        ("", ""),
        ("http://127.0.0.1:8888/buckets/{bucket}/{prefix}", "http://127.0.0.1:8888/buckets/b/a%20b/c%29"),
        ("https://console/{other}?p={prefix}", "https://console/{other}?p=a%20b/c%29"),
    ],
)
def test_a_place_is_code_and_a_link_where_a_browser_shows_it(pattern: str, address: str) -> None:
    text = Links("s3://b", pattern).place("s3://b/a b/c)")
    assert text == "`s3://b/a b/c)`" + (f" ([browse]({address}))" if address else "")
    assert Links("/here", pattern).place("/here/a") == "`/here/a`"


def arrows_of(graph: str) -> set[tuple[str, str, str]]:
    """Of a flowchart, by the first lines of its boxes."""
    names = dict(re.findall(r'^  (n\d+)[\[(]+"([^"<]+)<br/>', graph, re.M))
    return {
        (names[source], arrow, names[target])
        for source, arrow, target in re.findall(r"^  (n\d+) (\S.*\S) (n\d+)$", graph, re.M)
    }


def test_lineage_goes_from_the_parent_to_the_child_with_its_teacher_and_corpus() -> None:
    graph = section(small_card().text, "Lineage")
    assert graph.startswith("```mermaid\nflowchart TD\n")
    assert arrows_of(graph) == {
        ("parent", "-->", "large pruned"),
        ("large pruned", "-->", "large distilled"),
        ("large distilled", "-->", "small pruned"),
        ("small pruned", "-->", "small distilled"),
        ("signals", "-. teaches .->", "small distilled"),
        ("parent", "-.->", "signals"),
        ("corpus", "-.->", "signals"),
    }
    assert "someone/a-parent" in graph
    assert re.findall(r'"small distilled<br/>\w{12}"\]\):::child', graph)


def test_a_cut_that_says_where_layers_come_from_teaches_nobody() -> None:
    tree = index()
    taught = next(one for one in tree["artifacts"] if one["node"] == "small/distilled")
    taught["inputs"] |= {"cut": key("small/pruned"), "cut-2": key("large/pruned")}
    graph = section(stage_card(tree, tree["stages"][1], [], LINKS).text, "Lineage")
    assert arrows_of(graph) == arrows_of(section(small_card().text, "Lineage"))


def test_the_pictures_stand_beside_the_card_or_inside_it() -> None:
    card = small_card()
    assert set(card.files) == {"small/card.md", "small/loss.svg"}
    assert "\n![Training loss](loss.svg)\n" in card.text
    (data,) = re.findall(r"^!\[Training loss\]\(data:image/svg\+xml;base64,(\S+)\)$", card.inline, re.M)
    assert base64.b64decode(data).decode() == card.pictures["loss.svg"]
    # Whatever else looks like a picture stays as it is.
    assert Card("a", "b", "![x](other.svg)\n", {"loss.svg": "<svg/>"}).inline == "![x](other.svg)\n"


def test_a_stage_without_steps_has_no_picture() -> None:
    tree = index()
    card = stage_card(tree, tree["stages"][0], [], LINKS)
    assert "## Training" not in card.text
    assert set(card.files) == {"large/card.md"}


def test_one_training_follows_the_other() -> None:
    tree = index()
    found = {"stopped_early": True, "best_tokens": 64, "best_ce": 2.25, "last_ce": 2.5}
    stage = row("small", before_on_policy=row("small"), watched={"distilled": found})
    courses = [
        Course("distilled", [(64, 2.0), (128, 1.0)], [(64, 2.25), (128, 2.5)], 128),
        Course("on_policy", [(64, 0.5)], [], 64),
    ]
    card = stage_card(tree, stage, courses, LINKS)
    assert set(card.pictures) == {"loss.svg", "watched.svg"}
    assert "on-policy training" in card.pictures["loss.svg"]
    assert (
        "The distillation ended early; the watched cross-entropy was lowest after 64 tokens: 2.2500"
        in card.text
    )
    assert tables(card.text)[0][0] == ["figure", "parent", "untrained", "distilled", "child"]


def test_a_race_and_a_long_context_are_tables() -> None:
    tree = index()
    race = [
        {"architecture": SIZES, "parameters": 500, "curve": [END], "won": False},
        {"architecture": SIZES, "parameters": 510, "curve": [END, END | {"tokens": 128}], "won": True},
    ]
    long = {
        **row("small extended"),
        "of": "small",
        "sequence_length": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000},
        "parent_held_out_ce": 2.0,
        "before_held_out_ce": 3.0,
        "before_kl_to_parent": 1.0,
    }
    tree["extended"] = [long]
    tree["ledger"]["entries"].append(cost("small extended", "small/extended"))
    text = stage_card(tree, tree["stages"][1] | {"race": race}, [], LINKS).text
    assert "| out after 64 tokens |" in section(text, "Race")
    assert section(text, "Long contexts").splitlines()[2].startswith("| small extended | 256 |")
    assert "**small extended**" in section(text, "Cost")
    # It belongs to the other stage.
    assert "Long contexts" not in stage_card(tree, tree["stages"][0], [], LINKS).text
    assert_even(text)


VERDICT = {"stage": "small", "figure": "kl_to_parent", "value": 0.4, "limit": 0.5, "bound": "at most"}


def test_the_gate_names_what_fell_short() -> None:
    tree = index()
    assert gate_part(tree) == ""
    tree["gate"] = [VERDICT | {"passed": True}, VERDICT | {"limit": 0.3, "passed": False}]
    text = stage_card(tree, tree["stages"][1], [], LINKS).text
    assert "**Fell short: 1 of 2 limits.**" in section(text, "Quality gate")
    assert tables(section(text, "Quality gate"))[0][3] == [
        "small",
        "kl to parent",
        "0.4",
        "at most 0.3",
        "**no**",
    ]
    assert "Quality gate" not in stage_card(tree, tree["stages"][0], [], LINKS).text
    tree["gate"] = [VERDICT | {"passed": True}]
    assert "**Passed.**" in family_card(tree, LINKS).text


def test_a_control_says_how_much_worse_it_is() -> None:
    tree = index()
    differences = {"held_out_ce_difference": 0.25, "kl_to_parent_difference": -0.125}
    control = row("small-scratch", control="scratch", of="small", seed=0, **differences)
    tree["controls"] = [control]
    card = stage_card(tree, control, [], LINKS)
    assert card.text.startswith("# Control small-scratch of family tiny\n")
    assert (
        "Beside stage small it is worse by +0.250 nats of cross-entropy and -0.125 of divergence" in card.text
    )
    family = family_card(tree, LINKS)
    assert "small-scratch" in section(family.text, "Controls")
    assert "small-scratch" in family.pictures["family.svg"]


def test_the_family_has_its_table_picture_cost_and_command() -> None:
    card = family_card(index(), LINKS)
    assert set(card.files) == {"card.md", "family.svg"}
    lines = card.text.splitlines()
    assert "| small | 500 | 4.000 | 3.000 | 0.400 | 75.5 % | 150 | 4,096 | reused |" in lines
    assert f"- small: `{ROOT}/small/distilled/{artifact('small/distilled')['key'][:12]}`" in lines
    assert "![Size and quality](family.svg)" in lines
    assert "cascade build s3://bucket/tiny/recipe.yaml --store s3://bucket" in lines
    assert "The family took 3.000 x the FLOPs of its floor" in card.text
    assert [cells[0] for cells in tables(section(card.text, "Cost"))[0]][2:] == [
        *("shared", "large", "small", "**family**")
    ]
    graph = section(card.text, "Lineage")
    assert graph.count(":::child") == 2
    assert_even(card.text)


HOSTILE = 'a|b`c"d<script>#$[x](http://y)\n# Heading\n```\n--> n1'


def test_hostile_names_break_nothing() -> None:
    tree = index()
    tree["recipe"]["parent"] = HOSTILE
    tree["stages"][1]["checkpoint"] = f"/store {HOSTILE}"
    tree["artifacts"][-2]["uri"] = f"/store {HOSTILE}"
    for card in (family_card(tree, LINKS), stage_card(tree, tree["stages"][1], [COURSE], LINKS)):
        assert_even(card.text)
        outside = re.sub(r"^(`{3,})\w*\n.*?\n\1$", "", card.text, flags=re.M | re.S)
        assert "# Heading" not in outside.splitlines()
        assert "```" not in outside.splitlines()
        graph = re.findall(r"^```mermaid\n(.*?)\n```$", card.text, re.M | re.S)
        assert len(graph) == 1
        assert "<script>" not in graph[0]
        assert all(line.count('"') in (0, 2) for line in graph[0].splitlines())


@pytest.mark.parametrize(
    ("text", "cell"),
    [("a|b", r"a\|b"), ("`a|b`", r"`a\|b`"), ("a\nb", "a b"), (r"a\|b", r"a\|b"), ("", "")],
)
def test_a_cell_stays_a_cell(text: str, cell: str) -> None:
    assert table(["x"], [[text]]).splitlines() == ["| x |", "| --- |", f"| {cell} |"]


def test_pieces_of_markdown() -> None:
    assert code("a") == "`a`"
    assert code("a`b") == "``a`b``"
    assert code("`a") == "`` `a ``"
    assert plain("*a* <b> [c](d)") == r"\*a\* \<b\> \[c\](d)"
    assert label('a "b" <c> #') == "a #34;b#34; #60;c#62; #35;"
    assert label("/" + 50 * "x") == "..." + 37 * "x"
