"""One trainer a GPU: a lock of this machine, whoever started the node."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from cascade.errors import CascadeError
from cascade.family.job import Job
from cascade.family.workplace import chosen_device
from cascade.kinds import Kind
from cascade.report import Report

# Not Python's temporary folder, which is another one for every node.
LOCKS = Path("/tmp")
# These read and write text.
ON_CPU = (Kind.CORPUS, Kind.WATCHED)


def needs_gpu(job: Job) -> bool:
    """Whether the job's node works on a GPU of this machine."""
    return job.kind not in ON_CPU and chosen_device(job.options.device).type == "cuda"


@contextmanager
def gpu_held(job: Job, report: Report) -> Iterator[None]:
    """Alone on the GPU that the job uses, if it uses one; waits while another node is there.

    The kernel frees the lock when this process ends, however it does.
    """
    if not needs_gpu(job):
        yield
        return
    with held(gpu_name(chosen_device(job.options.device)), job.name, report):
        yield


@contextmanager
def held(gpu: str, name: str, report: Report) -> Iterator[None]:
    """Hold the lock of a GPU. name: what those who wait read."""
    with open(lock_file(gpu), "r+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report.log(f"GPU {gpu} is taken by {lock.read().strip() or 'another node'}: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.seek(0)
        lock.truncate()
        print(f"{name}, process {os.getpid()}", file=lock, flush=True)
        yield


def lock_file(gpu: str) -> int:
    """A descriptor of the file that is locked, by any user of this machine; CascadeError for a link."""
    path = LOCKS / f"cascade-gpu-{gpu}.lock"
    # Anybody may have made a link of that name, to a file of ours.
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, flags)
    except FileNotFoundError:
        descriptor = os.open(path, flags | os.O_CREAT, 0o666)
        os.fchmod(descriptor, 0o666)
        return descriptor
    except OSError as error:
        raise CascadeError(
            "the lock of a GPU cannot be opened",
            value=error.strerror,
            where=str(path),
            remedy="delete that file: any process makes it again",
        ) from error


def gpu_name(device: torch.device) -> str:
    """Of whichever number it is in this process, which CUDA_VISIBLE_DEVICES decides."""
    return str(torch.cuda.get_device_properties(device).uuid)
