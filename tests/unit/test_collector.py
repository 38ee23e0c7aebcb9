"""What is imported is not looked at again, and what comes after it is collected as ever."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator

import pytest

from cascade.collector import SELDOM, imports_that_stay


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


def test_an_import_that_fails_leaves_the_collector_on() -> None:
    with pytest.raises(ImportError), imports_that_stay():
        raise ImportError
    assert gc.isenabled()


SEEN = """
import gc
from cascade.collector import collect_seldom

class Cycle:
    def __init__(self, name):
        self.own, self.name = self, name

    def __del__(self):
        print(self.name)

collect_seldom()
Cycle("first")
few = [[] for _ in range(10_000)]
print("few")
many = [[] for _ in range(100_000)]
print("many", gc.isenabled())
Cycle("last")
"""


def printed(script: str) -> list[str]:
    """What a fresh interpreter prints that runs the script."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.split("\n")[:-1]


def test_garbage_is_looked_for_seldom_and_not_when_the_process_ends() -> None:
    assert printed(SEEN) == ["few", "first", "many True"]


@pytest.mark.parametrize("begin", ["import flows", "from cascade.cli import main; main()"])
def test_flows_and_commands_collect_seldom(begin: str) -> None:
    ask = "import atexit, gc, sys; atexit.register(lambda: print(gc.get_threshold()[0]))"
    assert printed(f"{ask}; sys.argv[1:] = ['--version']; {begin}")[-1] == str(SELDOM)
