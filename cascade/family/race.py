"""The race of a stage's candidates: short trainings, and successive halving picks who goes on."""

from __future__ import annotations

import math
from collections.abc import Callable

from cascade.errors import CascadeError, InputError
from cascade.family.graph import Node, StageNodes
from cascade.storage.manifest import Manifest


def race(stage: StageNodes, make: Callable[[Node], Manifest]) -> int:
    """Run the legs of a stage's candidates and return the winner's index.

    After every leg the half with the lower cross-entropy goes on, rounded up; of equals the one that the
    planner ranks higher. The rows it is measured on are the same for all, so their noise cancels. A candidate
    whose training fails, such as one whose loss is not finite, comes last; the error is raised if all do.
    """
    standing = list(range(len(stage.candidates)))
    for leg in range(len(stage.candidates[0].legs)):
        found: dict[int, float] = {}
        failure: CascadeError | None = None
        for index in standing:
            candidate = stage.candidates[index]
            make(candidate.pruned)
            try:
                found[index] = make(candidate.legs[leg]).facts["end"]["ce"]
            except CascadeError as error:
                if error.retryable or isinstance(error, InputError):
                    raise
                found[index], failure = math.inf, error
        if failure and min(found.values()) == math.inf:
            raise failure
        standing.sort(key=lambda index: (found[index], index))
        standing = standing[: -(-len(standing) // 2)]
    return standing[0]
