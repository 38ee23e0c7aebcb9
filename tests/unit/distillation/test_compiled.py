"""A compiled training: the same one but for rounding, few graphs, plain modules afterwards."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from cascade.data.corpus import Corpus
from cascade.distillation.compiled import compiled_layers, require_compiler
from cascade.distillation.loop import distill
from cascade.distillation.objectives import Objective
from cascade.distillation.schedules import WeightSchedule
from cascade.distillation.settings import DistillSettings
from cascade.distillation.signals import OnlineTeacher
from cascade.distillation.states import all_states, final_states
from cascade.distillation.training_state import StepRecord
from cascade.distillation.watch import Watch, WatchSettings
from cascade.errors import InputError, Interrupted
from cascade.models.anatomy import layers_of
from cascade.storage.checkpoints import TrainingCheckpoints
from cascade.storage.locations import open_location
from tests.tiny import make_model
from tests.unit.distillation.teaching import LENGTH, make_rows, make_student, make_teacher

pytestmark = [
    pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler"),
    # torch's own compiler is written with what torch deprecates, and hides warnings by showing them nowhere.
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

STEPS = 6
# Two micro-batches a step, the second smaller; the last step has one row alone.
SETTINGS = DistillSettings(
    tokens=(3 * STEPS - 2) * LENGTH,
    batch_rows=3,
    micro_rows=2,
    learning_rate=0.003,
    cross_entropy_weight=0.4,
    cross_entropy_schedule=WeightSchedule.LINEAR,
    objective=Objective.JSD,
    temperature=2.0,
)
INSIDE = replace(SETTINGS, hidden_states="mse", hidden_states_weight=0.1)
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one-text": ({}, {}),
    "documents": ({"end_of_text": 256}, {}),
    "checkpointed": ({"end_of_text": 256}, {"gradient_checkpointing": True}),
    "hidden-states": ({"end_of_text": 256}, {"settings": INSIDE}),
    "relations": ({"end_of_text": 256}, {"settings": replace(INSIDE, hidden_states="relations")}),
}


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks of 6 tokens, so that there are whole ones."""
    monkeypatch.setattr("cascade.distillation.fused.BLOCK_BYTES", 4 * 258 * 6)
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def corpus_of(**how: Any) -> Corpus:
    rows = make_rows()
    rows.train[::2, 5] = 256
    return replace(rows, **how)


def learnt(model: PreTrainedModel) -> tuple[Tensor, ...]:
    """Final and intermediate states of two rows, and their gradients for all parameters."""
    states_BTD, inner = all_states(model, make_rows().train[:2].long(), [layers_of(model)[-2]])
    found = (states_BTD, *inner)
    sum(state.square().sum() for state in found).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    return (*(state.detach() for state in found), *gradients)


def require_plain(model: PreTrainedModel) -> None:
    assert not model.training
    for layer in layers_of(model):
        assert "forward" not in vars(layer)
        assert not layer.gradient_checkpointing
        assert not any(part._forward_hooks for part in layer.modules())


def test_layers_share_a_graph_and_are_plain_afterwards() -> None:
    student = make_student(num_hidden_layers=4).train()
    plain = learnt(student)
    with torch.no_grad():
        silent = final_states(student, make_rows().train[:3].long())
    with compiled_layers(student):
        compiled = learnt(student)
        with torch.no_grad():
            again = final_states(student, make_rows().train[:3].long())
    for ours, theirs in zip(compiled, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())
    # Without gradients nothing is compiled, so the bits are those of plain layers.
    assert torch.equal(again, silent)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    require_plain(student.eval())


def trained(way: str, dropout: float = 0.0, **how: Any) -> tuple[PreTrainedModel, list[StepRecord]]:
    about, more = WAYS[way]
    corpus, student = corpus_of(**about), make_student(num_hidden_layers=3, attention_dropout=dropout)
    teacher = OnlineTeacher(make_teacher(), corpus)
    watch = Watch(make_rows(train=0, held_out=5, seed=5), WatchSettings(5 * LENGTH, 2, 9))
    steps = distill(student, teacher, corpus, watch=watch, **{"settings": SETTINGS, **more, **how})
    return student, steps


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_training_is_the_plain_one_but_for_rounding(way: str) -> None:
    plain, expected = trained(way)
    assert not counters["stats"]
    student, steps = trained(way, compiled=True)
    # Rows of a micro-batch are 2 or 1, with and without borders of documents; the loss is compiled with and
    # without the cross-entropy's weight; a line is compiled to see that it can be.
    assert 1 + 2 + 2 <= counters["stats"]["unique_graphs"] <= 1 + 2 + 2 * 2
    assert not counters["graph_break"]
    for ours, theirs in zip(steps, expected, strict=True):
        for name in ("loss", "kl", "ce", "hidden_states", "grad_norm", "watched_ce"):
            assert (getattr(ours, name) or 0) == pytest.approx(getattr(theirs, name) or 0, rel=1e-3), name
    for ours, theirs in zip(student.parameters(), plain.parameters(), strict=True):
        # Adam divides by a gradient's size: where one is all but zero, its sign is rounding.
        assert ((ours - theirs).abs() > 1e-3).float().mean() < 0.01
    require_plain(student)


@pytest.mark.slow
def test_a_compiled_training_resumes_to_the_bit(tmp_path: Path) -> None:
    """With dropout, which a compiled layer draws in its own way."""
    checkpoints = TrainingCheckpoints(open_location(str(tmp_path / "checkpoints")))
    whole, expected = trained("checkpointed", 0.3, compiled=True)
    asked = 0

    def in_the_middle() -> bool:
        nonlocal asked
        asked += 1
        return asked == 8

    with pytest.raises(Interrupted):
        trained("checkpointed", 0.3, compiled=True, checkpoints=checkpoints, should_stop=in_the_middle)
    student, steps = trained("checkpointed", 0.3, compiled=True, checkpoints=checkpoints)
    assert [step.loss for step in steps] == [step.loss for step in expected]
    for ours, theirs in zip(student.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2", "qwen3_moe", "gpt2"])
def test_other_families_compile(family: str) -> None:
    """Capped attention, experts, and absolute positions; in eval mode, for compiled dropout differs."""
    student = make_model(family, num_hidden_layers=4)
    with compiled_layers(student):
        compiled = learnt(student)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    for ours, theirs in zip(compiled, learnt(student), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


def test_every_size_of_a_batch_has_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine, and torch allows a function eight by itself. The eager backend counts them and makes no code."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    student = make_student().train()
    with compiled_layers(student):
        for rows in range(1, 10):
            final_states(student, make_rows().train[:rows].long()).sum().backward()
    assert counters["stats"]["unique_graphs"] == 9


def test_a_device_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: object, **__: object) -> object:
        raise RuntimeError("Triton is not installed")

    monkeypatch.setattr(torch, "compile", nothing)
    with pytest.raises(InputError) as caught:
        require_compiler(torch.device("cpu"))
    assert "Triton is not installed" in str(caught.value)
    assert "--compile on cpu" in caught.value.where
    assert "leave --compile out" in caught.value.remedy
    teacher = OnlineTeacher(make_teacher(), make_rows())
    with pytest.raises(InputError, match="does not work here"):
        distill(make_student(), teacher, teacher.corpus, settings=SETTINGS, compiled=True)
