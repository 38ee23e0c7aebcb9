"""Which artifact came from which, as a mermaid flowchart."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from cascade.cards.markdown import block, label
from cascade.kinds import TRAININGS, Kind

Json = dict[str, Any]
# Roles by which one model goes on as another; whatever else goes in is text, or teaches.
GOES_ON = ("student", "checkpoint", "distilled")
# No person looks for them: scores of what to cut, legs of a race, and a text that is only measured.
HIDDEN = (Kind.IMPORTANCE, Kind.RACED, Kind.WATCHED)
# Roles of cuts that say where layers come from: they are between teacher and student anyhow.
ORIGINS = "cut"
STYLE = "classDef child fill:#dbeafe,stroke:#0072b2,color:#1f2937,stroke-width:2px"


def lineage(index: Json, ends: Collection[str]) -> str:
    """From the parent to the artifacts with these URIs, with what taught the stages they belong to."""
    artifacts: dict[str, Json] = {one["key"]: one for one in index["artifacts"] if kind(one) not in HIDDEN}
    last = [key for key, one in artifacts.items() if one["uri"] in ends]
    stages = {stage(artifacts[key]) for key in last}
    found, waiting, lines = dict[str, str](), list(last), list[str]()
    while waiting:
        key = waiting.pop(0)
        if key not in found:
            found[key] = f"n{len(found)}"
            waiting += edges(artifacts, key, stages)
    for key, name in found.items():
        lines.append(name + shape(index, artifacts[key], key in last))
    for key, name in found.items():
        for source, arrow in edges(artifacts, key, stages).items():
            lines.append(f"{found[source]} {arrow} {name}")
    return block("\n".join(["flowchart TD", *(f"  {line}" for line in (*lines, STYLE))]), "mermaid")


def edges(artifacts: dict[str, Json], key: str, stages: set[str]) -> dict[str, str]:
    """What an artifact was made from, each with its arrow: what matters to a person."""
    made = artifacts[key]
    inputs = {
        role: source
        for role, source in made.get("inputs", {}).items()
        if source in artifacts and not role.startswith(ORIGINS)
    }
    arrows = {source: "-->" for role, source in inputs.items() if role in GOES_ON}
    shown = kind(made) == Kind.SIGNALS or (kind(made) in TRAININGS and stage(made) in stages)
    if shown:
        # What signals were made from is seen there.
        stored = [source for source in inputs.values() if kind(artifacts[source]) == Kind.SIGNALS]
        behind = {source for one in stored for source in artifacts[one].get("inputs", {}).values()}
        for source in inputs.values():
            if source not in behind:
                teaches = kind(made) in TRAININGS and kind(artifacts[source]) != Kind.CORPUS
                arrows.setdefault(source, "-. teaches .->" if teaches else "-.->")
    return arrows


def kind(artifact: Json) -> str:
    """Of an index's artifact, whose node is called `<stage>/<kind>`."""
    return str(artifact["node"]).rpartition("/")[2]


def stage(artifact: Json) -> str:
    """Where it is browsed."""
    return str(artifact["node"]).rpartition("/")[0]


def shape(index: Json, artifact: Json, is_end: bool) -> str:
    """A box with a name; a drum where it is no model."""
    what = kind(artifact)
    if what == Kind.PARENT:
        lines = ["parent", label(str(index["recipe"]["parent"]))]
    else:
        # What families share is no stage's.
        of = "" if what in (Kind.CORPUS, Kind.SIGNALS, Kind.CORRECTED) else f"{stage(artifact)} "
        lines = [label(of + what.replace("_", "-")), artifact["key"][:12]]
    text = "<br/>".join(lines)
    if what in (Kind.CORPUS, Kind.SIGNALS):
        return f'[("{text}")]'
    return f'(["{text}"]):::child' if is_end else f'["{text}"]'
