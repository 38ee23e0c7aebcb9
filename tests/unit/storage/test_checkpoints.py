"""Training checkpoints: the newest intact state comes back bit for bit, whatever happened to the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cascade.storage.checkpoints import TrainingCheckpoints
from cascade.storage.locations import Location


def state(value: float) -> dict[str, torch.Tensor]:
    """Tensors of the dtypes that a training state holds."""
    return {
        "weight": torch.full((3, 4), value),
        "moment": torch.full((3,), value, dtype=torch.bfloat16),
        "random": torch.arange(16, dtype=torch.uint8),
    }


@pytest.fixture
def checkpoints(store: Location) -> TrainingCheckpoints:
    """Two saved states, after steps 9 and 10."""
    checkpoints = TrainingCheckpoints(store / "training")
    checkpoints.save(9, state(9), {"position": 900})
    checkpoints.save(10, state(10), {"position": 1000})
    return checkpoints


def position(checkpoints: TrainingCheckpoints, cache: Path) -> int:
    """Where the newest intact checkpoint would go on; -1 without one."""
    found = checkpoints.latest(cache)
    assert list(cache.iterdir()) == []
    return -1 if found is None else int(found[0]["position"])


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """An empty folder."""
    folder = tmp_path / "cache"
    folder.mkdir()
    return folder


def test_the_newest_state_comes_back(checkpoints: TrainingCheckpoints, cache: Path) -> None:
    found = checkpoints.latest(cache)
    assert found is not None
    record, tensors = found
    assert record == {"position": 1000}
    for name, expected in state(10).items():
        assert tensors[name].dtype == expected.dtype
        assert torch.equal(tensors[name], expected)


def test_loaded_tensors_can_be_trained_on(checkpoints: TrainingCheckpoints, cache: Path) -> None:
    found = checkpoints.latest(cache)
    assert found is not None
    found[1]["weight"].add_(1)
    assert position(checkpoints, cache) == 1000


def test_the_newest_two_stay(checkpoints: TrainingCheckpoints, cache: Path) -> None:
    checkpoints.save(100, state(100), {"position": 10000})
    assert checkpoints.location.children() == ["step-00000010", "step-00000100"]
    assert position(checkpoints, cache) == 10000


@pytest.mark.parametrize("damage", ["record missing", "record cut", "tensors cut", "tensors missing"])
def test_a_half_written_state_falls_back(checkpoints: TrainingCheckpoints, cache: Path, damage: str) -> None:
    name, action = damage.split()
    newest = checkpoints.location / "step-00000010"
    file = newest / {"record": "record.json", "tensors": "tensors.safetensors"}[name]
    content = file.read_bytes()
    if action == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        other = newest / {"record": "tensors.safetensors", "tensors": "record.json"}[name]
        kept = other.read_bytes()
        newest.delete_tree()
        other.write_bytes(kept)
    assert position(checkpoints, cache) == 900


def test_a_run_that_fell_back_drops_the_later_states(checkpoints: TrainingCheckpoints, cache: Path) -> None:
    """Else two broken later states would push out the only good one."""
    (checkpoints.location / "step-00000020/tensors.safetensors").write_bytes(b"half")
    checkpoints.save(11, state(11), {"position": 1100})
    assert checkpoints.location.children() == ["step-00000010", "step-00000011"]
    assert position(checkpoints, cache) == 1100


def test_half_of_a_state_pushes_out_no_whole_one(checkpoints: TrainingCheckpoints, cache: Path) -> None:
    (checkpoints.location / "step-00000010/record.json").delete_tree()
    checkpoints.save(11, state(11), {"position": 1100})
    assert checkpoints.location.children() == ["step-00000009", "step-00000011"]
    assert position(checkpoints, cache) == 1100


def test_without_checkpoints(store: Location, cache: Path) -> None:
    empty = TrainingCheckpoints(store / "none")
    assert empty.latest(cache) is None


def test_a_step_is_saved_again(checkpoints: TrainingCheckpoints, cache: Path) -> None:
    checkpoints.save(10, state(5), {"position": 5})
    assert position(checkpoints, cache) == 5


def test_a_state_that_is_there_intact_is_not_written_again(
    checkpoints: TrainingCheckpoints, cache: Path
) -> None:
    before = [(checkpoints.location / path).version() for path in checkpoints.location.walk()]
    checkpoints.save(10, state(10), {"position": 1000})
    assert [(checkpoints.location / path).version() for path in checkpoints.location.walk()] == before
    (checkpoints.location / "step-00000010/tensors.safetensors").write_bytes(b"half")
    checkpoints.save(10, state(10), {"position": 1000})
    assert position(checkpoints, cache) == 1000


def test_a_save_that_fails_costs_no_older_or_later_state(
    checkpoints: TrainingCheckpoints, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cascade.storage.checkpoints.save_file", lambda *_: 1 / 0)
    for step in (5, 11):
        with pytest.raises(ZeroDivisionError):
            checkpoints.save(step, state(1), {"position": 1})
    assert position(checkpoints, cache) == 1000
