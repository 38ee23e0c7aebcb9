"""Running a node: what comes out of its pipe, and that nothing of it is left running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cascade.errors import CascadeError, InputError, Interrupted, MachineFault, StorageFault
from cascade.family import runner
from cascade.family.job import STOP_SECONDS, Job, RunOptions
from cascade.kinds import Kind
from tests.reports import Recorder
from tests.waiting import alive, wait_until

RunScript = Callable[..., Recorder]


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RunScript:
    """Run a job whose process is a script; returns what was reported."""

    def run(script: str, report: Recorder | None = None) -> Recorder:
        path = tmp_path / "node.py"
        path.write_text(textwrap.dedent(script))
        real = runner.node_process
        monkeypatch.setattr(runner, "node_process", lambda command: real([sys.executable, str(path)]))
        options = RunOptions(str(tmp_path), str(tmp_path), "run", "", 60.0, False)
        place = str(tmp_path / "place")
        report = report or Recorder()
        runner.run_node(Job(Kind.PRUNED, "tiny", "small", "0" * 64, place, {}, {}, {}, options), report)
        return report

    return run


def test_events_are_forwarded_and_plain_lines_kept_for_the_worst(run_script: RunScript) -> None:
    report = Recorder()
    script = """
        print('{"event": "log", "message": "hello"}')
        print('{"event": "progress", "done": 1, "total": 2, "unit": "tokens", "figures": {"loss": 0.5}}')
        print('a library said this')
        raise SystemExit(1)
    """
    with pytest.raises(CascadeError, match="a library said this") as caught:
        run_script(script, report)
    assert caught.value.exit_code == 1
    assert not caught.value.retryable
    assert report.lines == ["hello"]
    assert report.figures == [{"done": 1, "total": 2, "unit": "tokens", "loss": 0.5}]


@pytest.mark.parametrize("kind", [InputError, StorageFault, Interrupted])
def test_the_nodes_own_error_keeps_its_type_and_parts(
    run_script: RunScript, kind: type[CascadeError]
) -> None:
    error = kind("what happened", value=3, where="there", remedy="do this")
    event = {"event": "error", "error": error.record(), "exit_code": kind.exit_code}
    with pytest.raises(kind) as caught:
        run_script(f"print({json.dumps(event)!r}); raise SystemExit({kind.exit_code})")
    assert caught.value.record() == error.record()
    assert caught.value.retryable == kind.retryable


def test_a_killed_node_is_a_machine_fault_worth_a_retry(run_script: RunScript) -> None:
    with pytest.raises(MachineFault, match="SIGKILL") as caught:
        run_script("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert caught.value.retryable


def test_exit_75_means_run_me_again(run_script: RunScript) -> None:
    with pytest.raises(Interrupted):
        run_script("raise SystemExit(75)")


def test_a_process_that_goes_on_says_how_its_job_ended(run_script: RunScript) -> None:
    script = """
        print('{"event": "exit", "code": -9}', flush=True)
        import time
        time.sleep(600)
    """
    with pytest.raises(MachineFault, match="SIGKILL"):
        run_script(script)


def test_a_line_without_its_end_hides_no_event(run_script: RunScript) -> None:
    script = """
        import io, sys, time
        from cascade.family.job import JsonReport
        sys.stdout.write("Loading 30%")
        JsonReport(sys.stdout).log("hello")
        sys.stdout.write("Loading 40%")
        print('\\n{"event": "exit", "code": 3}', flush=True)
        time.sleep(600)
    """
    report = Recorder()
    with pytest.raises(CascadeError, match="Loading 40%"):
        run_script(script, report)
    assert report.lines == ["hello"]


def test_a_node_that_publishes_nothing_has_failed(run_script: RunScript) -> None:
    with pytest.raises(CascadeError, match="published nothing"):
        run_script("pass")


def test_leaving_the_block_ends_the_node_and_its_children() -> None:
    script = """
        import subprocess, sys
        child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
        print(child.pid, flush=True)
        child.wait()
    """
    with runner.node_process([sys.executable, "-c", textwrap.dedent(script)]) as process:
        assert process.stdout
        grandchild = int(process.stdout.readline())
        assert alive(grandchild)
    assert process.poll() is not None
    assert wait_until(lambda: not alive(grandchild))


def stubborn_node(pids: list[int]) -> int:
    """Start a node that ignores SIGTERM and leave its block; its exit code. Its pid goes into `pids`."""
    script = (
        "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    )
    with runner.node_process([sys.executable, "-c", script]) as process:
        pids.append(process.pid)
        assert process.stdout
        process.stdout.readline()
    return process.returncode


def test_a_node_that_ignores_the_request_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "KILL_SECONDS", 0.5)
    assert stubborn_node([]) == -signal.SIGKILL


SLEEPING_CHILD = """if True:
    import os, signal, subprocess, sys, time
    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
    print(child.pid, flush=True)
"""


def test_what_a_node_that_died_by_itself_leaves_behind_is_killed(
    run_script: RunScript, tmp_path: Path
) -> None:
    note = tmp_path / "child"
    script = f"{SLEEPING_CHILD}    open({str(note)!r}, 'w').write(str(child.pid))\n"
    started = time.monotonic()
    # The child holds the pipe: unless it is killed, nobody would ever see the end of it.
    with pytest.raises(MachineFault, match="SIGKILL"):
        run_script(script + "    os.kill(os.getpid(), signal.SIGKILL)\n")
    assert time.monotonic() - started < 30
    assert wait_until(lambda: not alive(int(note.read_text())))


def test_a_second_interrupt_ends_the_waiting_but_not_the_killing(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(process: subprocess.Popen[str], timeout: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    pids: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        stubborn_node(pids)
    assert not alive(pids[0])


class Swallowing(Recorder):
    """Is asked to stop while Python runs a finaliser, which drops what it raises."""

    def __init__(self, request: BaseException) -> None:
        super().__init__()
        self.request = request

    def log(self, message: str) -> None:
        class Finalised:
            def __del__(inner) -> None:
                raise self.request

        Finalised()


@pytest.mark.parametrize("request_to_stop", [KeyboardInterrupt(), SystemExit(143)])
def test_a_request_to_stop_is_not_lost_in_a_finaliser(
    run_script: RunScript, request_to_stop: BaseException
) -> None:
    script = """
        import time
        print('{"event": "log", "message": "hello"}', flush=True)
        time.sleep(600)
    """
    started = time.monotonic()
    with pytest.raises(type(request_to_stop)):
        run_script(script, Swallowing(request_to_stop))
    assert time.monotonic() - started < 60


def test_other_errors_of_finalisers_are_shown_and_stop_nothing(
    run_script: RunScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[BaseException] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda event: shown.append(event.exc_value))
    error = ValueError("not important")
    with pytest.raises(CascadeError, match="published nothing"):
        run_script("""print('{"event": "log", "message": "hello"}', flush=True)""", Swallowing(error))
    assert shown == [error]


def test_a_node_has_time_to_end_itself_before_it_is_killed() -> None:
    # Prefect kills the flow's process 30 s after a cancel.
    assert STOP_SECONDS < runner.KILL_SECONDS < 30


def test_a_node_does_not_outlive_a_killed_orchestrator() -> None:
    node = """if True:
        import signal, sys, time
        from cascade.node import die_with_parent
        die_with_parent(int(sys.argv[1]), signal.SIGTERM)
        print('up', flush=True)
        time.sleep(600)
    """
    script = f"""
        import os, sys
        from cascade.family.runner import node_process
        with node_process([sys.executable, '-c', {node!r}, str(os.getpid())]) as process:
            process.stdout.readline()
            print(process.pid, flush=True)
            process.wait()
    """
    orchestrator = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    )
    assert orchestrator.stdout
    node_pid = int(orchestrator.stdout.readline())
    os.kill(orchestrator.pid, signal.SIGKILL)
    orchestrator.wait()
    orchestrator.stdout.close()
    assert wait_until(lambda: not alive(node_pid))
