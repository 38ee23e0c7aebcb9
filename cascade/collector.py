"""Python's collector of cyclic garbage, in processes that begin with thousands of imports.

torch, transformers and prefect make a million objects that stay for good. The collector would go through them
again and again while they are made, and once more when the process ends: that takes as long as the imports.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager

# New objects between two looks; Python's own 700 is for programs that make few.
SELDOM = 20_000


def collect_seldom() -> None:
    """For the rest of this process, and not at all at its end: it must not hold tensors in cycles."""
    gc.set_threshold(SELDOM, 10, 10)
    atexit.register(gc.freeze)


@contextmanager
def imports_that_stay() -> Iterator[None]:
    """What is made in this block is never looked at again: neither here nor in a process forked from it."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
