"""The card of a stage: what came out, beside the parent, how, from what, at which cost, and where it lies."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from cascade.cards.card import Card, assembled
from cascade.cards.curves import Course
from cascade.cards.gate import gate_part
from cascade.cards.lineage import lineage
from cascade.cards.links import S3, Links
from cascade.cards.markdown import block, table
from cascade.cards.pictures import Series, line_chart
from cascade.kinds import Kind
from cascade.tables.family import EXTENDED_COLUMNS, extended_rows, signed
from cascade.tables.ledger import LEDGER_COLUMNS, ledger_cells
from cascade.tables.races import race_columns, race_rows, shape_text

Json = dict[str, Any]
LOSS, WATCHED = "loss.svg", "watched.svg"
TITLES = {LOSS: "Training loss", WATCHED: "Watched cross-entropy"}
WORDS: dict[str, str] = {Kind.DISTILLED: "distillation", Kind.ON_POLICY: "on-policy training"}


def stage_card(index: Json, row: Json, courses: Sequence[Course], links: Links) -> Card:
    """Of a stage or a control. row: its row in the index. courses: of its trainings, those that are known."""
    pictures = training_pictures(row, courses)
    long = [other for other in index.get("extended", []) if other["of"] == row["name"]]
    parts = {
        "": verdict(index, row),
        "Quality gate": gate_part(index, row["name"]),
        "Figures": figures(index, row),
        "Training": training(row, pictures),
        "Race": table(race_columns(row), race_rows(row)) if row.get("race") else "",
        "Long contexts": table(EXTENDED_COLUMNS, extended_rows({"extended": long})) if long else "",
        "Lineage": lineage(index, [row["checkpoint"], *(other["checkpoint"] for other in long)]),
        "Cost": cost(index, [row["name"], *(other["name"] for other in long)]),
        "Where it lies": "\n".join(f"- {links.place(one['checkpoint'])}" for one in (row, *long)),
        "Use it": usage(row),
    }
    what = f"Control {row['name']}" if row.get("control") else f"Stage {row['name']}"
    text = assembled(f"{what} of family {index['family']}", parts)
    return Card(index["family"], row["name"], text, pictures, row)


def verdict(index: Json, row: Json) -> str:
    """In two sentences: how small and how good, what the cut cost and how much of that came back."""
    parent = index["parent"]
    share = 100 * row["parameters"] / parent["parameters"]
    worse = row["held_out_ce"] - parent["held_out_ce"]
    lines = [
        f"**{share:.1f} % of the parent's parameters; held-out cross-entropy {row['held_out_ce']:.3f} nats a "
        f"token against {parent['held_out_ce']:.3f} ({signed(worse)}), the same first choice for "
        f"{100 * row['top1_agreement']:.1f} % of tokens.**"
    ]
    lost = row["pruned_kl_to_parent"] - row["kl_to_parent"]
    if row["pruned_kl_to_parent"] > 0:
        lines.append(
            f"Training took the divergence from the parent from {row['pruned_kl_to_parent']:.3f} to "
            f"{row['kl_to_parent']:.3f} nats: {100 * lost / row['pruned_kl_to_parent']:.1f} % less."
        )
    if row.get("control"):
        lines.append(
            f"Beside stage {row['of']} it is worse by {signed(row['held_out_ce_difference'])} nats of "
            f"cross-entropy and {signed(row['kl_to_parent_difference'])} of divergence."
        )
    return "\n".join(lines)


def figures(index: Json, row: Json) -> str:
    """Beside the parent's."""
    parent, distilled = index["parent"], row.get("before_on_policy")
    before = {
        name.removeprefix("pruned_"): value for name, value in row.items() if name.startswith("pruned_")
    }
    size = {one["uri"]: one["bytes"] for one in index["artifacts"]}
    columns: dict[str, Json] = {
        "parent": {**parent, "bytes": size.get(parent["uri"])},
        "untrained": before,
        **({"distilled": distilled} if distilled else {}),
        "child": {**row, "bytes": size.get(row["checkpoint"])},
    }
    rows = [
        [name, *(cell(column.get(key), form) for column in columns.values())] for name, key, form in FIGURES
    ]
    perplexity = [f"{math.exp(min(column['held_out_ce'], 700)):,.2f}" for column in columns.values()]
    rows.insert(3, ["held-out perplexity", *perplexity])
    return f"{table(['figure', *columns], rows)}\n\nShape: {shape_text(row['architecture'])}."


FIGURES = (
    ("parameters", "parameters", "{:,}"),
    ("parameters without embeddings", "non_embedding_parameters", "{:,}"),
    ("held-out cross-entropy, nats a token", "held_out_ce", "{:.4f}"),
    ("KL to parent, nats a token", "kl_to_parent", "{:.4f}"),
    ("top-1 agreement", "top1_agreement", "{:.2%}"),
    ("tokens/s", "tokens_per_second", "{:,.0f}"),
    ("stored bytes", "bytes", "{:,}"),
)


def cell(value: object, form: str) -> str:
    """A figure, or nothing."""
    return "" if value is None else form.format(value)


def training_pictures(row: Json, courses: Sequence[Course]) -> dict[str, str]:
    """File -> SVG: the loss, and what was watched; of one training after the other."""
    begins, at = list[float](), 0.0
    for course in courses:
        begins.append(at)
        at += course.tokens
    ends = [
        (begin, WORDS.get(course.kind, course.kind)) for begin, course in zip(begins, courses, strict=True)
    ][1:]
    pictures = {}
    for file, name in ((LOSS, "loss"), (WATCHED, "watched")):
        series = [
            Series(WORDS.get(course.kind, course.kind), [(begin + x, y) for x, y in getattr(course, name)])
            for begin, course in zip(begins, courses, strict=True)
            if getattr(course, name)
        ]
        if series:
            title = f"{TITLES[file]} of {row['name']}"
            pictures[file] = line_chart(title, series, "tokens trained", "nats a token", ends)
    return pictures


def training(row: Json, pictures: dict[str, str]) -> str:
    """The pictures, and what a watch found."""
    parts = [f"![{TITLES[name]}]({name})" for name in pictures]
    parts += [watched(kind, found) for kind, found in row.get("watched", {}).items()]
    return "\n\n".join(parts)


def watched(kind: str, found: Json) -> str:
    """What the watch of one training found."""
    end = "ended early" if found["stopped_early"] else "went to its end"
    return (
        f"The {WORDS.get(kind, kind)} {end}; the watched cross-entropy was lowest after "
        f"{found['best_tokens']:,} tokens: {found['best_ce']:.4f} nats (at the end {found['last_ce']:.4f})."
    )


def cost(index: Json, names: Sequence[str]) -> str:
    """Of its nodes, whichever run made them; what stages share is in the family's card."""

    def lines() -> Iterator[list[str]]:
        for entry in index["ledger"]["entries"]:
            if entry["name"] in names:
                for node in entry["nodes"]:
                    yield ledger_cells(node)
                yield [f"**{text}**" if text else "" for text in ledger_cells(entry)]

    return table(LEDGER_COLUMNS, list(lines()))


def usage(row: Json) -> str:
    """Lines that load it, and that look closer."""
    uri, name = row["checkpoint"], row["name"]
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", "", f"folder = {uri!r}"]
    if uri.startswith(S3):
        # Slashes at the ends: into that folder, whether it exists or not.
        download = f"fsspec.filesystem('s3').get({uri + '/'!r}, folder + '/', recursive=True)"
        lines = ["import fsspec", *lines[:-1], f"folder = {name!r}", download]
    lines += [
        "model = AutoModelForCausalLM.from_pretrained(folder)",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
    ]
    look = [f"cascade {verb} {shlex.quote(uri)}" for verb in ("show", "verify")]
    return block("\n".join(lines), "python") + "\n\n" + block("\n".join(look), "sh")
