"""Sizes chosen by hand: taken as they are, or refused with the nearest legal ones."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cascade.errors import InputError
from cascade.planning.axes import Axis
from cascade.planning.explicit import chosen_child
from tests.unit.planning.shapes import SMOLLM2_135M, TINY

EVERY = tuple(Axis)


def test_what_is_left_out_stays() -> None:
    child = chosen_child(SMOLLM2_135M, SMOLLM2_135M, {Axis.FFN: 1000, Axis.LAYERS: 24}, axes=EVERY)
    assert child == replace(SMOLLM2_135M, ffn=1000, layers=24)


def test_a_hidden_size_that_the_heads_do_not_divide_names_the_nearest() -> None:
    with pytest.raises(InputError, match="9 query heads do not divide it") as caught:
        chosen_child(SMOLLM2_135M, SMOLLM2_135M, {Axis.HIDDEN: 500}, axes=EVERY)
    assert caught.value.value == "hidden: 500"
    assert caught.value.remedy == "the nearest legal sizes: 495, 504"
    assert chosen_child(SMOLLM2_135M, SMOLLM2_135M, {Axis.HIDDEN: 504}, axes=EVERY).hidden == 504


def test_groups_that_do_not_divide_the_hidden_size_are_refused() -> None:
    with pytest.raises(InputError, match="7 query heads") as caught:
        chosen_child(
            SMOLLM2_135M,
            replace(SMOLLM2_135M, kv_groups=7, heads_per_group=1),
            {Axis.FFN: 512},
            axes=EVERY,
        )
    assert "574" in caught.value.remedy


@pytest.mark.parametrize("size", [0, 31, 64])
def test_a_size_that_is_no_cut_is_refused_with_the_range(size: int) -> None:
    with pytest.raises(InputError, match="no such size") as caught:
        chosen_child(SMOLLM2_135M, SMOLLM2_135M, {Axis.LAYERS: size}, axes=EVERY)
    assert "1 to 30" in caught.value.remedy


def test_an_axis_that_the_parent_has_not_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be cut"):
        chosen_child(TINY, TINY, {Axis.EXPERTS: 2}, axes=(Axis.LAYERS, Axis.FFN))


def test_nothing_cut_is_refused() -> None:
    with pytest.raises(InputError, match="nothing is cut"):
        chosen_child(TINY, TINY, {Axis.LAYERS: 4}, axes=EVERY)


def test_where_heads_and_channels_are_bound_the_channels_must_follow() -> None:
    bound = replace(TINY, counts=replace(TINY.counts, bound=True))
    with pytest.raises(InputError, match="nearest legal sizes: 32"):
        chosen_child(bound, bound, {Axis.KV_GROUPS: 1}, axes=EVERY)
    child = chosen_child(bound, bound, {Axis.KV_GROUPS: 1, Axis.HIDDEN: 32}, axes=EVERY)
    assert (child.hidden, child.kv_groups) == (32, 1)


def test_a_rotation_unties() -> None:
    assert not chosen_child(TINY, TINY, {Axis.HIDDEN: 48}, axes=EVERY, rotates=True).tied
    assert chosen_child(TINY, TINY, {Axis.FFN: 48}, axes=EVERY, rotates=True).tied
