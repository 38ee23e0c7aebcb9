"""What crosses the border of a node's process: the job that goes in, the events that come out."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any, TextIO

from cascade.errors import Interrupted
from cascade.family.graph import Node, owner_folder
from cascade.kinds import Kind
from cascade.storage.locations import Location, open_location

# From the request to stop until a node ends itself, and until its orchestrator kills what is left of it.
# Prefect kills the orchestrator 30 s after a cancel.
STOP_SECONDS = 20
KILL_SECONDS = STOP_SECONDS + 5

TRAINING = "training"


@dataclass(frozen=True)
class RunOptions:
    """What does not change the result and therefore stays outside every key.

    store: the root all artifacts lie under. cache: scratch folders and verified copies on this machine.
    run: names the build in the manifests of what it makes. device: a torch device, or "" to choose.
    """

    store: str
    cache: str
    run: str
    device: str
    checkpoint_seconds: float
    trust_remote_code: bool
    gradient_checkpointing: bool = False
    compile: bool = False


@dataclass(frozen=True)
class Job:
    """One node, ready to be run by a process that knows nothing else."""

    kind: Kind
    family: str
    stage: str
    key: str
    uri: str
    section: dict[str, Any]
    hints: dict[str, Any]
    inputs: dict[str, dict[str, str]]
    options: RunOptions

    @property
    def name(self) -> str:
        """What people call the node: stage and kind."""
        return f"{self.stage}/{self.kind}"

    @property
    def location(self) -> Location:
        """Where the artifact will be published."""
        return open_location(self.uri)

    @property
    def training(self) -> Location:
        """Where the node keeps what is unfinished until its artifact exists: its lease, snapshots, shards."""
        store = open_location(self.options.store)
        return owner_folder(store, self.kind, self.family, self.stage) / TRAINING / self.key[:12]

    def dump(self) -> str:
        """The job as JSON, read back by `load_job`."""
        return json.dumps(asdict(self), indent=1)


def job_of(node: Node, options: RunOptions) -> Job:
    """Bind a node to a store and to run options."""
    store = open_location(options.store)
    inputs = {
        name: {"uri": source.location(store).uri, "key": source.key} for name, source in node.inputs.items()
    }
    return Job(
        node.kind,
        node.family,
        node.stage,
        node.key,
        node.location(store).uri,
        node.section,
        node.hints,
        inputs,
        options,
    )


def load_job(text: str) -> Job:
    """Read what `Job.dump` wrote."""
    record = json.loads(text)
    return Job(**{**record, "kind": Kind(record["kind"]), "options": RunOptions(**record["options"])})


@dataclass
class JsonReport:
    """A report that writes one JSON line an event; a listener that went away is no reason to fail."""

    stream: TextIO
    lock: threading.Lock = field(default_factory=threading.Lock)

    def log(self, message: str) -> None:
        """One line for a person."""
        self.send("log", message=message)

    def progress(self, done: int, total: int, unit: str, **figures: float) -> None:
        """Progress of the long work in hand."""
        self.send("progress", done=done, total=total, unit=unit, figures=figures)

    def send(self, event: str, **content: Any) -> None:
        """Write one event."""
        with self.lock:
            try:
                # A library may have left a line without its end in the same pipe.
                self.stream.write("\n" + json.dumps({"event": event, **content}) + "\n")
                self.stream.flush()
            except BrokenPipeError:
                # The orchestrator died; the kernel has sent us SIGTERM, and the checkpoint comes first.
                self.stream = open("/dev/null", "w", encoding="utf-8")  # noqa: SIM115


class StopSignal:
    """SIGTERM ends the node at once, or at the next question where the work has promised to ask."""

    def __init__(self) -> None:
        self.requested = False
        self.polled = False

    def listen(self) -> None:
        """Install the handler; call it in the main thread."""
        signal.signal(signal.SIGTERM, self._on_signal)

    @contextmanager
    def cooperative(self) -> Iterator[None]:
        """Within this block the work asks by itself, and saves a snapshot before it stops."""
        self.polled = True
        try:
            yield
        finally:
            self.polled = False
        # The request came after the last question.
        if self.requested:
            sys.exit(Interrupted.exit_code)

    def __call__(self) -> bool:
        """Whether to stop."""
        return self.requested

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested = True
            # The default action of SIGALRM ends the process, even inside a hung native call.
            signal.alarm(STOP_SECONDS)
        if not self.polled:
            sys.exit(Interrupted.exit_code)
