"""Real parents by their shape alone, for tests of the planner."""

from __future__ import annotations

from cascade.architecture import Architecture

SMOLLM2_135M = Architecture(30, 576, 1536, 3, 3, 64, 49152, tied=True)
QWEN2_5_500M = Architecture(24, 896, 4864, 2, 7, 64, 151936, tied=True, qkv_bias=True)
LLAMA3_8B = Architecture(32, 4096, 14336, 8, 4, 128, 128256, tied=False)
TINY = Architecture(4, 64, 128, 2, 2, 16, 258, tied=True)
