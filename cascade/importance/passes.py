"""A pass of calibration tokens through a model for whoever has hooked into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cascade.importance.calibration import attached, evaluating, require_finite, require_rows
from cascade.models.decoder import Decoder


class FiniteProbe:
    """Whether the output of every layer, and of the embeddings, was finite."""

    def __init__(self, decoder: Decoder) -> None:
        self.layers = decoder.layers
        self.finite = torch.ones(len(self.layers) + 1, dtype=torch.bool, device=decoder.model.device)

    def attach(self) -> list[RemovableHandle]:
        """One hook before the first layer, one after each."""
        first = self.layers[0].register_forward_pre_hook(self._before, with_kwargs=True)
        return [
            first,
            *(layer.register_forward_hook(self._after(at)) for at, layer in enumerate(self.layers)),
        ]

    def _before(self, module: nn.Module, inputs: tuple[Tensor, ...], keywords: dict[str, Any]) -> None:
        self._look(0, inputs[0] if inputs else keywords["hidden_states"])

    def _after(self, layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            self._look(layer + 1, output[0] if isinstance(output, tuple) else output)

        return look

    def _look(self, place: int, values: Tensor) -> None:
        # A sum is finite only if every term is, or if it overflows, which is no better.
        self.finite[place] &= values.sum(dtype=torch.float32).isfinite()

    def first_broken(self) -> int | None:
        """The first place that was not finite: 0 the embeddings, i the output of layer i - 1."""
        broken = (~self.finite).nonzero()
        return int(broken[0]) if len(broken) else None


def run_over(
    decoder: Decoder,
    rows: Tensor,
    *,
    batch: int,
    progress: Callable[[int, int], None] = lambda done, all: None,
) -> None:
    """Run the model without its LM head over rows [N, T] of token ids, `batch` at a time; nothing is kept.

    progress: told the tokens done and all of them. Raises InputError for no rows, and for activations that
    are not finite, naming the layer.
    """
    require_rows(rows)
    probe, done = FiniteProbe(decoder), 0
    with attached([probe]), evaluating(decoder.model):
        for batch_BT in rows.split(batch):
            decoder.model.base_model(input_ids=batch_BT.long().to(decoder.model.device), use_cache=False)
            require_finite(probe, decoder)
            done += batch_BT.numel()
            progress(done, rows.numel())
