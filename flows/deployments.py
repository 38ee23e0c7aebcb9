"""The deployments of deploy/prefect.yaml, as a server has them."""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from typing import Any

import yaml
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.objects import ConcurrencyOptions
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import ObjectNotFound
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema

Definition = dict[str, Any]


def definitions(store: str, pool: str) -> list[Definition]:
    """Those of deploy/prefect.yaml, which comes with the package, for this store and work pool."""
    text = (resources.files("flows") / "prefect.yaml").read_text(encoding="utf-8")
    names = {"{{ $CASCADE_STORE }}": store, "{{ $CASCADE_POOL }}": pool}
    return [filled_in(one, names) for one in yaml.safe_load(text)["deployments"]]


def filled_in(tree: Any, names: dict[str, str]) -> Any:
    """The tree with names in place of the variables of the environment."""
    if isinstance(tree, dict):
        return {key: filled_in(value, names) for key, value in tree.items()}
    if isinstance(tree, list):
        return [filled_in(value, names) for value in tree]
    return names.get(tree, tree) if isinstance(tree, str) else tree


def register(client: SyncPrefectClient, definition: Definition) -> str:
    """Bring one deployment up to date; what was done: made, updated or unchanged.

    Its version is a digest of all that we say about it. While that is the same, whatever somebody has changed
    in the UI stays; an update keeps its schedules and its limit, which the server would replace.
    """
    flow: Flow[..., Any] = load_flow_from_entrypoint(definition["entrypoint"], use_placeholder_flow=False)
    schema = parameter_schema(flow).model_dump(exclude_unset=True)
    version = hashlib.sha256(json.dumps([definition, schema], sort_keys=True).encode()).hexdigest()[:12]
    found = read(client, f"{flow.name}/{definition['name']}")
    if found and found.version == version:
        return "unchanged"
    limit, strategy = limit_of(definition, found)
    client.create_deployment(
        flow_id=client.create_flow(flow),
        name=definition["name"],
        version=version,
        description=definition["description"],
        tags=definition["tags"],
        entrypoint=definition["entrypoint"],
        work_pool_name=definition["work_pool"]["name"],
        parameters=definition["parameters"],
        parameter_openapi_schema=schema,
        enforce_parameter_schema=True,
        schedules=schedules_of(definition, found),
        concurrency_limit=limit,
        concurrency_options=strategy,
        pull_steps=[],
    )
    return "updated" if found else "made"


def read(client: SyncPrefectClient, name: str) -> DeploymentResponse | None:
    """A deployment by its full name; None when there is none."""
    try:
        return client.read_deployment_by_name(name)
    except ObjectNotFound:
        return None


def limit_of(
    definition: Definition, found: DeploymentResponse | None
) -> tuple[int | None, ConcurrencyOptions | None]:
    """How many of its runs go on at once, and what becomes of others."""
    if found:
        limit = found.global_concurrency_limit
        return (limit.limit if limit else None), found.concurrency_options
    wanted = definition.get("concurrency_limit")
    if wanted is None:
        return None, None
    return wanted["limit"], ConcurrencyOptions(collision_strategy=wanted["collision_strategy"])


def schedules_of(definition: Definition, found: DeploymentResponse | None) -> list[DeploymentScheduleCreate]:
    """When it runs by itself."""
    if found:
        return [
            DeploymentScheduleCreate(
                schedule=one.schedule, active=one.active, parameters=one.parameters, slug=one.slug
            )
            for one in found.schedules
        ]
    return [
        DeploymentScheduleCreate(
            schedule=CronSchedule(cron=one["cron"], timezone=one["timezone"]),
            active=one["active"],
            slug=one["slug"],
        )
        for one in definition.get("schedules", [])
    ]
