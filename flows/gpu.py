"""The slot that a node on a GPU takes, so that all workers of a server together use no GPU twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from prefect.client.orchestration import get_client
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL

from cascade.errors import InputError, MachineFault
from cascade.family.gpu import needs_gpu
from cascade.family.job import Job
from cascade.report import Report
from flows.publish import NotShown, not_shown

GPU_LIMIT = "gpu"


@contextmanager
def gpu_slot(job: Job, report: Report) -> Iterator[None]:
    """Hold a slot of the server's limit while the job's node works, if that is on a GPU.

    An embedded server shares no limits with anybody: there the lock that the node itself takes has to do.
    Raises InputError when the server has no such limit, MachineFault when it gives none for another reason.
    """
    if not PREFECT_API_URL.value() or not needs_gpu(job):
        yield
        return
    announce(report)
    with ExitStack() as stack:
        try:
            # Work of hours must not end because a lease could not be renewed once.
            stack.enter_context(concurrency(GPU_LIMIT, strict=True, raise_on_lease_renewal_failure=False))
        except (*NotShown, ConcurrencySlotAcquisitionError) as error:
            raise MachineFault(
                "the Prefect server gave no slot for a GPU",
                value=error,
                where=str(PREFECT_API_URL.value()),
                remedy="look at the server; the same build goes on when it answers",
            ) from error
        yield


def announce(report: Report) -> None:
    """Say so if there is no free slot at the moment; InputError if there is no limit."""
    with get_client(sync_client=True) as client:
        try:
            limit = client.read_global_concurrency_limit_by_name(GPU_LIMIT)
        except ObjectNotFound:
            raise InputError(
                "the Prefect server has no limit for GPUs",
                value=GPU_LIMIT,
                where=str(PREFECT_API_URL.value()),
                remedy="run `python -m flows.bootstrap` against this server once",
            ) from None
        except NotShown as error:
            report.log(not_shown(error))
            return
    if limit.active_slots >= limit.limit:
        report.log(f"all {limit.limit} slots of the limit `{GPU_LIMIT}` are taken: waiting for a GPU")
