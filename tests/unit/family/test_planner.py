"""The planner of a family: dials to candidates, measured latency, and what the parent does not allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cascade.architecture import Architecture
from cascade.errors import InputError
from cascade.evaluation.latency import Bench
from cascade.family.plan import require_any_winner
from cascade.family.planner import FamilyPlanner, allowed_axes
from cascade.models.decoder import decoder_of
from cascade.planning.axes import DEFAULT_AXES, Axis
from cascade.pruning.proof import Proof, proof_of
from cascade.recipe import Recipe
from tests.architectures import tiny
from tests.tiny_family import tiny_tree


def planner_of(folder: Path, *prunes: dict[str, Any], family: str = "llama") -> FamilyPlanner:
    """The planner of a recipe with these stages on a tiny parent."""
    tree = tiny_tree(Path("parent"), Path("corpus.jsonl"))
    tree["stages"] = [
        {"name": f"s{index}", "prune": prune, "distill": {"tokens": 64}} for index, prune in enumerate(prunes)
    ]
    decoder = decoder_of(tiny(family))
    return FamilyPlanner(Recipe.model_validate(tree), decoder, proof_of(decoder), folder / "latency")


def pretend(monkeypatch: pytest.MonkeyPatch, slower: float = 1.0) -> list[Architecture]:
    """Time a shape by its parameters, deep ones `slower` than a fit to shallow ones predicts."""
    measured: list[Architecture] = []

    def milliseconds(bench: Bench, shape: Architecture) -> float:
        measured.append(shape)
        whole = shape.layers * shape.layer_parameters / 1e4 + 1e-9 * shape.ffn
        return whole * (slower if shape.ffn not in (128, 64) or shape.layers == 3 else 1.0)

    monkeypatch.setattr(Bench, "milliseconds", milliseconds)
    return measured


def test_each_stage_is_cut_from_the_winner_before_it(tmp_path: Path) -> None:
    planner = planner_of(tmp_path, {"ratio": 0.75, "candidates": 3}, {"ratio": 0.6})
    first, second = planner({})
    assert len(first.candidates) == 3
    won = planner({"s0": 2})
    assert won[0] == first
    for index, plans in ((0, (first, second)), (2, won)):
        seed, child = plans[0].candidates[index], plans[1].candidates[0]
        assert all(axis.size(child) <= axis.size(seed) for axis in Axis)


def test_what_one_possible_winner_cannot_be_cut_to_is_refused_before_the_race(tmp_path: Path) -> None:
    following = {"shape": {"layers": 4, "ffn": 40}}
    planner = planner_of(tmp_path, {"ratio": 0.75, "candidates": 4}, following)
    depths = [shape.layers for shape in planner({})[0].candidates]
    assert depths[0] == 4
    assert min(depths) == 3
    with pytest.raises(InputError, match="no such size") as caught:
        require_any_winner(planner.recipe, planner)
    assert "stage s1" in caught.value.where
    assert "if 3 layers" in caught.value.where
    assert "wins the race of stage s0" in caught.value.where
    require_any_winner(planner.recipe, planner_of(tmp_path, {"ratio": 0.75}, following))


def test_as_many_shapes_race_as_there_are(tmp_path: Path) -> None:
    (alone,) = planner_of(tmp_path, {"ratio": 0.75})({})
    (several,) = planner_of(tmp_path, {"ratio": 0.75, "candidates": 4})({})
    (all_there_are,) = planner_of(tmp_path, {"ratio": 0.75, "candidates": 64})({})
    assert several.candidates == (*alone.candidates, *alone.runners_up)
    assert 4 < len(all_there_are.candidates) < 64
    assert all_there_are.candidates[:4] == several.candidates
    limit = 0.75 * decoder_of(tiny("llama")).architecture.non_embedding_parameters
    assert all(0.9 * limit <= shape.non_embedding_parameters <= limit for shape in several.candidates)


def test_sizes_by_hand_are_taken_as_they_are(tmp_path: Path) -> None:
    (plan,) = planner_of(tmp_path, {"shape": {"ffn": 77}})({})
    assert plan.candidates[0].ffn == 77
    assert plan.runners_up == ()


def test_a_latency_is_met_as_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = pretend(monkeypatch)
    whole = decoder_of(tiny("llama")).architecture
    limit = 0.8 * whole.layers * whole.layer_parameters / 1e4
    (plan,) = planner_of(tmp_path, {"latency": limit})({})
    child = plan.candidates[0]
    assert child in measured
    assert 0.9 * limit < child.layers * child.layer_parameters / 1e4 <= limit
    count = len(measured)
    assert planner_of(tmp_path, {"latency": limit})({}) == (plan,)
    assert len(measured) == count, "what was measured is kept"


def test_a_prediction_that_was_too_low_is_corrected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, slower=1.3)
    whole = decoder_of(tiny("llama")).architecture
    limit = 0.8 * whole.layers * whole.layer_parameters / 1e4
    (plan,) = planner_of(tmp_path, {"latency": limit})({})
    child = plan.candidates[0]
    assert 1.3 * child.layers * child.layer_parameters / 1e4 <= limit


def test_a_latency_that_nothing_meets_says_what_the_nearest_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bench, "milliseconds", lambda bench, shape: 5.0 + shape.layers / 100)
    planner = planner_of(tmp_path, {"latency": 5.001})
    with pytest.raises(InputError) as caught:
        planner({})
    assert "latency: 5.001" in str(caught.value)
    assert "stage s0" in caught.value.where


@pytest.mark.parametrize(("family", "reason"), [("starcoder2", "LayerNorm"), ("gemma2", "post_attention")])
def test_a_rotation_that_the_class_does_not_allow_is_refused(
    tmp_path: Path, family: str, reason: str
) -> None:
    planner = planner_of(tmp_path, {"ratio": 0.8, "rotate": True, "axes": ["hidden"]}, family=family)
    with pytest.raises(InputError, match=reason) as caught:
        planner({})
    assert caught.value.value == family
    # A cut that leaves the channels alone rotates nothing.
    planner_of(tmp_path, {"ratio": 0.8, "rotate": True, "axes": ["ffn"]}, family=family)({})


def test_presets_cut_what_the_parent_has_of_their_axes(tmp_path: Path) -> None:
    (plan,) = planner_of(tmp_path, {"ratio": 0.5, "preset": "minitron"})({})
    whole, child = decoder_of(tiny("llama")).architecture, plan.candidates[0]
    assert (child.layers, child.kv_groups) == (whole.layers, whole.kv_groups)
    assert child.tied
    (turned,) = planner_of(tmp_path, {"ratio": 0.5, "preset": "ministral3", "axes": ["hidden"]})({})
    assert not turned.candidates[0].tied


def test_where_every_head_has_its_own_key_minitron_cuts_those(tmp_path: Path) -> None:
    planner = planner_of(tmp_path, {"ratio": 0.5, "preset": "minitron"}, family="gpt_neox")
    prune = planner.recipe.stages[0].prune
    assert planner.preset_axes(prune) == (Axis.HIDDEN, Axis.FFN, Axis.KV_GROUPS)


def test_a_latency_between_prediction_and_measurement_of_the_seed_is_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, slower=1.3)
    whole = decoder_of(tiny("llama")).architecture
    predicted = whole.layers * whole.layer_parameters / 1e4
    monkeypatch.setattr(
        Bench,
        "milliseconds",
        lambda bench, shape: (1.3 if shape.layers > 2 else 1.0) * shape.layers * shape.layer_parameters / 1e4,
    )
    (plan,) = planner_of(tmp_path, {"latency": 1.1 * predicted, "axes": ["ffn"]})({})
    child = plan.candidates[0]
    assert 1.3 * child.layers * child.layer_parameters / 1e4 <= 1.1 * predicted


def test_axes_asked_for_must_be_allowed_and_others_are_left_out() -> None:
    decoder = decoder_of(tiny("llama"))
    proof = Proof(decoder.anatomy, {Axis.EXPERTS: "it has none", Axis.HIDDEN: "it differs by 3"})
    assert allowed_axes((), (), proof) == tuple(axis for axis in DEFAULT_AXES if axis is not Axis.HIDDEN)
    assert allowed_axes((), (Axis.HIDDEN, Axis.FFN), proof) == (Axis.FFN,)
    with pytest.raises(InputError, match="hidden: it differs by 3"):
        allowed_axes((Axis.HIDDEN, Axis.FFN), (), proof)
    with pytest.raises(InputError, match="hidden: it differs by 3"):
        allowed_axes((), (Axis.HIDDEN,), proof)
