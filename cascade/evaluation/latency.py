"""Latency on this machine: measured on a few shapes, predicted for all, measured again on the choice.

A pass over one row takes a time for every layer, for the products of attention and of the FFN, and for the
head; the four rates are fitted to measurements of the parent's class at its own width with few layers.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from cascade.architecture import Architecture
from cascade.models import configs
from cascade.models.anatomy import Anatomy

REPEATS = 7
PROBE_LAYERS = (2, 6)


@dataclass(frozen=True)
class Rates:
    """Milliseconds for one unit of each of `amounts`."""

    values: tuple[float, ...]

    def predict(self, shape: Architecture) -> float:
        """Milliseconds of a forward pass over one row."""
        return sum(rate * amount for rate, amount in zip(self.values, amounts(shape), strict=True))


def amounts(shape: Architecture) -> tuple[float, ...]:
    """Layers; 10^9 multiplied parameters of attention, of the FFN, and of the head."""
    neurons = shape.ffn * (shape.layer_parameters - replace(shape, ffn=shape.ffn - 1).layer_parameters)
    share = shape.counts.active_experts / shape.experts if shape.experts else 1.0
    attention = shape.layer_parameters - neurons
    head = shape.vocabulary * shape.hidden
    return (
        shape.layers,
        shape.layers * attention / 1e9,
        shape.layers * neurons * share / 1e9,
        head / 1e9,
    )


@dataclass(frozen=True)
class Bench:
    """Random models of one class on one device. length: tokens of the row that is passed."""

    model_class: type[PreTrainedModel]
    config: configs.PreTrainedConfig
    anatomy: Anatomy
    length: int
    device: torch.device

    def milliseconds(self, shape: Architecture) -> float:
        """Median of several forward passes with logits over one row, without a KV cache."""
        config = configs.resized(self.config, shape, self.anatomy.form, range(shape.layers))
        dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        # Random weights and tokens, so that routers spread them over all experts.
        with torch.random.fork_rng(), self.device:
            torch.manual_seed(0)
            model = self.model_class._from_config(config, dtype=dtype).eval()
            ids = torch.randint(shape.vocabulary, (1, self.length))
        times = [self._pass(model, ids) for _ in range(REPEATS + 2)][2:]
        del model
        if self.device.type == "cuda":
            # What plans here goes on to orchestrate trainings, which need the memory.
            torch.cuda.empty_cache()
        return 1e3 * statistics.median(times)

    @property
    def name(self) -> str:
        """What its times depend on beside the shape."""
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        machine = f"{platform.node()}-{gpu or torch.get_num_threads()}-{torch.__version__}-{self.length}"
        return "".join(letter if letter.isalnum() else "-" for letter in machine)

    def _pass(self, model: PreTrainedModel, ids: torch.Tensor) -> float:
        start = time.perf_counter()
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start


def kept(path: Path) -> dict[str, float]:
    """The measurements in a file; none if it is absent, and none of what is damaged: it is measured again."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    times = found.items() if isinstance(found, dict) else ()
    return {name: time for name, time in times if isinstance(time, float) and 0 < time < math.inf}


@dataclass
class Latency:
    """Measurements of a bench, each made once and kept in a JSON file."""

    bench: Bench
    path: Path
    known: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self.known = kept(self.path)

    def milliseconds(self, shape: Architecture) -> float:
        """See `Bench.milliseconds`."""
        name = json.dumps(asdict(shape), sort_keys=True)
        if name not in self.known:
            self.known[name] = self.bench.milliseconds(shape)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            written = self.path.with_suffix(f".{os.getpid()}")
            written.write_text(json.dumps(self.known, indent=1) + "\n", "utf-8")
            written.replace(self.path)
        return self.known[name]

    def rates(self, original: Architecture) -> Rates:
        """Fit the rates, none below zero, to the shapes of `probes`."""
        shapes = list(probes(original))
        rows = torch.tensor([amounts(shape) for shape in shapes], dtype=torch.float64)
        found = torch.tensor([self.milliseconds(shape) for shape in shapes], dtype=torch.float64)
        return Rates(non_negative(rows, found))


def probes(original: Architecture) -> Iterator[Architecture]:
    """Few layers at the original's width; then half the FFN, and half the groups, so that each rate shows."""
    for layers in PROBE_LAYERS:
        yield replace(original, layers=min(layers, original.layers))
    deep = replace(original, layers=min(PROBE_LAYERS[-1], original.layers))
    yield replace(deep, ffn=max(1, original.ffn // 2))
    if not original.counts.bound and original.kv_groups > 1:
        fewer = [count for count in range(1, original.kv_groups) if legal(deep, count)]
        yield replace(deep, kv_groups=fewer[len(fewer) // 2] if fewer else original.kv_groups)


def legal(shape: Architecture, kv_groups: int) -> bool:
    """Whether stock configs accept so many groups beside the hidden size."""
    heads = kv_groups * shape.heads_per_group
    return shape.hidden % heads == 0 or shape.hidden % shape.heads != 0


def non_negative(rows: torch.Tensor, values: torch.Tensor) -> tuple[float, ...]:
    """Least squares with no coefficient below zero: the most negative is dropped until none is."""
    scale = rows.abs().amax(0).clamp_min(1e-12)
    used = list(range(rows.shape[1]))
    found = torch.zeros(rows.shape[1], dtype=torch.float64)
    while used:
        solved = torch.linalg.lstsq((rows / scale)[:, used], values[:, None], driver="gelsd").solution[:, 0]
        if (solved >= 0).all():
            found[used] = solved
            break
        used.pop(int(solved.argmin()))
    return tuple((found / scale).tolist())
