"""One cut in a process of its own: `python -m tests.bench.trial METHOD SEED` prints JSON."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch_pruning
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from cascade.architecture import Architecture
from cascade.models.decoder import architecture_of
from cascade.planning.axes import Axis
from cascade.planning.budget import ratio_budget
from cascade.planning.plan import plan_child
from cascade.pruning.prune import prune
from cascade.pruning.selection import score_shapes
from tests.bench import memory
from tests.bench.peers import magnitude, torch_pruning_ffn

RATIO = 0.75
# Qwen2.5-0.5B.
SIZES: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}
Cutter = Callable[[PreTrainedModel, Architecture], PreTrainedModel]


def config() -> Qwen2Config:
    """Of the model that is cut."""
    return Qwen2Config(**SIZES, tie_word_embeddings=True, use_cache=False)


def target() -> Architecture:
    """What the planner makes of the budget on the axis that torch-pruning cuts too."""
    source = architecture_of(config())
    return plan_child(source, source, ratio_budget(source, RATIO), (Axis.FFN,))


def random_scores(source: Architecture, seed: int) -> dict[str, Tensor]:
    """Of every unit."""
    draw = torch.Generator().manual_seed(seed)
    return {axis.value: torch.rand(shape, generator=draw) for axis, shape in score_shapes(source).items()}


def cascade(seed: int) -> Cutter:
    """`prune` with given scores; in a new process it first proves that cuts of the class are exact."""
    scores = random_scores(architecture_of(config()), seed)
    return lambda model, target: prune(model, target, scores)[0]


def torch_pruning_random(seed: int) -> Cutter:
    """torch-pruning's pruner with random scores: graph and surgery alone."""
    importance = torch_pruning.importance.RandomImportance()
    return lambda model, target: torch_pruning_ffn(model, target.ffn, importance)


def torch_pruning_magnitude(seed: int) -> Cutter:
    """torch-pruning's pruner as in its examples."""
    return lambda model, target: torch_pruning_ffn(model, target.ffn, magnitude())


SECOND = "cascade, second cut"
METHODS: dict[str, Callable[[int], Cutter]] = {
    "cascade": cascade,
    SECOND: cascade,
    "torch-pruning, random scores": torch_pruning_random,
    "torch-pruning, magnitude": torch_pruning_magnitude,
}


def measure(method: str, seed: int) -> dict[str, float]:
    """Seconds, extra bytes at the peak, bytes of the model, and the child's parameters."""
    planned, cutter = target(), METHODS[method](seed)
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config(), dtype=torch.float32).eval()
    size = sum(parameter.nbytes for parameter in model.parameters())
    if method == SECOND:
        cutter(model, planned)
    gc.collect()
    before = memory.resident()
    memory.reset_peak()
    began = time.perf_counter()
    child = cutter(model, planned)
    seconds = time.perf_counter() - began
    extra = memory.peak() - before
    if child.num_parameters() != planned.parameters:
        raise SystemExit(f"{method}: {child.num_parameters():,} parameters, not {planned.parameters:,}")
    return {"seconds": seconds, "extra": extra, "size": size, "parameters": child.num_parameters()}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
