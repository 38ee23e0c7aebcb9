"""What each kind of node does: one function a kind, from verified inputs to files and facts."""

from __future__ import annotations

from collections.abc import Callable

from cascade.family.children import make_corrected, make_distilled, make_extended, make_raced
from cascade.family.cutting import make_importance, make_pruned
from cascade.family.figures import make_evaluated, make_evaluated_long
from cascade.family.packing import make_corpus, make_watched
from cascade.family.students import make_initialised, make_parent
from cascade.family.teaching import make_signals
from cascade.family.workplace import Result, Workplace
from cascade.kinds import Kind

WORK: dict[Kind, Callable[[Workplace], Result]] = {
    Kind.CORPUS: make_corpus,
    Kind.WATCHED: make_watched,
    Kind.PARENT: make_parent,
    Kind.GIVEN: make_parent,
    Kind.CORRECTED: make_corrected,
    Kind.SIGNALS: make_signals,
    Kind.IMPORTANCE: make_importance,
    Kind.PRUNED: make_pruned,
    Kind.INITIALISED: make_initialised,
    Kind.RACED: make_raced,
    Kind.DISTILLED: make_distilled,
    Kind.ON_POLICY: make_distilled,
    Kind.EXTENDED: make_extended,
    Kind.EVALUATED: make_evaluated,
    Kind.EVALUATED_LONG: make_evaluated_long,
}
