"""Broken files of every kind: each ends in an error of ours, in time and in little memory.

They are tried in a process of its own (`tests.faults.trial`), through the functions that the commands call.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.corpus import Whole
from tests.faults.errors import not_ours
from tests.faults.trial import ESCAPED, LOADED, REFUSED, Case, Outcome, tried

Record = Callable[[str, object], None]
# Of every kind of file, and of every kind of tree: in all, thousands in a few minutes.
FEW, MANY = 12, 100


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(tmp_path_factory.mktemp("whole"))


def names(outcomes: list[Outcome], verdict: str) -> list[str]:
    """Of the cases that ended so, with what was said."""
    return [f"{outcome.name}: {outcome.said}" for outcome in outcomes if outcome.verdict == verdict]


def test_a_trial_tells_what_would_be_a_bug(tmp_path: Path) -> None:
    cases = [Case(kind, kind, "") for kind in ("fail", "hang", "hog", "die")]
    outcomes = tried([*cases, Case("next", "show_family", str(tmp_path))], tmp_path / "trial", seconds=5)
    assert [outcome.verdict for outcome in outcomes] == [ESCAPED] * 4 + [REFUSED]
    assert len(not_ours(outcomes)) == 4


def test_every_broken_file_is_refused_in_our_words(
    whole: Whole, tmp_path: Path, record_property: Record
) -> None:
    good = list(whole.whole())
    bad = [*whole.corpora(), *whole.parents(), *whole.ggufs(), *whole.families(), *whole.endless()]
    spoiled = list(whole.spoiled(FEW, seed=0))
    outcomes = tried([*good, *bad, *spoiled], tmp_path / "trial")
    assert not_ours(outcomes) == []
    assert names(outcomes[: len(good)], REFUSED) == []
    assert names(outcomes[len(good) :][: len(bad)], LOADED) == []
    assert names(outcomes[-len(spoiled) :], REFUSED)
    record_property("tried", len(bad) + len(spoiled))
    assert len(bad) > 350


@pytest.mark.slow
def test_what_is_spoiled_at_thousands_of_places_is_refused_or_harmless(
    whole: Whole, tmp_path: Path, record_property: Record
) -> None:
    outcomes = tried(whole.spoiled(MANY, seed=1), tmp_path / "trial")
    assert not_ours(outcomes) == []
    assert names(outcomes, LOADED)
    record_property("tried", len(outcomes))
