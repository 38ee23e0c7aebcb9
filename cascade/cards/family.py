"""The card of a family: its table and picture, its lineage and cost, and how to make it again."""

from __future__ import annotations

from typing import Any

from cascade.cards.card import Card, assembled
from cascade.cards.gate import gate_part
from cascade.cards.lineage import lineage
from cascade.cards.links import Links
from cascade.cards.markdown import block, plain, table
from cascade.cards.pictures import Model, model_chart
from cascade.tables.family import (
    CONTROL_COLUMNS,
    EXTENDED_COLUMNS,
    FAMILY_COLUMNS,
    control_rows,
    extended_rows,
    family_rows,
)
from cascade.tables.ledger import LEDGER_COLUMNS, ledger_cells, tera

Json = dict[str, Any]
PICTURE = "family.svg"
UNITS = "Cross-entropy (CE) and KL are held-out, in nats a token."


def family_card(index: Json, links: Links) -> Card:
    """The family so far. S3 URIs stand as code: Prefect strips links to them."""
    children = [*index["stages"], *index.get("extended", [])]
    controls = index.get("controls", [])
    parts = {
        "": f"Cut from {plain(index['recipe']['parent'])} by build {plain(index['run'])}.",
        "Models": f"{models(index)}\n\n{UNITS}",
        "Quality gate": gate_part(index),
        "Size and quality": f"![Size and quality]({PICTURE})",
        "Long contexts": table(EXTENDED_COLUMNS, extended_rows(index)) if index.get("extended") else "",
        "Controls": table(CONTROL_COLUMNS, control_rows(index)) if controls else "",
        "Lineage": lineage(index, [one["checkpoint"] for one in (*children, *controls)]),
        "Cost": ledger(index),
        "Checkpoints": "\n".join(f"- {one['name']}: {links.place(one['checkpoint'])}" for one in children),
        "Again": "Makes what is missing, and finds the rest done:\n\n"
        + block(links.build(index["family"]), "sh"),
    }
    text = assembled(f"Family {index['family']}", parts)
    return Card(index["family"], "", text, {PICTURE: picture(index)})


def models(index: Json) -> str:
    """The family's table, narrow enough for a page: seconds are in the ledger, and what a watch found is in
    the stage's card."""
    seconds = FAMILY_COLUMNS.index("seconds")
    rows = [[*row[:seconds], row[-1].partition(",")[0]] for row in family_rows(index)]
    return table((*FAMILY_COLUMNS[:seconds], FAMILY_COLUMNS[-1]), rows)


def picture(index: Json) -> str:
    """Every model that is measured on the same rows, by its size and its held-out cross-entropy."""
    rows = [("parent", index["parent"], "parent")]
    rows += [(stage["name"], stage, "child") for stage in index["stages"]]
    rows += [(control["name"], control, "control") for control in index.get("controls", [])]
    models = [Model(name, row["parameters"], row["held_out_ce"], kind) for name, row, kind in rows]
    title = f"Family {index['family']}: size and quality"
    return model_chart(title, models, "parameters", "held-out cross-entropy, nats a token")


def ledger(index: Json) -> str:
    """One line an entry, the family's sum, and the two costs it is compared with."""
    found = index["ledger"]
    rows = [ledger_cells(entry) for entry in found["entries"]]
    rows.append([f"**{text}**" if text else "" for text in ledger_cells(found["family"])])
    if not found["over_floor"]:
        return table(LEDGER_COLUMNS, rows)
    compared = (
        f"The family took {found['over_floor']:.3f} x the FLOPs of its floor ({tera(found['floor_flops'])} "
        "TFLOPs: one teacher pass and the students); separate runs take "
        f"{found['separate_over_family']:.3f} x the family's."
    )
    return f"{table(LEDGER_COLUMNS, rows)}\n\n{compared}"
