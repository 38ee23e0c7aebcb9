"""Which layers are compared: the published pair alone, or several, by their origin or their depth."""

from __future__ import annotations

import pytest

from cascade.distillation.layer_map import composed, relation_pair, state_pairs
from cascade.errors import InputError


@pytest.mark.parametrize("origins", [None, (0, 3, 4, 9, 11)])
def test_one_pair_is_the_published_one(origins: tuple[int, ...] | None) -> None:
    assert state_pairs(5, 12, 1, origins) == ((3, 10),)


def test_several_go_by_origin_where_the_student_was_cut() -> None:
    origins = (0, 3, 4, 9, 10, 19, 20, 23, 28)
    assert state_pairs(9, 30, 2, origins) == ((3, 9), (7, 28))
    assert state_pairs(9, 30, 4, origins) == ((1, 3), (3, 9), (5, 19), (7, 28))
    everything = state_pairs(9, 30, 8, origins)
    assert everything == (*enumerate(origins[:7]), (7, 28))


def test_several_go_by_depth_where_it_was_not() -> None:
    # As BERT's: of 6 layers and 12, all but the last.
    assert state_pairs(6, 12, 5) == ((0, 1), (1, 3), (2, 6), (3, 8), (4, 10))
    assert state_pairs(5, 5, 4) == ((0, 0), (1, 1), (2, 2), (3, 3))


@pytest.mark.parametrize("student", range(2, 14))
@pytest.mark.parametrize("teacher", [2, 3, 7, 12, 30])
def test_pairs_are_spread_and_rise_to_the_second_to_last(student: int, teacher: int) -> None:
    for count in range(1, student):
        pairs = state_pairs(student, teacher, count)
        own, others = (list(side) for side in zip(*pairs, strict=True))
        assert pairs[-1] == (student - 2, teacher - 2)
        assert len(set(own)) == count
        assert own == sorted(own)
        assert others == sorted(others)
        assert others[0] >= 0
        gaps = [after - before for before, after in zip([-1, *own], own, strict=False)]
        assert max(gaps) - min(gaps) <= 1


def test_more_pairs_than_layers_are_refused() -> None:
    with pytest.raises(InputError) as caught:
        state_pairs(4, 12, 4)
    assert caught.value.remedy == "ask for at most 3"


def test_relations_are_of_the_last_layer_and_its_origin_or_of_an_upper_one() -> None:
    assert relation_pair(3, 8, (0, 4, 6)) == (2, 6)
    assert relation_pair(6, 12) == (5, 11)
    assert relation_pair(6, 24) == (5, 20)


def test_cuts_of_cuts_say_where_a_layer_was_at_first() -> None:
    first, second, third = [0, 2, 3, 5, 7], [0, 1, 4], [1, 2]
    assert composed([first]) == (0, 2, 3, 5, 7)
    assert composed([second, first]) == (0, 2, 7)
    assert composed([third, second, first]) == (2, 7)
