"""What is imported is not looked at again, and what comes after it is collected as ever."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator

import pytest

from cascade.collector import imports_that_stay


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


class Cycle:
    def __init__(self) -> None:
        self.own = self


def test_what_is_made_inside_is_left_alone_and_what_is_made_later_is_not() -> None:
    with imports_that_stay():
        assert not gc.isenabled()
        inside = weakref.ref(Cycle())
    later = weakref.ref(Cycle())
    gc.collect()
    assert gc.isenabled()
    assert inside() is not None
    assert later() is None


def test_an_import_that_fails_leaves_the_collector_as_it_was() -> None:
    with pytest.raises(ImportError), imports_that_stay():
        raise ImportError
    assert gc.isenabled()


def test_a_process_that_collects_seldom_collects_and_does_not_at_its_end() -> None:
    script = """
import atexit, gc
from cascade.collector import collect_seldom
class Cycle:
    def __init__(self): self.own = self
    def __del__(self): print("gone")
atexit.register(lambda: print("frozen", gc.get_freeze_count() > 0))
collect_seldom()
Cycle()
many = [Cycle.__new__(Cycle) for _ in range(100_000)]
print("end", gc.isenabled(), flush=True)
many.clear()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    assert said[:2] == ["gone", "end True"]
    assert said[-1] == "frozen True"
