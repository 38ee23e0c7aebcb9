"""Analytic FLOPs of a node's work, per token; the forecast and the manifests count with the same formulas."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from cascade.architecture import Architecture
from cascade.distillation.settings import RELATIONS
from cascade.importance.method import Method

# A backward pass costs twice the forward pass (Kaplan et al., 2001.08361, section 2.1).
TRAINING_FORWARDS = 3
FORWARDS = {Method.ACTIVATION: 1, Method.TAYLOR: TRAINING_FORWARDS, Method.MAGNITUDE: 0, Method.RANDOM: 0}


def importance_flops(model: Architecture, method: Method, context: int, drops: Collection[int]) -> int:
    """One calibration token; none where only weights, or nothing, is looked at.

    A dropped block is measured from the layer after it on: half a forward pass on average.
    """
    blocks = sum(model.layers - length + 1 for length in drops)
    return round((FORWARDS[method] + blocks / 2) * model.forward_flops(context))


def teacher_flops(parent: Architecture, context: int, stored: bool, whole: bool = True) -> int:
    """What the teacher costs beside a student for one token.

    All of it online; its LM head where its states are stored; nothing where they are not whole distributions.
    """
    if not stored:
        return parent.forward_flops(context)
    return 2 * parent.hidden * parent.vocabulary if whole else 0


def student_flops(child: Architecture, context: int, frozen: bool = False) -> int:
    """One trained token. frozen: matrices get no gradients of their own, only pass them on."""
    return (TRAINING_FORWARDS - frozen) * child.forward_flops(context)


def inner_flops(child: Architecture, teacher: Architecture, context: int, distill: Mapping[str, Any]) -> int:
    """One trained token through what the hidden-state loss multiplies, where there is one: the maps between
    different widths, or the products of its queries, keys and values with those of context/2 tokens.

    distill: the settings in the section of a training.
    """
    if distill.get("hidden_states") == RELATIONS:
        own, others = (shape.queries + 2 * shape.keys for shape in (child, teacher))
        return context * (TRAINING_FORWARDS * own + others)
    if "hidden_states" not in distill or child.hidden == teacher.hidden:
        return 0
    return distill.get("hidden_states_layers", 1) * TRAINING_FORWARDS * 2 * child.hidden * teacher.hidden


def writing_flops(child: Architecture, context: int, rows: int) -> int:
    """Rows that the child goes on with itself: with its cache, one forward pass over each."""
    return rows * context * child.forward_flops(context)


def body_flops(model: Architecture, context: int) -> int:
    """One token through the layers, without the LM head: a rotation's or a repair's pass."""
    return model.forward_flops(context) - 2 * model.hidden * model.vocabulary
