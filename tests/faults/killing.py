"""Builds whose node is killed at chosen points, by a script around the real node: no hooks in the product."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from cascade.errors import Interrupted, MachineFault
from cascade.family import runner
from cascade.family.index import WRITING
from cascade.recipe import Recipe
from cascade.storage.locations import Location, open_location
from tests.building import build_directly
from tests.reports import Recorder

# Signals of a few rows a shard, so that some are finished when the node is killed. Every job, step and
# snapshot is noted. SIGKILL reaches the process group: the node, and the process that forked it.
NODE = """
    import gc, json, os, signal, sys, threading
    gc.disable()  # These imports are the server's own, made early; `serve` turns the collector on again.
    from cascade import node
    from cascade.distillation.rows import CorpusRows
    from cascade.distillation.signals import FinishedShards, writing
    from cascade.family.job import JsonReport
    from cascade.family.workplace import Workplace
    from cascade.storage.checkpoints import TrainingCheckpoints
    from cascade.storage.lease import Lease
    from cascade.storage.local import LocalStore
    from cascade.storage.s3 import S3Store

    writing._rows_per_shard = lambda codec, length: 24
    moment = json.loads(os.environ["MOMENT"])
    job, counts, lock, timers = "", {}, threading.RLock(), []

    def note(*words):
        with lock, open(os.environ["NOTES"], "a") as notes:
            notes.write(" ".join(map(str, words)) + "\\n")

    def kill():
        with lock:
            note("killed", job, moment["point"])
            os.killpg(0, signal.Signals[moment["signal"]])

    def reached(point):
        counts[point] = counts.get(point, 0) + 1
        if moment and (job, point, counts[point]) == (moment["job"], moment["point"], moment["count"]):
            if moment["seconds"]:
                timers.append(threading.Timer(moment["seconds"], kill))
                timers[0].start()
            else:
                kill()
        if point == "finish" and timers:
            kill()

    def around(kind, name, before=lambda *a, **o: None, after=lambda *a: None):
        inner = getattr(kind, name)
        def outer(*arguments, **options):
            before(*arguments, **options)
            found = inner(*arguments, **options)
            after(*arguments)
            return found
        setattr(kind, name, outer)

    def begin(started, *rest):
        global job
        job = started.name
        note("job", job)
        reached("begin")

    def about_to_move(source, target, *rest):
        if str(target).endswith(".safetensors") and "/step-" in str(target):
            reached("tensors")
        if str(target).endswith("/record.json"):
            reached("record")
        if "incoming" in str(source):
            reached("manifest")

    def about_to_write(store, path, *rest, **options):
        if path.endswith("/record.json"):
            reached("record")
        if path.endswith("/manifest.json"):
            reached("manifest")

    around(node, "run_job", begin)
    around(JsonReport, "progress", lambda *a, **o: reached("progress"))
    around(CorpusRows, "rows", lambda *a: (note("step"), reached("step")))
    around(FinishedShards, "keep", after=lambda *a: reached("shard"))
    around(TrainingCheckpoints, "save", lambda c, step, *a: (note("storing", step), reached("snapshot")),
           lambda c, step, *a: note("stored", step))
    around(Workplace, "draft", lambda *a: reached("draft"))
    around(os, "rename", about_to_move)
    around(os, "replace", about_to_move)
    around(S3Store, "write", about_to_write)
    around(S3Store, "upload",
           lambda *a, create=False: reached("upload" if a[3:] == (True,) or create else "tensors"))
    around(Lease, "finish", lambda *a: reached("finish"))
    sys.exit(node.main())
"""


@dataclass(frozen=True)
class Moment:
    """When a node is killed: so many seconds after its job has come to a point of its work for the n-th time.

    One that comes to `finish` sooner is killed there.

    begin: before anything else. progress: of any long work. shard: after one was kept. step: of a training.
    snapshot, tensors, record: before it is stored, and before its two files appear. upload: of a file of an
    artifact to S3. draft: all is done and nothing published. manifest: before it appears; in a folder that is
    with all other files. finish: after it is published.
    """

    job: str
    point: str
    count: int = 1
    seconds: float = 0.0
    signal: str = "SIGKILL"


@dataclass
class Killed:
    """A family that is being built, and killed, into one store."""

    recipe: Recipe
    store: str
    folder: Path
    monkeypatch: pytest.MonkeyPatch

    def __post_init__(self) -> None:
        self.runs = 0
        self.cache = self.folder / "cache"
        self.report = Recorder()

    def run(self, moment: Moment | None = None) -> dict[str, Any] | None:
        """Build until the moment, or to the end. No node that is done may be begun again."""
        self.runs += 1
        notes = self.folder / f"notes-{self.runs}"
        before = self.manifests()
        index = None
        try:
            with scripted(self.monkeypatch, notes, moment):
                index = self.build()
        except (MachineFault, Interrupted) as error:
            if moment is None or (moment.signal == "SIGTERM") != isinstance(error, Interrupted):
                raise
        said = notes.read_text().splitlines() if notes.exists() else []
        if moment:
            assert f"killed {moment.job} {moment.point}" in said, f"{moment} was not reached: {said[-3:]}"
        begun = [line.removeprefix("job ") for line in said if line.startswith("job ")]
        assert len(begun) == len(set(begun))
        done = set(map(job_of, before.values()))
        assert done.isdisjoint(begun)
        after = self.manifests()
        assert {path: after[path] for path in before} == before
        killed = moment.job if moment else ""
        made = after.keys() - before.keys()
        ended = {path.split("/")[-2] for path in made if job_of(after[path]) != killed}
        kept = {key for path in open_location(self.store).walk() for key in unfinished(path)}
        assert ended.isdisjoint(kept)
        self.notes = said
        return index

    def build(self) -> dict[str, Any]:
        """To the end, but for the moment in the environment; the family's index."""
        return build_directly(self.recipe, self.store, self.cache, self.report, checkpoint_seconds=0)

    def manifests(self) -> dict[str, bytes]:
        """Of all artifacts in the store."""
        root = open_location(self.store)
        return {path: (root / path).read_bytes() for path in root.walk() if path.endswith("/manifest.json")}


def unfinished(path: str) -> list[str]:
    """The first digits of the key of the node that keeps this file until it is done."""
    return [rest.split("/")[0] for rest in path.split("/training/")[1:]]


def job_of(manifest: bytes) -> str:
    """The name of the job that made it."""
    made = json.loads(manifest)
    return f"{made['stage']}/{made['kind']}"


@contextmanager
def scripted(monkeypatch: pytest.MonkeyPatch, notes: Path, moment: Moment | None = None) -> Iterator[None]:
    """Nodes are started by the script in this block."""
    start, script = runner.node_process, textwrap.dedent(NODE)
    with monkeypatch.context() as patch:
        temporary = notes.parent / "tmp"
        temporary.mkdir(exist_ok=True)
        patch.setenv("TMPDIR", str(temporary))
        patch.setenv("NOTES", str(notes))
        patch.setenv("MOMENT", json.dumps(asdict(moment) if moment else None))
        patch.setattr(
            runner, "node_process", lambda command: start([sys.executable, "-c", script, *command[3:]])
        )
        yield


def weights(store: str, index: dict[str, Any]) -> dict[str, str]:
    """File of a child's checkpoint -> sha256; seconds and dates are left out."""
    return {
        f"{stage['name']}/{path}": (open_location(stage["checkpoint"]) / path).sha256()
        for stage in index["stages"]
        for path in open_location(stage["checkpoint"]).walk()
        if path not in ("manifest.json", "steps.jsonl")
    }


KEPT = (".publishing.lock", WRITING)


def leftovers(store: Location, cache: Path) -> list[str]:
    """What a killed build leaves and a finished one must not."""
    found = [path for path in store.walk() if "/training/" in path]
    found += [str(path) for path in (*cache.glob("work/*"), *cache.parent.glob("tmp/*"))]
    folders = [cache, *([store.local_path] if store.local_path else [])]
    for folder in folders:
        found += [str(path) for path in folder.rglob(".*") if path.name not in KEPT]
    return found


@dataclass(frozen=True)
class Snapshots:
    """The steps after which the newest snapshot is stored, and the newest was begun; 0 without one."""

    stored: int
    begun: int


NO_SNAPSHOTS = Snapshots(0, 0)


def require_snapshots_in_time(notes: list[str], before: Snapshots = NO_SNAPSHOTS) -> Snapshots:
    """With an interval of 0 s a snapshot is begun with the next step but one after the last is stored.

    before: of the run that was killed before this one.
    """
    stored, begun, waiting, storing = before.stored, before.begun, 0, False
    for line in notes:
        word, _, rest = line.partition(" ")
        if word == "storing":
            begun, waiting, storing = int(rest), 0, True
        elif word == "stored":
            stored, storing = int(rest), False
        elif word == "step" and not storing:
            waiting += 1
            assert waiting <= 3, notes
    return Snapshots(stored, begun)
