"""Training checkpoints: the newest states of an unfinished distillation, so that it can go on."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cascade.errors import CascadeError
from cascade.storage.local import file_sha256
from cascade.storage.locations import Location

TENSORS = "tensors.safetensors"
RECORD = "record.json"


class TrainingCheckpoints:
    """Checkpoints of one training run below `location`; the newest `keep` stay.

    A checkpoint is `step-<number>/tensors.safetensors`, then `record.json` with its digest: without an
    intact record it does not count, so an interrupted save costs only itself.
    """

    def __init__(self, location: Location, keep: int = 2) -> None:
        self.location = location
        self.keep = keep

    def save(self, step: int, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Store the state after `step`, unless it is there; only then drop what is no longer needed.

        tensors: any dtypes; contiguous and not sharing memory (safetensors refuses those).
        record: JSON; it identifies the state. StorageFault and InputError as `Location`.
        """
        if not self._holds(step, record):
            place = self._place(step)
            with (place / TENSORS).staged() as path:
                save_file(tensors, path)
                digest = file_sha256(path)
            content = json.dumps({"step": step, "sha256": digest, "record": record}, allow_nan=False)
            (place / RECORD).write_bytes(content.encode())
        steps = self._steps()
        # A run that fell back to an earlier state makes the later ones again; half of one is of no use.
        whole = [known for known in steps if known <= step and self._record(known)]
        for unneeded in set(steps) - set(whole[-self.keep :]):
            self._place(unneeded).delete_tree()

    def latest(self, cache: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Record and tensors (on the CPU) of the newest intact checkpoint; None when there is none.

        cache: an existing folder for the download from S3; nothing stays in it.
        """
        for step in reversed(self._steps()):
            record = self._record(step)
            if record is not None:
                tensors = self._tensors(step, str(record["sha256"]), cache)
                if tensors is not None:
                    return record["record"], tensors
        return None

    def _steps(self) -> list[int]:
        names = (name.removeprefix("step-") for name in self.location.children() if name.startswith("step-"))
        return sorted(int(name) for name in names if name.isdecimal())

    def _place(self, step: int) -> Location:
        return self.location / f"step-{step:08d}"

    def _holds(self, step: int, record: dict[str, Any]) -> bool:
        """Whether the state after `step` is there, intact and with this record."""
        known = self._record(step)
        if known is None or known["record"] != record:
            return False
        try:
            return (self._place(step) / TENSORS).sha256() == known["sha256"]
        except FileNotFoundError:
            return False

    def _record(self, step: int) -> dict[str, Any] | None:
        try:
            content = json.loads((self._place(step) / RECORD).read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        complete = isinstance(content, dict) and content.keys() == {"step", "sha256", "record"}
        return content if complete else None

    def _tensors(self, step: int, digest: str, cache: Path) -> dict[str, Tensor] | None:
        """The tensors if the file is there and has this digest, else None."""
        place = self._place(step) / TENSORS
        with tempfile.TemporaryDirectory(dir=cache, prefix="checkpoint-") as folder:
            path = place.local_path or Path(folder) / TENSORS
            try:
                if place.local_path is None:
                    place.download(path)
                if file_sha256(path) != digest:
                    return None
                return load_file(path)
            except FileNotFoundError:
                return None
            except SafetensorError as error:
                # The digest is right: this is what was saved, and no older state will read better.
                raise CascadeError(
                    "a checkpoint cannot be read",
                    value=error,
                    where=place.uri,
                    remedy="delete the folder with this run's checkpoints; its training then starts over",
                ) from error
