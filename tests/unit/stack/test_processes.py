"""The stack's processes: nothing of them is left, however the one that started them ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from cascade.errors import CascadeError
from cascade.stack.processes import Service
from tests.waiting import alive, wait_until

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
STUBBORN = (
    "import signal, sys, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
)


def service(tmp_path: Path, command: list[str], grace: float = 60.0) -> Service:
    return Service("the sleeper", command, os.environ, tmp_path / "log", grace=grace)


def test_leaving_the_block_asks_the_process_to_end(tmp_path: Path) -> None:
    with service(tmp_path, SLEEP) as sleeper:
        sleeper.require_running()
        assert alive(sleeper.process.pid)
    assert sleeper.process.returncode == -signal.SIGTERM


def test_a_stubborn_process_is_killed_with_its_children(tmp_path: Path) -> None:
    script = f"import subprocess; print(subprocess.Popen({SLEEP!r}).pid, flush=True)\n{STUBBORN}"
    with service(tmp_path, [sys.executable, "-c", script], grace=0.2) as sleeper:
        sleeper.wait_until(lambda: "up" in sleeper.log.read_text(), 120)
        child = int(sleeper.log.read_text().split()[0])
    assert sleeper.process.returncode == -signal.SIGKILL
    assert wait_until(lambda: not alive(child))


def test_one_that_ends_by_itself_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    with (
        service(tmp_path, [sys.executable, "-c", "print('no space'); raise SystemExit(3)"]) as sleeper,
        pytest.raises(CascadeError, match="the sleeper has ended with exit code 3\n    no space") as caught,
    ):
        sleeper.wait_until(lambda: False, 120)
    assert caught.value.where == str(tmp_path / "log")


def test_one_that_is_never_ready_is_an_error(tmp_path: Path) -> None:
    with service(tmp_path, SLEEP) as sleeper, pytest.raises(CascadeError, match="not ready in 0 s"):
        sleeper.wait_until(lambda: False, 0.1)


# A stack in small: the keeper starts a service, whose child outlives it, and notes what it has ended.
KEEPER = """
    import os, signal, sys, time
    from pathlib import Path
    from cascade.stack.processes import Service, end_descendants, in_keeper
    folder = Path(sys.argv[1])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    in_keeper()
    script = '''if True:
        import subprocess, sys, time
        command = [sys.executable, "-c", "import time; time.sleep(600)"]
        child = subprocess.Popen(command, start_new_session=True)
        print(child.pid, ".", flush=True)
        time.sleep(600)
    '''
    try:
        with Service("a", [sys.executable, "-c", script], os.environ, folder / "log") as service:
            service.wait_until(lambda: "." in service.log.read_text(), 120)
            orphan = int(service.log.read_text().split()[0])
            print(os.getpid(), service.process.pid, orphan, flush=True)
            time.sleep(600)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        alive = os.path.exists(f"/proc/{orphan}")
        end_descendants([], 0.5, asked=True)
        (folder / "ended").write_text(f"{alive} {os.path.exists(f'/proc/{orphan}')}")
"""


# A worker that has not passed a request to end on when it is killed, and a run that takes a while to end.
HASTY = """
    import os, sys
    from pathlib import Path
    from cascade.stack.processes import Service, end_descendants, in_keeper
    folder = Path(sys.argv[1])
    in_keeper()
    run = '''if True:
        import pathlib, signal, sys, time
        def end(*_):
            (folder / "asked").open("a").write("x")
            time.sleep(1)
            (folder / "saved").touch()
            sys.exit()
        folder = pathlib.Path(sys.argv[1])
        signal.signal(signal.SIGTERM, end)
        (folder / "runs").touch()
        time.sleep(600)
    '''
    worker = f'''if True:
        import signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen([sys.executable, "-c", {run!r}, sys.argv[1]], start_new_session=True)
        time.sleep(600)
    '''
    command = [sys.executable, "-c", worker, str(folder)]
    with Service("the worker", command, os.environ, folder / "log", grace=0.2) as service:
        service.wait_until((folder / "runs").exists, 120)
    end_descendants([], 120, asked=not service.killed)
"""


def test_what_a_killed_worker_has_not_asked_is_asked_and_waited_for(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(HASTY), str(tmp_path)], timeout=300)
    assert done.returncode == 0, (tmp_path / "log").read_text()
    assert (tmp_path / "asked").read_text() == "x"
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)],
    ids=lambda value: str(value),
)
def test_the_keeper_ends_all_in_good_order(number: signal.Signals, code: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(KEEPER), str(tmp_path)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert first.stdout
    pids = [int(word) for word in first.stdout.readline().split()]
    assert len(pids) == 3
    first.send_signal(number)
    assert first.wait(120) == code
    first.stdout.close()
    assert wait_until(lambda: not any(alive(pid) for pid in pids))
    # The service's child lived on, came to the keeper and was ended by it.
    assert (tmp_path / "ended").read_text() == "True False"


def test_a_killed_keeper_takes_its_services_along(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(KEEPER), str(tmp_path)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert first.stdout
    keeper, service, orphan = (int(word) for word in first.stdout.readline().split())
    os.kill(keeper, signal.SIGKILL)
    assert first.wait(120) == 128 + signal.SIGKILL
    first.stdout.close()
    assert wait_until(lambda: not alive(keeper) and not alive(service))
    os.kill(orphan, signal.SIGKILL)
