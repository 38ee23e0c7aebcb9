"""deploy/prefect.yaml as today's recipes and options make it; `python -m tests.docs` writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from cascade.recipe import Options
from cascade.recipe_files import load_recipe

FILE = Path(__file__).parents[1] / "deploy" / "prefect.yaml"
HEADER = """\
# What can be triggered from the UI, the command line, the API or a schedule.
# `cascade up` and the compose file register it by `python -m flows.bootstrap`, which keeps a schedule that
# somebody has switched on. By hand, from anywhere, with the names of a store and of a work pool:
#   CASCADE_STORE=s3://bucket/prefix CASCADE_POOL=cpu prefect deploy --prefect-file deploy/prefect.yaml --all
# The parameters are complete so that every form is filled in. Written by `python -m tests.docs`
# from the packaged recipes `quickstart` and `smoke`; a test compares them.
"""
STORE, POOL = "{{ $CASCADE_STORE }}", "{{ $CASCADE_POOL }}"
# Flow and deployment, as a server names them.
NAMES = (
    "build-family/build-family",
    "build-family/build-family-weekly",
    "rebuild-stage/rebuild-stage",
    "evaluate-family/evaluate-family",
    "promote/promote",
    "collect-garbage/collect-garbage",
    "build-family/smoke",
)


def deployments() -> list[dict[str, Any]]:
    """One mapping for each; what several have in common is one object, which YAML writes once."""
    options: dict[str, Any] = Options().model_dump(mode="json")
    quickstart, smoke = (load_recipe(name).model_dump(mode="json") for name in ("quickstart", "smoke"))
    build, operations = "flows.family.build_family", "flows.operations"
    return [
        deployment(
            "build-family",
            "Make a family of smaller models from one parent; what the store has already is reused.",
            build,
            {"store": STORE, "options": options, "recipe": quickstart},
            # Two builds at once would share one machine; change it in the UI where there are more.
            concurrency_limit={"limit": 1, "collision_strategy": "ENQUEUE"},
        ),
        deployment(
            "build-family-weekly",
            "The same every Sunday night, once its schedule is switched on: only what has changed is made.",
            build,
            {"store": STORE, "options": options, "recipe": quickstart},
            # A family that takes longer than a week must not pile up.
            concurrency_limit={"limit": 1, "collision_strategy": "CANCEL_NEW"},
            schedules=[{"slug": "weekly", "cron": "0 3 * * 0", "timezone": "UTC", "active": False}],
        ),
        deployment(
            "rebuild-stage",
            "Make one stage again, from what is there; everything else is reused.",
            f"{operations}.rebuild_stage",
            {"store": STORE, "family": "quickstart", "stage": "r70", "options": options},
        ),
        deployment(
            "evaluate-family",
            "Measure the newest build again, and move the aliases as after a build.",
            f"{operations}.evaluate_family",
            {"store": STORE, "family": "quickstart", "options": options},
        ),
        deployment(
            "promote",
            "Move the alias `stable` to a build by hand, or back to the one before.",
            f"{operations}.promote",
            {"store": STORE, "family": "quickstart", "run": "", "rollback": False, "credentials": ""},
        ),
        deployment(
            "collect-garbage",
            "Say what no build of a store needs any more; with `delete` remove it.",
            f"{operations}.collect_garbage",
            {"store": STORE, "keep_days": 30, "delete": False, "cache": "", "credentials": ""},
        ),
        deployment(
            "smoke",
            "Two children of a tiny random parent: shows in a minute that everything works together.",
            build,
            {"store": STORE, "options": options, "recipe": smoke},
        ),
    ]


def deployment(
    name: str, description: str, entrypoint: str, parameters: dict[str, Any], **more: Any
) -> dict[str, Any]:
    """As prefect.yaml has it. The code is installed wherever it runs, so nothing is pulled."""
    return {
        "name": name,
        "description": description,
        "tags": ["cascade"],
        "entrypoint": entrypoint,
        "work_pool": {"name": POOL},
        **more,
        "parameters": parameters,
    }


class Dumper(yaml.SafeDumper):
    """Anchors with names for what stands there twice: the options and the recipe."""

    def ignore_aliases(self, data: Any) -> bool:
        """Only large mappings become aliases."""
        return not (isinstance(data, dict) and len(data) > 4)

    def generate_anchor(self, node: yaml.Node) -> str:
        """A word in place of a number."""
        keys = [key.value for key, _ in node.value]
        return "recipe" if "family" in keys else "options"


def rendered() -> str:
    """The whole file."""
    tree = {"name": "cascade", "prefect-version": ">=3.8.8", "pull": [], "deployments": deployments()}
    return HEADER + yaml.dump(tree, Dumper=Dumper, sort_keys=False, width=110)
