"""Long runs: after the first stages neither the orchestrator nor what serves its nodes holds any more."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.watching import Sample, slope, watched

# What is imported, cached and pooled once comes with the first stages.
WARM_STAGES = 2
# Bytes that a stage may add. The build keeps the manifests of its four nodes, from which it makes the index:
# 68 kB of Python's objects, 101 kB as the process grew. The process that only forks nodes keeps nothing.
# Prefect's client keeps something of every task run.
STAGE_BYTES = {"direct": {"orchestrator": 150_000, "server": 8_000}, "flow": {"server": 8_000}}


def by_stage(samples: list[Sample]) -> list[Sample]:
    """The first sample of every stage after the warm ones, and the one at the end."""
    first: dict[str, Sample] = {}
    for sample in samples:
        first.setdefault(sample["stage"].partition("/")[0], sample)
    stages = [sample for stage, sample in first.items() if stage.startswith("s") and stage[1:].isdigit()]
    return stages[WARM_STAGES:]


def check_counts(samples: list[Sample]) -> None:
    """Files, threads, zombies and temporary files do not become more from stage to stage.

    The fewest of either half are compared: on a busy machine a thread that is ending may still be counted.
    """
    middle = len(samples) // 2
    for process in ("orchestrator", "server"):
        for what in ("files", "threads", "zombies"):
            counts = [sample[process][what] for sample in samples]
            assert min(counts[middle:]) <= min(counts[:middle]), (process, what, counts)
        assert {sample[process]["zombies"] for sample in samples} == {0}
    temporary = [sample["temporary"] for sample in samples]
    assert max(temporary) <= temporary[0], temporary


def check_sizes(samples: list[Sample], how: str) -> None:
    """Memory does not grow by more than the bookkeeping does."""
    for process, most in STAGE_BYTES[how].items():
        sizes = [sample[process]["resident"] for sample in samples]
        assert slope(sizes) < most, (process, sizes)


@pytest.mark.slow
def test_no_file_thread_or_process_is_left_behind(tmp_path: Path) -> None:
    samples = by_stage(watched("direct", 6, tmp_path))
    assert len(samples) == 4
    check_counts(samples)


@pytest.mark.slow
def test_nothing_grows_over_fifty_stages(tmp_path: Path) -> None:
    samples = by_stage(watched("direct", 50, tmp_path))
    assert len(samples) == 48
    check_counts(samples)
    check_sizes(samples, "direct")


@pytest.mark.slow
def test_nothing_grows_in_the_process_of_a_flow(prefect_server: str, tmp_path: Path) -> None:
    home = str(tmp_path / "home")
    samples = by_stage(watched("flow", 12, tmp_path, PREFECT_API_URL=prefect_server, PREFECT_HOME=home))
    assert len(samples) == 10
    check_counts(samples)
    check_sizes(samples, "flow")
