"""Ways to spoil what is whole: bytes of a file, and values of a tree. All drawn from a seed."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

# A file's length, count or offset that lies: 32 and 64 bits, as large as they get or merely too large.
LIES = [
    (size, value)
    for size in (4, 8)
    for value in (0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1), 2 ** (4 * size), 2**30)
]

# More than any reader's stack takes.
DEEP = 100_000


def cut(data: bytes, draw: random.Random) -> bytes:
    """The file ends early."""
    return data[: draw.randrange(len(data))]


def flip(data: bytes, draw: random.Random) -> bytes:
    """Up to four bits are the other way round."""
    spoiled = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        spoiled[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(spoiled)


def lie(data: bytes, draw: random.Random) -> bytes:
    """A number in the file is another one."""
    size, value = draw.choice(LIES)
    at = draw.randrange(max(1, len(data) - size))
    return data[:at] + value.to_bytes(size, draw.choice(["little", "big"])) + data[at + size :]


def leave_out(data: bytes, draw: random.Random) -> bytes:
    """Some bytes are missing in the middle."""
    at = draw.randrange(len(data))
    return data[:at] + data[at + draw.randint(1, 64) :]


def repeat(data: bytes, draw: random.Random) -> bytes:
    """Some bytes are there twice."""
    at = draw.randrange(len(data))
    return data[: at + draw.randint(1, 64)] + data[at:]


def noise(data: bytes, draw: random.Random) -> bytes:
    """Some bytes are random ones."""
    at, size = draw.randrange(len(data)), draw.randint(1, 64)
    return data[:at] + draw.randbytes(size) + data[at + size :]


DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (cut, flip, lie, leave_out, repeat, noise)


def damaged(data: bytes, count: int, seed: int, near: int | None = None) -> Iterator[tuple[str, bytes]]:
    """Name and content of `count` spoiled copies, no two alike; near: only the first bytes are spoiled,
    where a header is."""
    seen = {data}
    draw = random.Random(seed)
    head = data[:near] if near else data
    tail = data[len(head) :]
    number = 0
    while len(seen) <= count:
        how = DAMAGES[number % len(DAMAGES)]
        spoiled = how(head, draw) + (b"" if how is cut else tail)
        if spoiled not in seen:
            seen.add(spoiled)
            yield f"{how.__name__}-{seed}-{number}", spoiled
        number += 1


def nested(depth: int) -> list[Any]:
    """Lists in lists."""
    tree: list[Any] = []
    for _ in range(depth):
        tree = [tree]
    return tree


WILD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    7,
    2**31,
    10**9,
    2**63,
    10**30,
    -(10**30),
    0.0,
    0.5,
    -0.5,
    1e308,
    math.nan,
    math.inf,
    -math.inf,
    "",
    " ",
    "0",
    "1e400",
    "9" * 400,
    "9" * 400 + "T",
    "x" * 5000,
    "none",
    "\x00",
    "\u00e9\u4e2d\U0001f600",
    "\u202e",
    "../../etc/passwd",
    "s3://",
    "http://127.0.0.1:9/x",
    [],
    [[]],
    ["x"],
    [None],
    [1, 2, 3],
    {},
    {"": None},
    {"path": None},
    {"x": {"x": {"x": 1}}},
    nested(40),
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in a tree, but its root."""
    keys = tree.keys() if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    found = []
    for key in keys:
        found += [(*path, key), *places(tree[key], (*path, key))]
    return found


def inside(tree: Any, path: tuple[Any, ...]) -> Any:
    """What holds the value at a path."""
    for key in path[:-1]:
        tree = tree[key]
    return tree


def spoiled_tree(tree: Any, draw: random.Random, times: int = 1) -> tuple[str, Any]:
    """A copy with values replaced, removed, renamed, or added; the name says which."""
    changed, names = copy.deepcopy(tree), []
    for _ in range(times):
        path = draw.choice(places(changed))
        holder, key, wild = inside(changed, path), path[-1], copy.deepcopy(draw.choice(WILD))
        how = draw.choice(["replace"] * 5 + ["remove", "rename", "wrap"])
        if how == "replace":
            holder[key] = wild
        elif how == "remove":
            del holder[key]
        elif how == "rename" and isinstance(holder, dict):
            holder[f"{key}_"] = holder.pop(key)
        else:
            holder[key] = [holder[key]]
        shown = f"={str(wild)[:20]!r}" if how == "replace" else ""
        names.append(f"{how} {'.'.join(map(str, path))}{shown}")
        if not places(changed):
            break
    return "; ".join(names), changed
