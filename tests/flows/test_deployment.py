"""The deployment file: it registers on a real server, with a form that is filled in and free of unions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from prefect.client.orchestration import get_client

from cascade.recipe import Options, load_recipe
from tests.unit.test_recipe import nodes

ROOT = Path(__file__).parents[2]
FILE = ROOT / "deploy" / "prefect.yaml"


def test_the_form_starts_with_the_packaged_recipe() -> None:
    (deployment,) = yaml.safe_load(FILE.read_text())["deployments"]
    assert deployment["parameters"] == {
        "store": "families",
        "options": Options().model_dump(mode="json"),
        "recipe": load_recipe("quickstart").model_dump(mode="json"),
    }


def test_the_deployment_registers_and_its_form_is_complete(prefect_server: str) -> None:
    environment = {**os.environ, "PREFECT_API_URL": prefect_server}
    prefect = [sys.executable, "-m", "prefect", "--no-prompt"]
    for arguments in (
        ["work-pool", "create", "cascade", "--type", "process"],
        ["deploy", "--prefect-file", str(FILE), "--all"],
    ):
        done = subprocess.run(
            [*prefect, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("build-family/quickstart")
    schema: dict[str, Any] = deployment.parameter_openapi_schema
    assert set(schema["properties"]) == {"recipe", "store", "options"}
    assert [node for node in nodes(schema) if "oneOf" in node or "const" in node] == []
    assert deployment.parameters["recipe"]["stages"][0]["prune"]["ratio"] == 0.85
