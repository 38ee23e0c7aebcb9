"""The library stands without its orchestrator, and the command starts quickly."""

from __future__ import annotations

import subprocess
import sys


def modules_after(statement: str) -> set[str]:
    """Names of the modules loaded by a fresh interpreter that ran `statement`."""
    code = f"{statement}; import sys; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_library_never_imports_prefect() -> None:
    names = "import cascade.node, cascade.cli, cascade.family.plan, cascade.family.build, cascade.family.work"
    assert "prefect" not in modules_after(names)


def test_the_command_line_loads_torch_only_when_it_works() -> None:
    names = "import cascade.cli, cascade.family.index, cascade.family.audit"
    assert not {"torch", "transformers", "datasets"} & modules_after(names)
