"""One loss and its backward pass in a process of its own: `python -m tests.bench.loss_trial METHOD V SEED`.

N tokens, D student hidden size, E teacher hidden size, V vocabulary. Every method gets the hidden states and
the heads and gives the mean forward KL per token with gradients for the student's states and head.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from cascade.distillation.fused import fused_distillation_loss
from cascade.distillation.objectives import Objective
from cascade.distillation.states import Head
from cascade.distillation.targets import StateTargets
from tests.bench import memory

N, D, E = 1024, 384, 768
THREADS = 2
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Arguments = tuple[Tensor, Tensor, Tensor, Tensor]


def cascade(objective: Objective = Objective.FORWARD_KL, compiled: bool = False) -> Loss:
    """The fused loss."""
    return lambda student, head, teacher, other: (
        fused_distillation_loss(
            student,
            Head(head),
            StateTargets(teacher, Head(other)),
            torch.zeros(len(student), dtype=torch.int64, device=student.device),
            objective=objective,
            compiled=compiled,
        ).loss
    )


def modelopt() -> Loss:
    """nvidia-modelopt's logits loss; its file alone, because the package imports a dozen others."""
    loss = module_of("modelopt", "torch/distill/losses.py").LogitsDistillationLoss(reduction="batchmean")
    return lambda student, head, teacher, other: loss(student @ head.T, teacher @ other.T)


def trl_gkd() -> Loss:
    """TRL's GKD trainer on whole logits; its beta = 0 is the forward KL."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.gkd import GKDTrainer

    return lambda student, head, teacher, other: (
        GKDTrainer.generalized_jsd_loss(
            (student @ head.T)[None], (teacher @ other.T)[None], beta=0.0, reduction="sum"
        )
        / len(student)
    )


def trl_tiles() -> Loss:
    """The tiles of TRL's distillation trainer; their beta = 0 is the forward KL."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(student: Tensor, head: Tensor, teacher: Tensor, other: Tensor) -> Tensor:
        divergence, _ = ChunkedDivergenceFunction.apply(student, head, None, teacher, other, None, 0.0)
        return divergence.mean()

    return loss


def liger(chunk: int, compiled: bool = False) -> Loss:
    """Liger's fused linear JSD; its beta = 0 is the forward KL."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    fused = LigerFusedLinearJSDLoss(0.0, 1.0, beta=0.0, compiled=compiled, chunk_size=chunk)
    return lambda student, head, teacher, other: fused(
        student, head, teacher, other, torch.zeros(len(student), dtype=torch.int64, device=student.device)
    )


def module_of(package: str, path: str) -> ModuleType:
    """A file of an installed package, without the package."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"{package} is not installed: make .venv/bench")
    spec = importlib.util.spec_from_file_location("peer", Path(found.submodule_search_locations[0]) / path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{package} has no {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


OURS = "cascade"
METHODS: dict[str, Callable[[], Loss]] = {
    OURS: cascade,
    "nvidia-modelopt, whole logits": modelopt,
    "trl GKD, whole logits": trl_gkd,
    "trl, tiles": trl_tiles,
    "liger-kernel, chunks of 128": lambda: liger(128),
    "liger-kernel, chunks of 1024 (its default)": lambda: liger(1024),
}
NEEDS_COMPILER = {
    "cascade, compiled": lambda: cascade(compiled=True),
    "liger-kernel, chunks of 128, compiled": lambda: liger(128, compiled=True),
}


def drawn(vocabulary: int, tokens: int, seed: int) -> Arguments:
    """States and heads whose logits have a model's spread; the student's take gradients."""
    draw = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(tokens, width, generator=draw) for width in (D, E))
    head, other = (torch.randn(vocabulary, width, generator=draw).mul_(3 * width**-0.5) for width in (D, E))
    return student.requires_grad_(), head.requires_grad_(), teacher, other


def measure(method: str, vocabulary: int, seed: int) -> dict[str, float]:
    """Seconds, extra bytes at the peak (the gradients are among them), and what tells methods apart."""
    warnings.simplefilter("ignore")
    loss = {**METHODS, **NEEDS_COMPILER}[method]()
    loss(*drawn(1000, N, seed)).backward()
    if method in NEEDS_COMPILER:
        # It compiles anew for other shapes, which is not what is measured.
        loss(*drawn(vocabulary, N, seed)).backward()
    arguments = drawn(vocabulary, N, seed)
    gc.collect()
    # What the warm-up freed would otherwise be taken again without being counted.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = memory.resident()
    memory.reset_peak()
    began = time.perf_counter()
    value = loss(*arguments)
    value.backward()
    seconds = time.perf_counter() - began
    extra = memory.peak() - before
    student, head = (tensor.grad for tensor in arguments[:2])
    if student is None or head is None:
        raise SystemExit(f"{method}: no gradient")
    norms = {"student": student.norm().item(), "head": head.norm().item()}
    return {"seconds": seconds, "extra": extra, "loss": value.item(), **norms}


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
