"""The head of a GGUF file, read once before the real reader sees it: that one believes every count.

Layout (ggml's docs/gguf.md): magic, version, number of tensors, number of fields; the fields; name, shape,
type and place of every tensor; their data. A string is its length and its bytes.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT, ALIGNMENT_KEY = 32, "general.alignment"
# Of a field: how `struct` calls its type, by the number that the file gives it.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MOST_DIMENSIONS = 4
# A layer has tensors of its own, an expert at least a row of one.
COUNTS = (".block_count", ".expert_count")


def check_gguf(path: Path) -> None:
    """ValueError, which says what and where, unless the head is whole and describes what the file holds."""
    if path.stat().st_size < len(MAGIC):
        raise ValueError("this is not a GGUF file")
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[: len(MAGIC)] != MAGIC:
            raise ValueError("this is not a GGUF file")
        try:
            _Head(data).check()
        except struct.error as error:
            raise ValueError("it ends within its head") from error
        except UnicodeDecodeError as error:
            raise ValueError("a name in its head is not UTF-8") from error


@dataclass
class _Head:
    """A place in the file that moves on with everything that is read."""

    data: mmap.mmap
    at: int = len(MAGIC)
    order: str = "<"
    numbers: dict[str, float] = field(default_factory=dict)

    def check(self) -> None:
        """Read to the end of the head."""
        version = self.number("I")
        if not version & 0xFFFF:
            # Written on a machine with the other order of bytes.
            self.order, self.at = ">", len(MAGIC)
            version = self.number("I")
        if version not in VERSIONS:
            raise ValueError(f"version {version} of GGUF is not one of {', '.join(map(str, VERSIONS))}")
        tensors, fields = self.number("Q"), self.number("Q")
        for _ in range(self.believed(fields, 13, "fields")):
            self.read_field()
        for name, value in self.numbers.items():
            if name.endswith(COUNTS) and not 0 <= value <= 1000 * tensors:
                raise ValueError(f"{name} is {value:g}, and there are {tensors} tensors")
        found = [self.read_tensor() for _ in range(self.believed(tensors, 24, "tensors"))]
        alignment = int(self.numbers.get(ALIGNMENT_KEY, ALIGNMENT))
        if alignment < 1:
            raise ValueError(f"{ALIGNMENT_KEY} is {alignment}")
        begin, free = -(-self.at // alignment) * alignment, 0
        for offset, size, name in sorted(found):
            if offset < free or offset % alignment:
                raise ValueError(f"tensor {name} begins inside another one, or at no multiple of {alignment}")
            free = offset + size
            if begin + free > len(self.data):
                raise ValueError(f"it ends before the end of tensor {name}")

    def number(self, code: str) -> int:
        """The number of this type here."""
        (value,) = struct.unpack_from(self.order + code, self.data, self.at)
        self.at += struct.calcsize(self.order + code)
        return int(value) if code not in "fd" or math.isfinite(value) else 0

    def believed(self, count: int, size: int, what: str) -> int:
        """The count, if so many things of at least `size` bytes have room in the rest of the file."""
        if count * size > len(self.data) - self.at:
            raise ValueError(f"it is too short for its {count} {what}")
        return count

    def text(self) -> str:
        """The string here."""
        size = self.believed(self.number("Q"), 1, "characters")
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def skip_text(self) -> None:
        """The string here, whatever its encoding."""
        size = self.believed(self.number("Q"), 1, "characters")
        self.at += size

    def read_field(self) -> None:
        """Name and value; plain numbers are kept."""
        name, kind = self.text(), self.number("I")
        if kind in SCALARS:
            self.numbers[name] = self.number(SCALARS[kind])
        elif kind == STRING:
            self.skip_text()
        elif kind == ARRAY:
            self.skip_array(name)
        else:
            raise ValueError(f"field {name} has an unknown type ({kind})")

    def skip_array(self, name: str) -> None:
        """An array of numbers or of strings; others are in no model."""
        kind, count = self.number("I"), self.number("Q")
        if kind in SCALARS:
            size = struct.calcsize(self.order + SCALARS[kind])
            self.at += self.believed(count, size, f"values of {name}") * size
        elif kind == STRING:
            for _ in range(self.believed(count, 8, f"values of {name}")):
                self.skip_text()
        else:
            raise ValueError(f"field {name} is an array of an unknown type ({kind})")

    def read_tensor(self) -> tuple[int, int, str]:
        """Place, bytes and name of a tensor."""
        name, dimensions = self.text(), self.number("I")
        if dimensions > MOST_DIMENSIONS:
            raise ValueError(f"tensor {name} has {dimensions} dimensions")
        sizes = [self.number("Q") for _ in range(dimensions)]
        kind, offset = self.number("I"), self.number("Q")
        try:
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except ValueError:
            raise ValueError(f"tensor {name} has an unknown quantisation ({kind})") from None
        return offset, math.prod(sizes) // block * size, name
