"""Folding of pruned heads: which heads meet, what is touched, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cascade.architecture import Architecture
from cascade.errors import InputError
from cascade.models.decoder import Decoder, decoder_of
from cascade.pruning.folding import fold_heads, partners
from cascade.pruning.proof import proof_of
from cascade.pruning.selection import Kept, score_shapes, select
from cascade.pruning.surgery import cut
from tests.architectures import ARCHITECTURES, UNGROUPED, cuts, tiny
from tests.tiny import make_model


def plan(model: PreTrainedModel, **sizes: int) -> tuple[Decoder, Architecture, Kept, dict[str, Tensor]]:
    """A cut to `sizes` by random scores, and the scores."""
    decoder, draw = decoder_of(model), torch.Generator().manual_seed(5)
    decoder = replace(decoder, anatomy=proof_of(decoder).anatomy)
    changed: dict[str, Any] = dict(sizes)
    target = replace(decoder.architecture, **changed)
    shapes = score_shapes(decoder.architecture).items()
    scores = {axis.value: torch.rand(shape, generator=draw) for axis, shape in shapes}
    return decoder, target, select(scores, decoder.architecture, target), scores


@pytest.mark.parametrize(
    ("count", "into", "out"),
    [
        (4, [40], [50]),
        (3, [20, 30], [50, 40]),
        (2, [10, 20], [40, 30]),
        (1, [10], [20]),
        (5, [], []),
    ],
)
def test_the_last_that_stays_meets_the_first_that_goes(count: int, into: list[int], out: list[int]) -> None:
    ranked = torch.tensor([[10, 20, 30, 40, 50]])
    assert [heads.tolist() for heads in partners(ranked, count)] == [[into], [out]]


@pytest.mark.parametrize("sizes", [{}, {"layers": 2, "hidden": 40, "ffn": 72}, {"kv_groups": 1}])
def test_nothing_is_replaced_where_no_head_of_a_kept_group_goes(sizes: dict[str, int]) -> None:
    decoder, _, kept, scores = plan(make_model("llama"), **sizes)
    assert fold_heads(decoder, kept, scores) == {}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_gets_a_child_that_runs(name: str) -> None:
    decoder, target, kept, scores = plan(tiny(name), **cuts(name)["all"])
    replaced = fold_heads(decoder, kept, scores)
    own = dict(decoder.model.named_parameters())
    layers = {layer for parameter, _, _, layer in decoder.parameters() if parameter in replaced}
    assert layers == set(kept.layers.tolist())
    for parameter, values in replaced.items():
        assert values.shape == own[parameter].shape
        assert not torch.equal(values, own[parameter])
    child = cut(decoder, target, kept, replaced)
    assert decoder_of(child).architecture == target
    ids = torch.arange(16)[None]
    with torch.no_grad():
        plain, folded = cut(decoder, target, kept)(input_ids=ids).logits, child(input_ids=ids).logits
    assert folded.isfinite().all()
    assert (folded - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("llama", ["q_proj.weight"]),
        ("qwen2", ["q_proj.weight", "q_proj.bias"]),
        ("qwen3", ["q_proj.weight", "q_proj.bias"]),
        ("olmo2", ["q_proj.weight"]),
        ("gpt_oss", ["q_proj.weight", "q_proj.bias"]),
        ("phi3", ["qkv_proj.weight"]),
        ("gpt2", ["c_attn.weight", "c_attn.bias"]),
        ("gpt_neox", ["query_key_value.weight", "query_key_value.bias"]),
        (
            "opt",
            ["q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"],
        ),
    ],
)
def test_only_projections_to_heads_are_folded(name: str, paths: list[str]) -> None:
    axis = "hidden and kv_groups" if name in UNGROUPED else "heads_per_group"
    decoder, _, kept, scores = plan(tiny(name), **cuts(name)[axis])
    found = {".".join(parameter.split(".")[-2:]) for parameter in fold_heads(decoder, kept, scores)}
    assert found == set(paths)


def test_types_are_kept_the_parent_is_unchanged_and_shares_no_memory() -> None:
    model = make_model("llama").bfloat16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    decoder, _, kept, scores = plan(model, heads_per_group=1)
    replaced = fold_heads(decoder, kept, scores)
    assert {values.dtype for values in replaced.values()} == {torch.bfloat16}
    with torch.no_grad():
        for values in replaced.values():
            values.fill_(7.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_of_equal_scores_the_lower_head_ranks_higher_as_in_the_selection() -> None:
    model = make_model("llama", num_key_value_heads=1)
    decoder, _, kept, scores = plan(model, heads_per_group=3)
    scores["heads_per_group"] = torch.ones(4, 1, 4)
    kept = select(scores, decoder.architecture, replace(decoder.architecture, heads_per_group=3))
    found = fold_heads(decoder, kept, scores)["model.layers.0.self_attn.q_proj.weight"]
    old = model.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(found[:32], old[:32])
    torch.testing.assert_close(found[32:48], 2 * old[32:48] - old[48:])


def test_scores_that_did_not_choose_the_heads_are_refused() -> None:
    decoder, _, kept, scores = plan(make_model("llama"), heads_per_group=1)
    for wrong, match in (
        ({}, "are needed"),
        ({"heads_per_group": torch.ones(4, 2)}, "are needed"),
        ({"heads_per_group": scores["heads_per_group"] * torch.nan}, "not finite"),
        ({"heads_per_group": -scores["heads_per_group"]}, "not the best"),
    ):
        with pytest.raises(InputError, match=match) as caught:
            fold_heads(decoder, kept, wrong)
        assert caught.value.where == "importance scores, axis heads_per_group"
