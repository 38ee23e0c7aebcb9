"""The race of a stage's candidates: short trainings, and successive halving picks who goes on."""

from __future__ import annotations

import math
from collections.abc import Callable

from cascade.errors import CascadeError, InputError
from cascade.family.graph import Node, StageNodes
from cascade.storage.manifest import Manifest

# The last leg of a race ends here: Minitron saw rankings settle within 200 of its 400 steps (2407.14679,
# figure 9), and eight candidates then cost 7/4 of one whole training, or 22 % of training all eight.
RACE_PART = 1 / 4
# A race is judged on so many tokens at most: all candidates on the same ones, so most of their noise cancels.
JUDGED_TOKENS = 16_384


def legs_of(candidates: int, steps: int, where: str = "") -> list[float]:
    """Successive halving (Jamieson and Talwalkar, 1502.07943): the share of the training after each leg.

    After every leg the better half goes on to twice the tokens; the winner's training is the one it would
    have had alone, so a race wastes only what the losers trained. Raises InputError for a training of too few
    steps to tell its legs apart.
    """
    rounds = math.ceil(math.log2(candidates))
    parts = [RACE_PART / 2 ** (rounds - 1 - leg) for leg in range(rounds)]
    if parts and steps * parts[0] < 1:
        raise InputError(
            f"a race of {candidates} candidates needs a training of {round(1 / parts[0])} steps or more",
            value=f"{steps} steps",
            where=f"{where}, prune.candidates",
            remedy="distill on more tokens, set smaller `batch_tokens`, or let fewer shapes race",
        )
    return parts


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
