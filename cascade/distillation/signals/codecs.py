"""What is stored of a teacher's distributions: one codec, one way to write a row and to read it back.

B rows, T tokens, N tokens of several rows, E teacher hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from cascade.distillation.signals.entries import MOST_DRAWS, Sampled, TopK
from cascade.distillation.signals.head_and_tail import HeadAndTail
from cascade.distillation.states import Head
from cascade.distillation.targets import BucketTargets, SparseTargets, StateTargets
from cascade.errors import InputError

Stored = dict[str, Tensor]
"""Tensors by name. The first dimension counts rows; that of tensors named in `Codec.flat` counts entries,
of which `sizes` [rows] says how many belong to each row."""
SIZES = "sizes"


Decoded = StateTargets | BucketTargets | SparseTargets


class Codec(Protocol):
    """How the answers for a row are stored.

    name: declared beside what is stored. whole: whether whole distributions can be read back. flat: see
    `Stored`.
    """

    @property
    def name(self) -> str: ...

    @property
    def whole(self) -> bool: ...

    @property
    def flat(self) -> tuple[str, ...]: ...

    def settings(self) -> dict[str, Any]:
        """What `make_codec` needs beside the name and the vocabulary to build an equal codec."""

    def token_bytes(self) -> float:
        """Bytes of a token, expected where their number is drawn."""

    def fitted(self, states_BTE: Tensor, head: Head) -> Codec:
        """The codec for a teacher of which some states are given, where the best settings depend on it."""

    def encode(self, states_BTE: Tensor, head: Head, rows: Sequence[int]) -> Stored:
        """Store some rows, given by their final states (float32); `rows` are their numbers in the corpus."""

    def decode(self, stored: Sequence[Stored], head: Head) -> Decoded:
        """The targets 0..T-2 of rows that were read one by one: B * (T - 1) tokens."""


class BfloatStates:
    """The final states rounded to bfloat16: relative 2^-9 at most for each value."""

    name, whole, flat = "hidden_bf16", True, ()

    def __init__(self, width: int) -> None:
        self.width = width

    def settings(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def token_bytes(self) -> float:
        """Two for each value."""
        return 2.0 * self.width

    def fitted(self, states_BTE: Tensor, head: Head) -> BfloatStates:
        """Itself."""
        return self

    def encode(self, states_BTE: Tensor, head: Head, rows: Sequence[int]) -> Stored:
        """`hidden` [B, T, E], bfloat16."""
        return {"hidden": states_BTE.bfloat16()}

    def decode(self, stored: Sequence[Stored], head: Head) -> StateTargets:
        """Whole distributions."""
        return _state_targets(torch.stack([row["hidden"] for row in stored]), head)


class Int8States:
    """The final states in 8 bits with one scale a token: value = scale * n, n from -127 to 127.

    The scale is the token's largest absolute value / 127, float32; a value is rounded to the nearest n, so it
    is off by half a scale at most.
    """

    name, whole, flat = "hidden_int8", True, ()

    def __init__(self, width: int) -> None:
        self.width = width

    def settings(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def token_bytes(self) -> float:
        """One for each value, four for the scale."""
        return self.width + 4.0

    def fitted(self, states_BTE: Tensor, head: Head) -> Int8States:
        """Itself."""
        return self

    def encode(self, states_BTE: Tensor, head: Head, rows: Sequence[int]) -> Stored:
        """`hidden` [B, T, E], int8, and `scale` [B, T], float32."""
        scale_BT = states_BTE.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        return {"hidden": (states_BTE / scale_BT[..., None]).round().to(torch.int8), "scale": scale_BT}

    def decode(self, stored: Sequence[Stored], head: Head) -> StateTargets:
        """Whole distributions."""
        states = [row["hidden"].float() * row["scale"][:, None] for row in stored]
        return _state_targets(torch.stack(states), head)


def _state_targets(states_BTE: Tensor, head: Head) -> StateTargets:
    """Without the last token of each row, whose target is not in the row."""
    states_NE = states_BTE[:, :-1].flatten(0, 1)
    return StateTargets(states_NE.to(head.weight.device, torch.float32), head)


CODECS = ("hidden_bf16", "hidden_int8", "top_k", "sampled", "head_and_tail")


def make_codec(
    name: str, width: int, vocabulary: int, *, token_bytes: int = 24, seed: int = 0, draws: int = MOST_DRAWS
) -> Codec:
    """The codec of a name, of `CODECS`, for a teacher of some width and vocabulary.

    token_bytes: what a token may take, of those that keep entries. seed: of what they draw. draws: how many
    of `sampled`, where that is known. Raises InputError.
    """
    if name in (BfloatStates.name, "hidden-bfloat16"):  # The second is what older versions wrote.
        return BfloatStates(width)
    if name == Int8States.name:
        return Int8States(width)
    if name == TopK.name:
        return TopK(vocabulary, token_bytes)
    if name == Sampled.name:
        return Sampled(vocabulary, token_bytes, seed, draws)
    if name == HeadAndTail.name:
        return HeadAndTail(vocabulary, token_bytes, seed)
    raise InputError(
        "the teacher's signals were made for another codec",
        value=f"{name}, expected one of {', '.join(CODECS)}",
        where="the signals' manifest",
        remedy="build the signals again, or read them with the version that made them",
    )


def codec_of(section: Mapping[str, Any], width: int, vocabulary: int) -> Codec:
    """The codec that a signals node's section names."""
    settings = {name: section[name] for name in ("token_bytes", "seed") if name in section}
    return make_codec(section["codec"], width, vocabulary, **settings)


def split_rows(encoded: Stored, codec: Codec) -> list[Stored]:
    """Row by row, as a stored teacher reads them."""
    fixed = {name: tensor for name, tensor in encoded.items() if name not in (*codec.flat, SIZES)}
    count = len(next(iter(fixed.values())))
    ends = encoded[SIZES].cumsum(0).tolist() if codec.flat else [0] * count
    return [
        {name: tensor[row] for name, tensor in fixed.items()}
        | {name: encoded[name][ends[row - 1] if row else 0 : ends[row]] for name in codec.flat}
        for row in range(count)
    ]
