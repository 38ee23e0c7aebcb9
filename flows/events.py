"""Events that automations can act on: of stages that begin, end, are reused or rejected, and of families.

Prefect adds the flow run, its deployment and its work pool as related resources.
"""

from __future__ import annotations

from typing import Any

from prefect.events import emit_event

from cascade.storage.locations import open_location

Json = dict[str, Any]
# Curves: too long for an event, and family.json has them.
LONG = ("race",)
FAMILY_ROLE = "cascade-family"
# A stage is told once a run, however often its card is shown or a node of it tried.
_told: set[tuple[str, str, str, str]] = set()


def stage_started(family: str, stage: Json, store: str, run: str) -> None:
    """Its first node is about to be made. stage: what is known of its row, `name` at least."""
    _stage("started", family, stage, store, run)


def stage_completed(family: str, stage: Json, store: str, run: str) -> None:
    """The child is trained and evaluated. stage: its row in family.json."""
    _stage("completed", family, stage, store, run)


def stage_reused(family: str, stage: Json, store: str, run: str) -> None:
    """The child was there before. stage: its row in family.json."""
    _stage("reused", family, stage, store, run)


def stage_rejected(family: str, stage: Json, store: str, run: str) -> None:
    """The quality gate failed. stage: its row in family.json, and `shortfalls`: what fell short."""
    _stage("rejected", family, stage, store, run)


def family_completed(index: Json, store: str) -> None:
    """All of the recipe is built. index: what family.json holds."""
    _family("completed", index, store)


def family_promoted(index: Json, store: str, alias: str) -> None:
    """An alias names another build from now on. index: that build's."""
    _family("promoted", index, store, alias=alias)


def _stage(what: str, family: str, stage: Json, store: str, run: str) -> None:
    figures = {name: value for name, value in stage.items() if name not in (*LONG, "name")}
    event = (what, family, str(stage["name"]), run)
    if event in _told:
        return
    _told.add(event)
    emit_event(
        f"cascade.stage.{what}",
        resource={
            "prefect.resource.id": f"cascade.stage.{family}.{stage['name']}",
            "prefect.resource.name": f"{family}/{stage['name']}",
            "cascade.family": family,
            "cascade.stage": stage["name"],
        },
        related=[family_resource(family) | {"prefect.resource.role": FAMILY_ROLE}],
        payload={**place(family, store), "run": run, "stage": stage["name"], **figures},
    )


def _family(what: str, index: Json, store: str, **more: str) -> None:
    family = index["family"]
    stages = [{name: value for name, value in stage.items() if name not in LONG} for stage in index["stages"]]
    figures = {"run": index["run"], "parent": index["parent"], "stages": stages, **more}
    emit_event(
        f"cascade.family.{what}",
        resource=family_resource(family) | {f"cascade.{name}": value for name, value in more.items()},
        payload={**place(family, store), **figures},
    )


def family_resource(family: str) -> dict[str, str]:
    """A family as automations name it."""
    return {
        "prefect.resource.id": f"cascade.family.{family}",
        "prefect.resource.name": family,
        "cascade.family": family,
    }


def place(family: str, store: str) -> dict[str, str]:
    """Where it is."""
    root = open_location(store)
    return {"family": family, "store": root.uri, "uri": (root / family).uri}
