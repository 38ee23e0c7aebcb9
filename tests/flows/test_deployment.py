"""The deployment file: its forms are filled in, and `prefect deploy` reads in it what bootstrap does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.responses import DeploymentResponse

from cascade.recipe import Options, Recipe
from cascade.recipe_files import load_recipe
from flows.bootstrap import bootstrap
from tests.deployment_file import FILE, NAMES, deployments

SAME = (
    "description",
    "tags",
    "entrypoint",
    "work_pool_name",
    "parameters",
    "parameter_openapi_schema",
    "enforce_parameter_schema",
    "concurrency_options",
    "pull_steps",
)


def test_the_forms_start_with_the_packaged_recipes() -> None:
    parameters = {one["name"]: one["parameters"] for one in deployments()}
    for name, recipe in (
        ("build-family", "quickstart"),
        ("build-family-weekly", "quickstart"),
        ("smoke", "smoke"),
    ):
        assert Recipe.model_validate(parameters[name]["recipe"]) == load_recipe(recipe)
        assert Options.model_validate(parameters[name]["options"]) == Options()


def seen(deployment: DeploymentResponse) -> dict[str, Any]:
    """What a person sees of a deployment."""
    limit = deployment.global_concurrency_limit
    schedules = [(one.schedule, one.active, one.slug) for one in deployment.schedules]
    fields = {name: getattr(deployment, name) for name in SAME}
    return {**fields, "limit": limit.limit if limit else None, "schedules": schedules}


def read_all() -> dict[str, DeploymentResponse]:
    with get_client(sync_client=True) as client:
        return {name: client.read_deployment_by_name(name) for name in NAMES}


@pytest.mark.slow
def test_prefect_deploy_and_bootstrap_register_the_same(prefect_server: str, tmp_path: Path) -> None:
    store = str(tmp_path)
    bootstrap({"CASCADE_STORE": store}, print)
    ours = read_all()
    with get_client(sync_client=True) as client:
        for deployment in ours.values():
            client.delete_deployment(deployment.id)
    variables = {"PREFECT_API_URL": prefect_server, "CASCADE_STORE": store, "CASCADE_POOL": "cpu"}
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--prefect-file", str(FILE), "--all"]
    # Not in the repository: the file names modules, which are installed wherever it is used.
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **variables}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    theirs = read_all()
    for name in NAMES:
        assert seen(theirs[name]) == seen(ours[name]), name
