"""Python's collector of cyclic garbage, in processes that begin with thousands of imports.

torch, transformers and prefect make a million objects that stay for good. The collector would go through them
again and again while they are made, and once more when the process ends: that takes almost as long as the
imports.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager

# New objects between two looks; Python's default (700 in 3.11) suits small programs.
SELDOM = 20_000


def collect_seldom() -> None:
    """Look for cyclic garbage seldom from now on, and not when the process ends.

    Not for a process that has tensors in cycles: they would take their memory for longer.
    """
    gc.set_threshold(SELDOM, 10, 10)
    atexit.register(gc.freeze)


@contextmanager
def imports_that_stay() -> Iterator[None]:
    """What exists when this block ends is never looked at again, here and in processes forked from it.

    The collector is on afterwards.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
