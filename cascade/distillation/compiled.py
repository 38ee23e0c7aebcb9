"""Compiled parts of a training: the layers of the student, and the loss between its matrix products.

B tokens of a block, V vocabulary. torch.compile makes C++ on a CPU and Triton on a GPU. Only parts whose
shapes repeat are compiled, each for its very shape, so that graphs stay few and what is computed depends on
nothing that came before: a training that goes on from a snapshot has the bits of one that never stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch._dynamo.config
from torch import Tensor, nn
from transformers import PreTrainedModel

from cascade.distillation.terms import Rule, before_cap, dense_parts, sums
from cascade.errors import InputError
from cascade.models.anatomy import layers_of

MOST_GRAPHS = 64
"""Of one function in a training: kinds of layers, times up to three sizes of a micro-batch (whole, the rest
of a step, the rest of the last), with and without several documents in a row. torch's own limit is 8."""

Block = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def compiled_block(rule: Rule, cap: float | None) -> Block:
    """(student's logits [B, V], teacher's [B, V], labels [B], weight) -> the sums of divergence and CE.

    The student's logits become the gradient for what `cap` was applied to, as `before_cap` does. weight: the
    rule's, as a scalar tensor: it changes from step to step, and a number would be compiled in.
    """
    return _block(replace(rule, weight=1.0 if rule.weight else 0.0), cap)


@cache
def _block(rule: Rule, cap: float | None) -> Block:
    """One function for a divergence, a temperature and a cap, with or without a cross-entropy."""

    def block(student_BV: Tensor, teacher_BV: Tensor, labels_B: Tensor, weight: Tensor) -> Tensor:
        # The copy is never made; without it the teacher's logits would be written back.
        value_B, ce_B, gradient_BV, hard_BV = dense_parts(student_BV, teacher_BV.clone(), labels_B, rule)
        gradient_BV = gradient_BV * ((1 - weight) * rule.temperature)
        if hard_BV is not None:
            # Compared, not scattered: a scatter would end the one loop that this becomes.
            label_BV = torch.arange(hard_BV.shape[1], device=hard_BV.device) == labels_B[:, None]
            gradient_BV = gradient_BV + (hard_BV - label_BV.to(hard_BV.dtype)) * weight
        before_cap(student_BV, gradient_BV, cap)
        return sums(value_B, ce_B)

    made: Block = torch.compile(block, dynamic=False)
    return made


@contextmanager
def compiled_layers(student: PreTrainedModel, places: Sequence[nn.Module] = ()) -> Iterator[None]:
    """Inside, every layer runs compiled where gradients are wanted; afterwards the modules are plain again.

    The layers share their graphs, one for each kind of layer, shape of input and kind of mask, so that the
    time to compile does not grow with depth. Passes without gradients (measurements, what the student writes)
    stay as they are: their shapes are many. So does a layer that holds one of `places`, modules with hooks
    of ours: every new hook would be compiled anew. What was compiled in this process is forgotten at the end.
    """
    layers = [layer for layer in layers_of(student) if set(places).isdisjoint(parts_within(layer))]
    for layer in layers:
        # Of the instance: it hides the method of its class until it is deleted.
        layer.forward = _where_gradients(layer.forward)
    try:
        # Beyond its limit torch runs what is new uncompiled, so that bits would depend on what came first.
        with torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS):
            yield
    finally:
        for layer in layers:
            del layer.forward
        torch.compiler.reset()


def parts_within(layer: nn.Module) -> set[nn.Module]:
    """The modules of a layer but for itself."""
    return set(layer.modules()) - {layer}


def _where_gradients(plain: Callable[..., Any]) -> Callable[..., Any]:
    """`plain` without gradients, compiled with them."""
    fast = torch.compile(plain, dynamic=False)

    def forward(*arguments: Any, **named: Any) -> Any:
        return (fast if torch.is_grad_enabled() else plain)(*arguments, **named)

    return forward


def require_compiler(device: torch.device) -> None:
    """Compile a line for `device`; raises InputError where that fails."""
    # Another line every time: a stored result of an earlier one would hide that the compiler is gone.
    number = time.time_ns() % 10**9
    try:
        torch.compile(lambda x: x.exp() + number, dynamic=False)(torch.zeros(8, device=device))
    except (RuntimeError, OSError, AssertionError) as error:
        raise InputError(
            "torch.compile does not work here",
            value=next(iter(str(error).splitlines()), type(error).__name__),
            where=f"--compile on {device}",
            remedy="leave --compile out, or install what torch needs: a C++ compiler (g++) for a CPU, Triton "
            "and a C compiler for a GPU",
        ) from error
