"""The variables of the stack's processes: Prefect's from here alone, the store's from the stack's keys."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from cascade.stack.api import Api
from cascade.stack.ports import HOST, own_origins

# Where Prefect is and what it does is the stack's own; how much it logs may be asked for.
PREFECT, LOGGING = "PREFECT_", "PREFECT_LOGGING_"
# Seconds; the automation that finds lost runs counts three of them.
HEARTBEAT = "30"
QUIET = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}


def inherited(*but: str) -> dict[str, str]:
    """This process's variables without Prefect's, and without those that begin with one of `but`."""
    dropped = (PREFECT, *but)
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(dropped) or name.startswith(LOGGING)
    }


def server_environment(home: Path, api: Api) -> dict[str, str]:
    """Of the Prefect server, whose database lies in `home`."""
    return {
        **inherited("AWS_"),
        **QUIET,
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_API_HOST": HOST,
        # The option --port would leave the UI asking port 4200.
        "PREFECT_SERVER_API_PORT": str(api.port),
        "PREFECT_SERVER_UI_API_URL": api.url,
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": own_origins(api.port),
    }


def client_environment(home: Path, variables: Mapping[str, str], gpus: int) -> dict[str, str]:
    """Of bootstrap, the worker and its flows.

    variables: those of server and store. With keys among them, no others of this process's are kept.
    """
    own_keys = "AWS_ACCESS_KEY_ID" in variables
    return {
        **(inherited("AWS_") if own_keys else inherited()),
        **QUIET,
        **variables,
        "PREFECT_HOME": str(home),
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": HEARTBEAT,
        # Somebody sits in front of it: a run starts soon after it is triggered.
        "PREFECT_WORKER_QUERY_SECONDS": "3",
        "CASCADE_POOL": "gpu" if gpus else "cpu",
        "CASCADE_GPU_SLOTS": str(max(gpus, 1)),
    }
