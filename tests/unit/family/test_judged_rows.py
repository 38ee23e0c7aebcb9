"""The rows that a race is judged on: the same for all candidates, and trained on by no leg."""

from __future__ import annotations

import pytest

from cascade.data.corpus import Corpus
from cascade.distillation.settings import DistillSettings
from cascade.distillation.signals import Part
from cascade.family.children import judged_rows
from cascade.family.race import RACE_PART
from tests.unit.distillation.teaching import LENGTH, make_rows


@pytest.fixture
def corpus() -> Corpus:
    return make_rows()


def trained(corpus: Corpus, rows: int, batch: int) -> set[int]:
    """What the longest leg trains on: whole steps up to its share of the steps."""
    steps = -(-rows // batch)
    last = max(1, round(RACE_PART * steps)) * batch
    return {corpus.row(position) for position in range(min(last, rows))}


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("share", [0.5, 1.0, 1.7, 3.0])
def test_no_leg_trains_on_them(corpus: Corpus, batch: int, share: float) -> None:
    rows = round(share * len(corpus.train))
    settings = DistillSettings(tokens=rows * LENGTH, batch_rows=batch)
    part, judged = judged_rows(corpus, settings, 4 * LENGTH, held_out=2)
    assert part is Part.TRAIN
    assert judged
    assert not trained(corpus, rows, batch) & set(judged)
    assert max(judged) == len(corpus.train) - 1, "what comes last in the corpus is trained on last, if at all"


def test_where_every_row_is_seen_in_the_race_held_out_rows_judge(corpus: Corpus) -> None:
    settings = DistillSettings(tokens=5 * len(corpus.train) * LENGTH, batch_rows=2)
    assert judged_rows(corpus, settings, 4 * LENGTH, held_out=2) == (Part.HELD_OUT, [0, 1])
