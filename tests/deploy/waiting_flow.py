"""A flow that waits for a child, as ours wait for a trainer, and gives it time to save before it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from prefect import flow

CHILD = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def save(number, frame):
    time.sleep(2)
    (folder / "saved").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
(folder / "started").touch()
time.sleep(600)
"""


@flow(persist_result=False)
def waiting(folder: str) -> None:
    """Wait until told to end; `folder` receives the files started, saved and ended."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, folder], start_new_session=True)
    try:
        child.wait()
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait()
        (Path(folder) / "ended").touch()
