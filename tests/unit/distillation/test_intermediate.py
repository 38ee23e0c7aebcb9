"""Losses between layers: values, gradients, what they refuse, and that they train and resume to the bit."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cascade.data.corpus import Corpus
from cascade.distillation import intermediate
from cascade.distillation.batches import batch_of
from cascade.distillation.fused import IGNORED
from cascade.distillation.guards import check_before_training
from cascade.distillation.intermediate import (
    HiddenLoss,
    StateTerm,
    hidden_loss,
    inside,
    intermediate_of,
    loss_of,
)
from cascade.distillation.labels import CorpusTeacher
from cascade.distillation.loop import Leg, distill
from cascade.distillation.maps import ridge
from cascade.distillation.settings import DistillSettings
from cascade.distillation.signals import OnlineTeacher, Part
from cascade.distillation.states import all_states, of_targets
from cascade.errors import CascadeError, InputError
from cascade.storage.checkpoints import TrainingCheckpoints
from cascade.storage.locations import open_location
from tests.architectures import tiny
from tests.unit.distillation.teaching import LENGTH, make_rows, make_student, make_teacher

KINDS = list(HiddenLoss)
# The kind of a term and its pairs of layers.
WAYS = [("cosine", 1), ("mse", 1), ("mse", 2), ("relations", 1)]


def settings(kind: str = "cosine", layers: int = 1, micro_rows: int = 4) -> DistillSettings:
    return DistillSettings(
        tokens=8 * LENGTH,
        batch_rows=4,
        micro_rows=micro_rows,
        hidden_states=kind,
        hidden_states_weight=0.7,
        hidden_states_layers=layers,
    )


def deep_student() -> PreTrainedModel:
    return make_student(num_hidden_layers=3)


def documents() -> Corpus:
    """Rows of one, two or three texts, kept apart."""
    rows = make_rows()
    rows.train[::2, 5] = 256
    rows.train[::4, 11] = 256
    return replace(rows, end_of_text=256)


def reference(
    student_ND: Tensor, teacher_NE: Tensor, labels_N: Tensor, kind: HiddenLoss, w: Tensor
) -> Tensor:
    """Token by token, in words."""
    total = torch.zeros((), dtype=torch.float64)
    for read, wanted, label in zip(student_ND, teacher_NE, labels_N.tolist(), strict=True):
        mapped = torch.stack([(read * column).sum() for column in w.T])
        if label == IGNORED:
            continue
        if kind is HiddenLoss.COSINE:
            total = total + 1 - (mapped * wanted).sum() / (mapped.norm() * wanted.norm())
        else:
            total = total + ((mapped - wanted) ** 2).sum() / (wanted**2).sum()
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradients_are_those_of_a_float64_reference(kind: HiddenLoss) -> None:
    draw = torch.Generator().manual_seed(0)
    exact = [torch.randn(*s, generator=draw, dtype=torch.float64) for s in ((7, 5), (7, 6), (5, 6))]
    labels_N = torch.tensor([3, IGNORED, 1, 0, IGNORED, 2, 9])
    states, w = exact[0].clone().requires_grad_(), exact[2].clone().requires_grad_()
    expected = reference(states, exact[1], labels_N, kind, w)
    expected.backward()
    rounded, map_DE = exact[0].float().requires_grad_(), exact[2].float().requires_grad_()
    found = hidden_loss(rounded, exact[1].float(), labels_N, kind, map_DE)
    found.backward()
    assert states.grad is not None
    assert rounded.grad is not None
    assert w.grad is not None
    assert map_DE.grad is not None
    torch.testing.assert_close(found.double(), expected)
    torch.testing.assert_close(rounded.grad.double(), states.grad, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(map_DE.grad.double(), w.grad, atol=1e-6, rtol=1e-5)
    assert not rounded.grad[labels_N == IGNORED].any()


@pytest.mark.parametrize(("kind", "layers"), WAYS)
def test_a_teacher_as_its_own_student_has_none(kind: str, layers: int) -> None:
    corpus, same = documents(), deep_student()
    plan = settings(kind, layers).resolved(32, LENGTH)
    teacher, term = intermediate_of(same, OnlineTeacher(deep_student(), corpus), plan)
    assert not term.projections
    batch = batch_of(corpus, Part.TRAIN, [0, 1], torch.device("cpu"))
    _, seen = all_states(same, batch.ids, term.places, batch.positions)
    targets = teacher.targets(Part.TRAIN, [0, 1])
    assert len(seen) == len(inside(targets)) == (3 if kind == "relations" else layers)
    assert abs(loss_of(term, seen, targets, batch).item()) < 1e-5
    assert abs(term.itself(inside(targets), batch).item()) < 1e-5
    assert loss_of(term, seen, targets[torch.arange(len(targets)).roll(1)], batch).item() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_other_states_are_kept(dtype: torch.dtype) -> None:
    model = make_student(num_hidden_layers=5).to(dtype)
    ids_BT, layers = make_rows().train[:2].long(), model.model.layers
    states_BTD, seen = all_states(model, ids_BT, [layers[3], layers[0], layers[3].self_attn.k_proj])
    assert not any(module._forward_hooks for module in model.modules())
    every = model.model(input_ids=ids_BT, output_hidden_states=True, use_cache=False).hidden_states
    for found, expected in zip((states_BTD, *seen[:2]), (every[-1], every[4], every[1]), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert seen[2].shape == (2, LENGTH, 32)


def test_pairs_go_by_the_origins_of_the_layers() -> None:
    student, parent = make_student(num_hidden_layers=4), make_student(seed=5, num_hidden_layers=9)
    teacher = OnlineTeacher(parent, make_rows())
    plan = settings("mse", 2).resolved(32, LENGTH)
    shown, term = intermediate_of(student, teacher, plan, (0, 1, 4, 8))
    assert term.pairs == ((1, 1), (2, 7))
    assert term.places == (student.model.layers[1], student.model.layers[2])
    assert shown.places == (parent.model.layers[1], parent.model.layers[7])
    assert intermediate_of(student, teacher, plan)[1].pairs == ((1, 4), (2, 7))
    related, term = intermediate_of(
        student, teacher, settings("relations").resolved(32, LENGTH), (0, 1, 4, 6)
    )
    assert term.pairs == ((3, 6),)
    assert related.places[0] is parent.model.layers[6].self_attn.q_proj


def test_several_pairs_are_a_mean_each_with_a_map_of_its_own() -> None:
    corpus, student = documents(), deep_student()
    teacher, term = intermediate_of(
        student, OnlineTeacher(make_teacher(), corpus), settings("mse", 2).resolved(32, LENGTH)
    )
    batch = batch_of(corpus, Part.TRAIN, [0, 1], torch.device("cpu"))
    _, seen = all_states(student, batch.ids, term.places, batch.positions)
    targets = teacher.targets(Part.TRAIN, [0, 1])
    assert [projection.shape for projection in term.projections] == [(32, 48)] * 2
    assert not torch.equal(*term.projections)
    alone = [
        hidden_loss(of_targets(ours), theirs, batch.labels, HiddenLoss.MSE, projection)
        for ours, theirs, projection in zip(seen, inside(targets), term.projections, strict=True)
    ]
    torch.testing.assert_close(loss_of(term, seen, targets, batch), torch.stack(alone).mean())


def test_the_map_starts_as_a_ridge_regression() -> None:
    draw = torch.Generator().manual_seed(0)
    read_ND = torch.randn(200, 4, generator=draw, dtype=torch.float64)
    chosen_DE = torch.eye(4, 6, dtype=torch.float64)
    found_DE = ridge(read_ND.T @ read_ND, read_ND.T @ read_ND @ chosen_DE)
    # Kept channels find themselves; a tenth of a ridge shrinks them by about a tenth.
    torch.testing.assert_close(found_DE, chosen_DE, atol=0.15, rtol=0)
    assert found_DE[0, 0] > 0.85


@pytest.mark.parametrize(("kind", "layers"), WAYS)
def test_the_split_into_micro_batches_changes_nothing_but_rounding(kind: str, layers: int) -> None:
    steps = []
    for micro_rows in (4, 2):
        student, corpus = deep_student(), documents()
        plan = settings(kind, layers, micro_rows).resolved(32, LENGTH)
        teacher = OnlineTeacher(make_teacher(), corpus)
        steps.append(distill(student, teacher, corpus, settings=plan.settings))
    for one, other in zip(*steps, strict=True):
        assert one.hidden_states == pytest.approx(other.hidden_states, rel=1e-5)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
        assert one.hidden_states > 0
        assert one.loss == pytest.approx(one.kl + 0.7 * one.hidden_states, rel=1e-5)


@pytest.mark.parametrize(("kind", "layers"), WAYS)
def test_gradient_checkpointing_changes_nothing(kind: str, layers: int) -> None:
    found = []
    for again in (False, True):
        student, corpus = deep_student(), documents()
        teacher, how = OnlineTeacher(make_teacher(), corpus), settings(kind, layers)
        steps = distill(student, teacher, corpus, settings=how, gradient_checkpointing=again)
        found.append([(step.loss, step.hidden_states, step.grad_norm) for step in steps])
    assert found[0] == found[1]


@pytest.mark.parametrize(("kind", "layers"), WAYS)
def test_a_training_resumes_to_the_bit_with_its_maps(kind: str, layers: int, tmp_path: Path) -> None:
    corpus, how = documents(), settings(kind, layers)
    whole, halves = deep_student(), deep_student()
    once = distill(whole, OnlineTeacher(make_teacher(), corpus), corpus, settings=how)
    kept = TrainingCheckpoints(open_location(str(tmp_path / "state")))
    distill(halves, OnlineTeacher(make_teacher(), corpus), corpus, settings=how, leg=Leg(0.5, end=kept))
    found = distill(halves, OnlineTeacher(make_teacher(), corpus), corpus, settings=how, leg=Leg(start=kept))
    assert [step.hidden_states for step in found] == [step.hidden_states for step in once]
    assert len(once) == 2
    for name, value in whole.state_dict().items():
        assert torch.equal(value, halves.state_dict()[name])
    # The maps are no part of what comes out.
    assert not any("projection" in name for name, _ in halves.named_parameters())
    held = kept.latest(tmp_path)
    assert held is not None
    maps = ["weight.hidden_states.projection", "weight.hidden_states.projection.1"]
    expected = [] if kind == "relations" else maps[:layers]
    assert sorted(name for name in held[1] if name.startswith("weight.hidden_states")) == expected


def test_relations_stay_within_a_document() -> None:
    corpus, student = documents(), deep_student()
    plan = settings("relations").resolved(32, LENGTH)
    teacher, term = intermediate_of(student, OnlineTeacher(make_teacher(), corpus), plan)
    batch = batch_of(corpus, Part.TRAIN, [0], torch.device("cpu"))
    assert (batch.ids[0] == 256).nonzero()[:, 0].tolist() == [5, 11]
    # Only what comes after the first text is told, and then that text is another.
    batch.labels[:6] = IGNORED
    targets = teacher.targets(Part.TRAIN, [0])
    _, seen = all_states(student, batch.ids, term.places, batch.positions)
    other = tuple(one.detach().clone() for one in seen)
    for one in other:
        one[:, :6] = 5.0
    values = [loss_of(term, states, targets, batch).item() for states in (seen, other)]
    assert values[0] == values[1]


def test_relations_train_the_student_towards_them() -> None:
    corpus, student = documents(), deep_student()
    how = replace(
        settings("relations"), tokens=40 * 4 * LENGTH, learning_rate=0.01, hidden_states_weight=10.0
    )
    steps = distill(student, OnlineTeacher(make_teacher(), corpus), corpus, settings=how)
    assert steps[-1].hidden_states < 0.5 * steps[0].hidden_states


def test_a_layer_that_the_term_does_not_reach_is_named() -> None:
    student, corpus = deep_student(), make_rows()
    plan = settings("mse", 2).resolved(32, LENGTH)
    teacher, term = intermediate_of(student, OnlineTeacher(make_teacher(), corpus), plan)
    check_before_training(student, teacher, corpus, plan, inner=term)
    assert isinstance(term, StateTerm)
    assert [projection.grad for projection in term.projections] == [None, None]
    # The other pair reaches the same parameters, and hides nothing.
    dead = nn.Parameter(torch.zeros_like(term.projections[0]))
    for maps in ((dead, term.projections[1]), (term.projections[0], dead)):
        with pytest.raises(CascadeError, match="hidden-state loss gives parameters no finite gradient"):
            check_before_training(student, teacher, corpus, plan, inner=replace(term, projections=maps))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "phi3"])
def test_relations_teach_queries_keys_and_values_and_all_below(family: str) -> None:
    student, corpus = tiny(family, seed=2), documents()
    plan = settings("relations").resolved(64, LENGTH)
    teacher, term = intermediate_of(student, OnlineTeacher(tiny(family, seed=1), corpus), plan)
    sizes = check_before_training(student, teacher, corpus, plan, inner=term)
    assert sizes["hidden states"] > 0
    reached = set.union(*term.reached(student))
    last = [name.split(".3.")[1] for name in reached if ".3." in name]
    assert {name.split(".")[-2] for name in last} <= {"q_proj", "k_proj", "v_proj", "c_attn", "qkv_proj"}
    assert last
    assert sum(".2." in name for name in reached) == sum(
        ".2." in name for name, _ in student.named_parameters()
    )


@pytest.mark.parametrize("dead", range(3))
def test_a_kind_of_relations_that_teaches_nothing_is_found(
    dead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, corpus = deep_student(), documents()
    plan = settings("relations").resolved(32, LENGTH)
    teacher, term = intermediate_of(student, OnlineTeacher(make_teacher(), corpus), plan)
    plain, asked = intermediate.relation_loss, count()
    monkeypatch.setattr(intermediate, "relation_loss", lambda *rest: plain(*rest) * (next(asked) % 3 != dead))
    with pytest.raises(CascadeError, match="hidden-state loss gives parameters no finite gradient"):
        check_before_training(student, teacher, corpus, plan, inner=term)


@pytest.mark.parametrize(("kind", "layers"), WAYS)
def test_a_term_that_a_teacher_has_with_itself_stops_the_training(
    kind: str, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = (intermediate.hidden_loss, intermediate.relation_loss)
    for name, function in zip(("hidden_loss", "relation_loss"), plain, strict=True):
        monkeypatch.setattr(intermediate, name, lambda *rest, f=function: f(*rest) + 0.01)
    corpus = make_rows()
    with pytest.raises(CascadeError, match="its own student") as caught:
        distill(
            deep_student(), OnlineTeacher(make_teacher(), corpus), corpus, settings=settings(kind, layers)
        )
    assert caught.value.where == f"hidden_states: {kind}"


def test_a_teacher_without_states_is_refused() -> None:
    corpus = make_rows()
    with pytest.raises(InputError, match="beside the student"):
        distill(make_student(), CorpusTeacher(corpus, 256), corpus, settings=settings())
    shallow = OnlineTeacher(make_student(num_hidden_layers=1), corpus)
    with pytest.raises(InputError, match="the teacher has no second-to-last layer"):
        distill(make_student(), shallow, corpus, settings=settings())


def test_more_pairs_than_layers_are_refused() -> None:
    corpus = make_rows()
    with pytest.raises(InputError, match="a student of 3 layers has 2 below its last"):
        distill(
            deep_student(), OnlineTeacher(make_teacher(), corpus), corpus, settings=settings("mse", layers=3)
        )


@pytest.mark.parametrize(
    ("kind", "weight", "layers"),
    [
        ("cosinus", 1.0, 1),
        ("mse", None, 1),
        ("mse", 0.0, 1),
        (None, 1.0, 1),
        ("mse", 1.0, 0),
        (None, None, 2),
        ("relations", 1.0, 2),
    ],
)
def test_settings_that_make_no_term_are_refused(kind: str | None, weight: float | None, layers: int) -> None:
    with pytest.raises(InputError, match="out of range"):
        DistillSettings(
            tokens=64, hidden_states=kind, hidden_states_weight=weight, hidden_states_layers=layers
        )


def test_a_setting_that_is_off_is_not_in_the_record() -> None:
    assert not [name for name in DistillSettings(tokens=64).record() if "hidden" in name]
    assert settings().record()["hidden_states_weight"] == 0.7
    # One pair is what trainings had before there were more, and their keys stay.
    assert "hidden_states_layers" not in settings().record()
    assert settings("mse", 2).record()["hidden_states_layers"] == 2
