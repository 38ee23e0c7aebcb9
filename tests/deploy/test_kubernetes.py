"""What is applied to a cluster, held against Kubernetes' own schemas, Prefect's worker and each other."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import Flow, FlowRun
from prefect_kubernetes.worker import KubernetesWorker, KubernetesWorkerJobConfiguration

from cascade.family.job import KILL_SECONDS

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
MANIFESTS = ("namespace.yaml", "secret.example.yaml", "network-policy.yaml", "bootstrap.yaml")
POOLS = ("cpu", "gpu")
API = "http://prefect-server.cascade.svc.cluster.local:4200/api"
Tree = dict[str, Any]


def documents(name: str) -> list[Tree]:
    """The documents of a YAML file."""
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def values(name: str) -> Tree:
    """The values of a chart."""
    (tree,) = documents(f"{name}-values.yaml")
    return tree


def template(pool: str) -> Tree:
    """The base job template of a pool."""
    tree: Tree = json.loads((FOLDER / f"{pool}-job-template.json").read_text())
    return tree


def job_of(pool: str, **variables: Any) -> Tree:
    """The Kubernetes job that Prefect's worker makes of the template for a run, with these job variables."""
    run = FlowRun(id=uuid4(), flow_id=uuid4(), name="quiet-heron")
    # It would look up blocks, of which the template names none.
    nobody = PrefectClient("http://127.0.0.1:1/api")
    filling = KubernetesWorkerJobConfiguration.from_template_and_values(
        template(pool), variables, client=nobody
    )
    configuration = asyncio.run(filling)
    configuration.prepare_for_flow_run(run, flow=Flow(id=uuid4(), name="build-family"))
    return configuration.job_manifest


def valid(manifest: Tree) -> None:
    """Raise if the manifest, or a field of it, is not of the API."""
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def confined(pod: Tree) -> None:
    """What the namespace's level `restricted` asks of a pod, and a root folder that cannot be written."""
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 1001
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    written = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert written == {"/tmp", "/home/cascade", "/cache"}
    assert {mount["name"] for mount in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_is_valid(name: str) -> None:
    for manifest in documents(name):
        valid(manifest)
        assert manifest["metadata"].get("namespace", "cascade") == "cascade"


def test_the_check_of_a_manifest_knows_its_fields() -> None:
    (job,) = documents("bootstrap.yaml")
    job["spec"]["template"]["spec"]["restartpolicy"] = "Never"
    with pytest.raises(kubernetes_validate.ValidationError):
        valid(job)


@pytest.mark.parametrize("pool", POOLS)
def test_the_worker_makes_a_valid_job_of_the_template(pool: str) -> None:
    job = job_of(pool)
    pod = job["spec"]["template"]["spec"]
    # Prefect insists on these two here, and a cluster passes over what it does not know.
    assert (pod.pop("parallelism"), pod.pop("completions")) == (1, 1)
    valid(job)
    confined(pod)
    assert job["metadata"]["namespace"] == "cascade"
    (container,) = pod["containers"]
    assert container["args"][0] == "prefect"
    assert container["image"].endswith(f":{pool}")
    # The network policies know it by this.
    assert job["spec"]["template"]["metadata"]["labels"]["cascade-role"] == "run"
    # An evicted run is then scheduled again by Prefect.
    names = {one["name"]: one["value"] for one in container["env"]}
    assert names["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "reschedule"
    assert pod["terminationGracePeriodSeconds"] >= KILL_SECONDS + 30


def test_a_run_on_a_gpu_gets_one_and_can_ask_for_more() -> None:
    limits = (job_of("gpu"))["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"memory": "64Gi", "nvidia.com/gpu": 1}
    job = job_of("gpu", gpus=2, memory="128Gi", env={"NCCL_DEBUG": "INFO"})
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"memory": "128Gi", "nvidia.com/gpu": 2}
    assert {"name": "NCCL_DEBUG", "value": "INFO"} in container["env"]
    cpu = job_of("cpu")
    assert "nvidia" not in json.dumps(cpu)


@pytest.mark.parametrize("pool", POOLS)
def test_every_variable_of_a_template_is_used_and_has_a_form(pool: str) -> None:
    tree = template(pool)
    Draft202012Validator.check_schema(tree["variables"])
    text = json.dumps(tree["job_configuration"])
    for name in tree["variables"]["properties"]:
        assert f"{{{{ {name} }}}}" in text
    known = KubernetesWorker.get_default_base_job_template()["job_configuration"]
    assert set(tree["job_configuration"]) <= set(known)


def test_the_bootstrap_is_our_program_confined() -> None:
    (job,) = documents("bootstrap.yaml")
    pod = job["spec"]["template"]["spec"]
    confined(pod)
    (container,) = pod["containers"]
    assert container["args"] == ["python", "-m", "flows.bootstrap"]
    assert {one["name"]: one["value"] for one in container["env"]}["PREFECT_API_URL"] == API


def test_the_values_fit_the_manifests() -> None:
    server = values("server")
    assert server["fullnameOverride"] == "prefect-server"
    secrets = {one["metadata"]["name"]: set(one["stringData"]) for one in documents("secret.example.yaml")}
    database = server["externalDatabase"]
    assert database["connectionStringSecretKey"] in secrets[database["existingSecret"]]
    for pool in POOLS:
        worker = values(f"worker-{pool}")["worker"]
        assert worker["selfHostedServerApiConfig"]["apiUrl"] == API
        assert worker["config"]["workPool"] == pool
        assert worker["config"]["type"] == KubernetesWorker.type
        pod = template(pool)["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
        (source,) = pod["containers"][0]["envFrom"]
        assert source["secretRef"]["name"] in secrets


def test_no_secret_is_in_the_repository() -> None:
    texts = [text for secret in documents("secret.example.yaml") for text in secret["stringData"].values()]
    assert texts == [
        "postgresql+asyncpg://USER:PASSWORD@HOST:5432/DATABASE",
        "ENDPOINT",
        "KEY",
        "SECRET",
        "REGION",
    ]


def test_every_image_is_ours_under_one_name() -> None:
    found = [line for file in FOLDER.iterdir() for line in file.read_text().splitlines() if "image" in line]
    named = [line for line in found if "registry" in line or ":cpu" in line or ":gpu" in line]
    assert named
    assert all("registry.example.com/cascade" in line for line in named)


def test_the_policies_know_the_labels_of_our_pods() -> None:
    policies = {one["metadata"]["name"]: one["spec"] for one in documents("network-policy.yaml")}
    (rule,) = policies["server"]["ingress"]
    allowed = [source["podSelector"]["matchLabels"] for source in rule["from"]]
    (bootstrap,) = documents("bootstrap.yaml")
    assert bootstrap["spec"]["template"]["metadata"]["labels"] in allowed
    for pool in POOLS:
        job = template(pool)["job_configuration"]["job_manifest"]
        assert job["spec"]["template"]["metadata"]["labels"] in allowed
    assert policies["nothing-comes-in"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
