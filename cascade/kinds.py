"""What the nodes of a family make, and where it is browsed: the words of keys, store, index and cards."""

from __future__ import annotations

from enum import StrEnum


class Kind(StrEnum):
    """What a node makes; also the name of its folder in the store."""

    CORPUS = "corpus"
    PARENT = "parent"
    GIVEN = "given"
    CORRECTED = "corrected"
    SIGNALS = "signals"
    IMPORTANCE = "importance"
    PRUNED = "pruned"
    INITIALISED = "initialised"
    RACED = "raced"
    DISTILLED = "distilled"
    ON_POLICY = "on_policy"
    WATCHED = "watched"
    EXTENDED = "extended"
    EVALUATED = "evaluated"
    EVALUATED_LONG = "evaluated-long"


# Shared by every family with the same teacher, corpus and packing.
SHARED = (Kind.CORPUS, Kind.WATCHED, Kind.SIGNALS)
# What a stage's child goes through, in this order.
CHILD_TRAININGS = (Kind.DISTILLED, Kind.ON_POLICY)
# All kinds that train a model.
TRAININGS = (Kind.CORRECTED, Kind.RACED, *CHILD_TRAININGS, Kind.EXTENDED)
# Where what no stage owns is browsed.
PARENT_STAGE = "parent"
# Where what families share is browsed.
SHARED_FOLDER = "shared"
