"""The node's process: whom it dies with, when it stops, and what its errors become."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from cascade.errors import CascadeError, InputError, Interrupted, MachineFault
from cascade.family.job import Job, RunOptions
from cascade.kinds import Kind
from cascade.node import explained

FULL = "No space left on device"


@pytest.fixture
def job(tmp_path: Path) -> Job:
    options = RunOptions(str(tmp_path), str(tmp_path), "run", "", 60.0, False)
    return Job(Kind.PRUNED, "tiny", "small", "0" * 64, str(tmp_path / "place"), {}, {}, {}, options)


def test_a_node_whose_orchestrator_is_gone_ends_before_it_reads_its_job() -> None:
    # Process 0 is the parent of no process started by a test.
    command = [sys.executable, "-m", "cascade.node", "--serve", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (Interrupted.exit_code, "", "")


def test_the_bond_with_the_parent_is_tied_before_anything_heavy_is_loaded() -> None:
    code = "import sys, cascade.node; print({'torch', 'pydantic', 'botocore'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    ],
)
def test_out_of_memory_is_a_machine_fault(job: Job, error: Exception) -> None:
    fault = explained(error, job)
    assert type(fault) is MachineFault
    assert fault.where == "small/pruned"
    assert fault.remedy


def test_a_tensor_that_no_memory_holds_is_a_machine_fault(job: Job) -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert type(explained(caught.value, job)) is MachineFault


def test_a_full_disk_is_named(job: Job, tmp_path: Path) -> None:
    # A library in Rust raises a type of its own; a file's name is known only when it is opened.
    for error in (OSError(errno.ENOSPC, FULL), RuntimeError(f"IoError: {FULL} (os error 28)")):
        fault = explained(error, job)
        assert type(fault) is CascadeError
        assert fault.value == str(tmp_path)
        assert "mounted at /" in fault.where
        assert "free space" in fault.remedy
    named = explained(OSError(errno.ENOSPC, FULL, "/dev/shm/scores"), job)
    assert named is not None
    assert named.value == "/dev/shm/scores"


def test_our_own_errors_pass_and_others_stay_tracebacks(job: Job) -> None:
    error = InputError("what", where="here", remedy="none")
    assert explained(error, job) is error
    assert explained(KeyError("x"), job) is None


def test_a_node_reports_that_memory_ran_out(job: Job, tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_text(job.dump())
    script = """
        import sys
        from cascade import node
        def run_job(job, report, stop):
            raise MemoryError
        node.run_job = run_job
        sys.exit(node.main())
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == MachineFault.exit_code, done.stderr
    assert json.loads(done.stdout)["error"]["type"] == "MachineFault"


SERVER = """
    import os, signal, sys, types
    sys.modules["cascade.family.work"] = types.ModuleType("work")
    from cascade import node
    def run_file(path):
        {work}
    node.run_file = run_file
    sys.exit(node.main())
"""


def served(work: str, jobs: str) -> subprocess.CompletedProcess[str]:
    """What a server says whose jobs are all this code."""
    script = textwrap.dedent(SERVER).format(work=work)
    command = [sys.executable, "-c", script, "--serve", str(os.getpid())]
    return subprocess.run(command, input=jobs, capture_output=True, text=True, start_new_session=True)


def codes(done: subprocess.CompletedProcess[str]) -> list[int]:
    return [json.loads(line)["code"] for line in done.stdout.splitlines() if line]


def test_every_job_has_a_process_of_its_own_and_the_server_goes_on_after_any_of_them() -> None:
    work = "print(os.getpid(), file=sys.stderr); return int(path) if path != '9' else os.kill(os.getpid(), 9)"
    done = served(work, "0\n2\n9\n0\n")
    assert codes(done) == [0, 2, -9, 0]
    assert len(set(done.stderr.split())) == 4
    assert done.returncode == 0


def test_a_job_does_not_look_for_garbage_in_what_the_server_has_imported() -> None:
    looks = "import gc; return 0 if gc.isenabled() and gc.get_freeze_count() > 1000 else 1"
    assert codes(served(looks, "x\n")) == [0]


def test_an_unfinished_line_does_not_hide_how_the_job_ended() -> None:
    done = served("os.write(1, b'Loading 30%'); os.kill(os.getpid(), 9)", "x\n")
    said, ended = done.stdout.splitlines()
    assert said == "Loading 30%"
    assert json.loads(ended) == {"event": "exit", "code": -9}


def test_an_error_that_nobody_expected_is_shown() -> None:
    done = served("raise KeyError('what happened')", "x\n")
    assert codes(done) == [1]
    assert "KeyError: 'what happened'" in done.stderr


def test_a_request_to_stop_ends_the_job_and_then_the_server() -> None:
    work = "signal.signal(15, lambda *_: sys.exit(75)); os.killpg(0, 15); signal.pause()"
    done = served(work, "x\ny\n")
    assert codes(done) == [75]
    assert done.returncode == 75


def test_an_orchestrator_that_died_stops_the_job_too() -> None:
    # Blocked: one that came just before the wait for it would be lost.
    work = "signal.pthread_sigmask(signal.SIG_BLOCK, [15]); os.kill(os.getppid(), signal.SIGHUP)"
    work += "; signal.sigwait([15]); sys.exit(75)"
    done = served(work, "x\n")
    assert codes(done) == [75]
    assert done.returncode == 75


STOP = """
    import os, signal, sys
    from cascade.family.job import StopSignal
    stop = StopSignal()
    stop.listen()
    def ask():
        os.kill(os.getpid(), signal.SIGTERM)
        print('still here', flush=True)
"""


@pytest.mark.parametrize(
    ("work", "printed", "code"),
    [
        ("ask()", "", 75),
        ("with stop.cooperative(): ask(); print(stop()); sys.exit(3)", "still here\nTrue\n", 3),
        ("with stop.cooperative(): stop()\nstop(); ask()", "", 75),
        # The request comes after the last question: the end of the block is the next chance.
        ("with stop.cooperative(): stop(); ask()\nprint('published')", "still here\n", 75),
    ],
    ids=["outside", "inside", "afterwards", "late"],
)
def test_sigterm_waits_for_the_work_only_where_it_asks(work: str, printed: str, code: int) -> None:
    script = textwrap.dedent(STOP) + work
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, printed), done.stderr


def test_a_node_that_never_asks_again_is_ended_by_its_alarm() -> None:
    script = textwrap.dedent(STOP).replace(
        "from cascade.family.job import",
        "from cascade.family import job; job.STOP_SECONDS = 1\nfrom cascade.family.job import",
    )
    script += "with stop.cooperative(): ask(); import time; time.sleep(600)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGALRM
