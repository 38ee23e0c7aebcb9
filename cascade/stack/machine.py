"""What the machine has that decides which work pool its worker serves."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# CUDA reaches a GPU through one of these; without them torch need not be asked, which takes seconds.
DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
# On a busy machine; a driver that hangs must not hang the stack.
SECONDS = 180.0
QUESTION = "import torch; print(torch.cuda.device_count())"


def gpu_count(say: Callable[[str], None]) -> int:
    """GPUs that torch can use; says why where there is a driver but none of them."""
    if not any(driver.exists() for driver in DRIVERS):
        return 0
    count, why = asked()
    if not count:
        say(f"note: a GPU's driver is here, but torch sees no GPU ({why}); builds run without one")
    return count


def asked() -> tuple[int, str]:
    """torch's count and its last words, in a process of its own, which frees what torch takes."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", QUESTION],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return 0, f"it did not answer in {SECONDS:.0f} s"
    # Warnings may come before.
    said = last_line(done.stdout)
    if done.returncode or not (said.isascii() and said.isdecimal()):
        return 0, last_line(done.stderr) or f"exit code {done.returncode}"
    return int(said), last_line(done.stderr) or "it counts 0"


def last_line(text: str) -> str:
    """Without the space around it; "" of nothing."""
    return (text.strip().splitlines() or [""])[-1].strip()
