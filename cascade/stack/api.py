"""The few questions that the stack asks its Prefect server, without importing Prefect."""

from __future__ import annotations

import http.client
import json
import time
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError

from cascade.errors import CascadeError, MachineFault
from cascade.stack.ports import HOST

SECONDS = 60.0
# Prefect says 503 while its SQLite is busy, so a question is asked again for so long.
PATIENCE_SECONDS = 10.0
PAUSE_SECONDS = 0.5
# No connection, an answer that was cut off, one that is no JSON.
NO_ANSWER = (OSError, http.client.HTTPException, ValueError)
# A run that a worker has taken: its process runs or is being started.
TAKEN = ("PENDING", "RUNNING", "CANCELLING")
STOPPED = "`cascade up` was stopped; run it again and it goes on"


@dataclass(frozen=True)
class Api:
    """The server's API on this machine.

    All but `answers` raise MachineFault where it does not answer for `PATIENCE_SECONDS`, CascadeError where
    it refuses what is asked.
    """

    port: int

    @property
    def url(self) -> str:
        """As in PREFECT_API_URL."""
        return f"http://{HOST}:{self.port}/api"

    @property
    def ui(self) -> str:
        """What a browser opens."""
        return f"http://{HOST}:{self.port}"

    def answers(self) -> bool:
        """Whether the server is there."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=SECONDS):
                return True
        except NO_ANSWER:
            return False

    def heartbeat(self, pool: str, worker: str) -> str | None:
        """When a worker was heard of last; None when it never was."""
        workers = self._post(f"work_pools/{pool}/workers/filter", {})
        return next((one["last_heartbeat_time"] for one in workers if one["name"] == worker), None)

    def taken_runs(self, pool: str) -> list[dict[str, Any]]:
        """The flow runs of a pool that a worker has taken and that have not ended."""
        chosen = {
            "flow_runs": {"state": {"type": {"any_": TAKEN}}},
            "work_pools": {"name": {"any_": [pool]}},
        }
        runs: list[dict[str, Any]] = self._post("flow_runs/filter", chosen)
        return runs

    def cancel(self, run: str, *, ended: bool = False) -> None:
        """Ask a flow run to end, as the button in the UI does; or say that it has ended so."""
        name = "Cancelled" if ended else "Cancelling"
        state = {"type": name.upper(), "name": name, "message": STOPPED}
        self._post(f"flow_runs/{run}/set_state", {"state": state, "force": ended})

    def _post(self, path: str, content: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{self.url}/{path}",
            data=json.dumps(content).encode(),
            headers={"Content-Type": "application/json"},
        )
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                    return json.load(answer)
            except NO_ANSWER as error:
                if isinstance(error, HTTPError):
                    error.close()
                    if error.code < 500:
                        raise refused(error) from error
                if time.monotonic() > deadline:
                    raise unanswered(error, self.url) from error
            time.sleep(PAUSE_SECONDS)


def refused(error: HTTPError) -> CascadeError:
    """The server's no, such as 404 for a run that somebody has deleted; asked again it would say the same."""
    return CascadeError(
        "the Prefect server refuses a request",
        value=error,
        where=str(error.url),
        remedy="its log in the stack's folder says why",
    )


def unanswered(error: Exception, url: str) -> MachineFault:
    """No server, or one that is too busy or broken to answer."""
    return MachineFault(
        "the Prefect server does not answer",
        value=error,
        where=url,
        remedy="its log in the stack's folder says why; start the stack again",
    )
