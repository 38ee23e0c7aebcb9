"""Approval by a person: the run is suspended, its machine is freed, and Resume starts it again from the top,
where everything before is found in the store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from uuid import UUID

from prefect import get_run_logger, runtime
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.flow_runs import suspend_flow_run

from cascade.cards.markdown import rich_table
from cascade.errors import InputError
from cascade.family.forecast import machine_rate
from cascade.family.graph import Graph
from cascade.family.index import Json
from cascade.family.job import Job
from cascade.family.runner import Outcome
from cascade.kinds import TRAININGS
from cascade.recipe import Approval
from cascade.storage.artifacts import read_manifest
from cascade.tables.family import family_table
from cascade.tables.plan import plan_table

# Of a key that says who asks: the same in every restart of a run.
FIRST = "first-training"


@dataclass
class Approvals:
    """Runs jobs, and asks before those that need it. index: the newest, for what is shown."""

    approval: Approval
    graph: Graph
    run: Callable[[Job], Outcome]
    index: Json | None = None
    asked: set[str] = field(default_factory=set)

    def __call__(self, job: Job) -> Outcome:
        """Run a job; before a training that is not done yet, wait for a person."""
        asks = self.approval is not Approval.NEVER and job.kind in TRAININGS
        if asks and read_manifest(job.location) is None:
            self.ask(job.stage if self.approval is Approval.EACH_STAGE else FIRST)
        return self.run(job)

    def ask(self, subject: str) -> None:
        """Suspend the run, once for each subject; returns in the process that starts after Resume."""
        if subject in self.asked:
            return
        self.asked.add(subject)
        family, own = self.graph.recipe.family, f"approval-{subject}"
        if resumed(own):
            return
        key = f"{family}-approval"
        create_markdown_artifact(self.shown(subject), key=key, description=f"approval: {family}, {subject}")
        get_run_logger().info(
            f"waiting for approval ({subject}): see the artifact {key}; Resume goes on, Cancel ends the run"
        )
        suspend_flow_run(key=own)

    def shown(self, subject: str) -> str:
        """The plan, and what there is of the family so far."""
        index = self.index
        built = rich_table(family_table(index)) if index and index["stages"] else ""
        plan = rich_table(plan_table(self.graph, machine_rate()))
        ways = "**Resume** goes on with the training; **Cancel** ends the run and keeps what is stored."
        parts = [f"# Approval: {self.graph.recipe.family}, {subject}", ways, built, plan]
        return "\n\n".join(part for part in parts if part) + "\n"


def resumed(key: str) -> bool:
    """Whether the run was suspended under this key before: then somebody has resumed it."""
    with get_client(sync_client=True) as client:
        policy = client.read_flow_run(UUID(str(runtime.flow_run.id))).empirical_policy
    return key in (policy.pause_keys or ())


def require_deployment(approval: Approval) -> None:
    """Raise InputError if nobody could go on with a run that is suspended: only a worker starts it again."""
    if approval is not Approval.NEVER and runtime.deployment.id is None:
        raise InputError(
            "a run that no deployment started cannot wait for approval: no worker would go on with it",
            value=approval.value,
            where="options.approval",
            remedy="run the deployment build-family, or set `never`; `cascade plan RECIPE` shows the plan",
        )
