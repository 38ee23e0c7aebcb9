"""How a decoder with rotary positions (RoPE, 2104.09864) is made to read longer rows: the settings."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class RopeType(StrEnum):
    """How frequencies are scaled; all but NONE are transformers' own `rope_type`.

    NONE: as the config has it. LINEAR: every position is divided by the factor (2306.15595). YARN: slow
    frequencies are divided, fast ones stay, and attention is sharpened (2309.00071). LLAMA3: like YARN by
    wavelengths, without the sharpening (Llama 3.1).
    """

    NONE = "none"
    LINEAR = "linear"
    YARN = "yarn"
    LLAMA3 = "llama3"


@dataclass(frozen=True)
class RopeSettings:
    """What is stated; the config says the rest. theta: the base of the frequencies. factor: by how much rows
    grow. original_length: positions before that."""

    theta: float | None = None
    type: RopeType = RopeType.NONE
    factor: float | None = None
    original_length: int | None = None

    @property
    def stated(self) -> bool:
        """Whether anything is to change."""
        return self != RopeSettings()

    def record(self) -> dict[str, Any]:
        """What is stated, as plain JSON."""
        named = {**asdict(self), "type": self.type.value}
        return {name: value for name, value in named.items() if value not in (None, RopeType.NONE)}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> RopeSettings:
        """What `record` made, after its way through JSON."""
        return cls(**{**record, "type": RopeType(record.get("type", RopeType.NONE))})
