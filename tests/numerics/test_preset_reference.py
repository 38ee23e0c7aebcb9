"""Each published preset as one dense cut from its paper's formulas, against the child that cascade makes.

The references know nothing of cascade: they run a Llama in float64, keep all activations at once, and build
the child's weights by hand. Both see the same calibration tokens; logits are compared on others.

Legend: N rows, T tokens, X units, D hidden, D' hidden that stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cascade.dials import Prune
from cascade.importance.calibration import calibrate
from cascade.importance.method import LayerScore, Scoring
from cascade.importance.scores import score
from cascade.importance.scoring import scores_of
from cascade.models.decoder import decoder_of
from cascade.planning.axes import Axis
from cascade.planning.shapes import untied
from cascade.presets import Preset
from cascade.pruning.prune import Surgery, prune
from cascade.pruning.selection import KeptRecord
from tests.numerics.dense import Llama, llama_of
from tests.tiny import make_model

# Of 5 layers, 64 channels, 128 neurons, and 2 groups of 4 query heads.
LEFT = {Axis.LAYERS: 3, Axis.HIDDEN: 40, Axis.FFN: 80, Axis.HEADS_PER_GROUP: 2}
GROUPS, PER_GROUP, HEAD = 2, 4, 8
TOLERANCE = 1e-4
Weights = dict[str, Tensor]


def tokens(rows: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (rows, 24), generator=torch.Generator().manual_seed(seed))


def parent(tie: bool) -> PreTrainedModel:
    """Grouped queries, random gains, an epsilon that is not lost in rounding, and weights for which each
    layer score chooses other layers."""
    return make_model(
        "llama",
        seed=9,
        num_hidden_layers=5,
        num_attention_heads=GROUPS * PER_GROUP,
        num_key_value_heads=GROUPS,
        head_dim=HEAD,
        rms_norm_eps=0.05,
        tie_word_embeddings=tie,
    )


def cascade_child(
    model: PreTrainedModel, preset: Preset, axes: Iterable[Axis], rows: Tensor
) -> tuple[PreTrainedModel, KeptRecord]:
    """Scored and cut as a stage of a family is."""
    dials, source = Prune(ratio=0.5, preset=preset), decoder_of(model).architecture
    resolved, sizes = dials.resolved, dict[str, Any]({axis.value: LEFT[axis] for axis in axes})
    target = replace(untied(source) if resolved.rotate else source, **sizes)
    dropped = source.layers - target.layers
    found = score(model, rows, resolved.importance, drops=dials.scoring.drops(dropped))
    scores = scores_of(found.statistics, dials.scoring, dropped)
    return prune(model, target, scores, surgery=Surgery(resolved.rotate, resolved.repair), rows=rows)


def best(scores: Tensor, count: int) -> list[int]:
    return sorted(scores.topk(count).indices.tolist())


def assembled(llama: Llama, layers: list[int], own: Callable[[int], Weights], outer: Weights) -> Llama:
    """The child of these layers and weights, whose norms go on dividing by the parent's width. So they see
    the parent's scale; a stock child has to have factors in its gains and epsilon for that."""
    inner = {
        f"model.layers.{place}.{name}": w
        for place, layer in enumerate(layers)
        for name, w in own(layer).items()
    }
    return replace(llama, weights=inner | outer, layers=len(layers))


def ministral3(llama: Llama, rows: Tensor) -> tuple[Llama, KeptRecord]:
    """2601.08584, section 3 and Algorithm 2: layers, then hidden channels, then neurons."""
    seen = llama.run(rows)
    norms = [stream.norm(dim=-1) for stream in seen.streams]
    ratios = torch.stack([(after / before).mean() for before, after in pairwise(norms)])
    layers = best(ratios, LEFT[Axis.LAYERS])
    read = torch.cat(
        [x.flatten(0, 1) for layer in layers for x in (seen.streams[layer], seen.between[layer])]
    )
    basis = torch.linalg.svd(read, full_matrices=False).Vh[: LEFT[Axis.HIDDEN]].T
    neurons = {layer: best(seen.products[layer].abs().mean((0, 1)), LEFT[Axis.FFN]) for layer in layers}
    gain = torch.ones(basis.shape[1], dtype=torch.float64)

    def own(layer: int) -> Weights:
        w = llama.of_layer(layer)
        found = {"input_layernorm.weight": gain, "post_attention_layernorm.weight": gain}
        for name in "qkv":
            path = f"self_attn.{name}_proj.weight"
            found[path] = w[path] * w["input_layernorm.weight"] @ basis
        for name in ("gate", "up"):
            path = f"mlp.{name}_proj.weight"
            found[path] = (w[path] * w["post_attention_layernorm.weight"] @ basis)[neurons[layer]]
        found["self_attn.o_proj.weight"] = basis.T @ w["self_attn.o_proj.weight"]
        found["mlp.down_proj.weight"] = (basis.T @ w["mlp.down_proj.weight"])[:, neurons[layer]]
        return found

    outer = {
        "model.embed_tokens.weight": llama.weights["model.embed_tokens.weight"] @ basis,
        "model.norm.weight": gain,
        "lm_head.weight": llama.weights["lm_head.weight"] * llama.weights["model.norm.weight"] @ basis,
    }
    record = {"layers": layers, "hidden": list(range(basis.shape[1])), "ffn": list(neurons.values())}
    return assembled(llama, layers, own, outer), record


def minitron(llama: Llama, rows: Tensor, axes: Iterable[Axis]) -> tuple[Llama, KeptRecord]:
    """2407.14679, section 2.2: mean over the sequence, L2 over the batch; and 2.3: folding, then trimming."""
    seen, every = llama.run(rows), range(llama.layers)

    def aggregated(values_NTX: Tensor) -> Tensor:
        return values_NTX.abs().mean(1).pow(2).sum(0).sqrt()

    whole = llama.loss(rows)
    rises = torch.stack([llama.loss(rows, [k for k in every if k != layer]) - whole for layer in every])
    layers = best(rises, LEFT[Axis.LAYERS] if Axis.LAYERS in axes else llama.layers)
    hidden = best(torch.stack([aggregated(x) for x in seen.norms]).sum(0), LEFT[Axis.HIDDEN])
    neurons = {layer: best(aggregated(seen.products[layer]), LEFT[Axis.FFN]) for layer in layers}
    heads = {layer: aggregated(seen.heads[layer].norm(dim=-1)) for layer in layers}
    kept = {
        layer: [best(own, LEFT[Axis.HEADS_PER_GROUP]) for own in heads[layer].split(PER_GROUP)]
        for layer in layers
    }

    def own(layer: int) -> Weights:
        w = llama.of_layer(layer)
        queries = folded_queries(w["self_attn.q_proj.weight"], heads[layer])
        stay = [group * PER_GROUP + head for group, within in enumerate(kept[layer]) for head in within]
        entries = [head * HEAD + entry for head in stay for entry in range(HEAD)]
        return {
            "input_layernorm.weight": w["input_layernorm.weight"][hidden],
            "post_attention_layernorm.weight": w["post_attention_layernorm.weight"][hidden],
            "self_attn.q_proj.weight": queries[entries][:, hidden],
            "self_attn.k_proj.weight": w["self_attn.k_proj.weight"][:, hidden],
            "self_attn.v_proj.weight": w["self_attn.v_proj.weight"][:, hidden],
            "self_attn.o_proj.weight": w["self_attn.o_proj.weight"][hidden][:, entries],
            "mlp.gate_proj.weight": w["mlp.gate_proj.weight"][neurons[layer]][:, hidden],
            "mlp.up_proj.weight": w["mlp.up_proj.weight"][neurons[layer]][:, hidden],
            "mlp.down_proj.weight": w["mlp.down_proj.weight"][hidden][:, neurons[layer]],
        }

    names = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    outer = {name: llama.weights[name][..., hidden] for name in names}
    record = {
        "layers": layers,
        "hidden": hidden,
        "ffn": list(neurons.values()),
        "heads_per_group": list(kept.values()),
    }
    return assembled(llama, layers, own, outer), record


def folded_queries(weight: Tensor, scores: Tensor) -> Tensor:
    """In each group the i-th best head becomes 2 head_i - head_(2K-i+1), i in (2K-q, K], ranks from 1."""
    result, count = weight.clone(), LEFT[Axis.HEADS_PER_GROUP]
    for group in range(GROUPS):
        ranked = (scores[group * PER_GROUP : (group + 1) * PER_GROUP]).argsort(descending=True).tolist()
        rows = [
            slice((group * PER_GROUP + head) * HEAD, (group * PER_GROUP + head + 1) * HEAD) for head in ranked
        ]
        for i in range(max(1, 2 * count - PER_GROUP + 1), count + 1):
            result[rows[i - 1]] = 2 * weight[rows[i - 1]] - weight[rows[2 * count - i]]
    return result


def require_same(
    model: PreTrainedModel,
    preset: Preset,
    axes: tuple[Axis, ...],
    reference: tuple[Llama, KeptRecord],
    rows: Tensor,
) -> None:
    """What stays is the same, and so are the logits on tokens that nothing was calibrated on."""
    child, kept = cascade_child(model, preset, axes, rows)
    expected, record = reference
    assert {axis: kept[axis] for axis in record} == record
    fresh = tokens(4, seed=2)
    with torch.no_grad():
        found, before = (model(input_ids=fresh).logits.double() for model in (child, model))
    by_hand = expected.logits(fresh)
    assert (found - by_hand).abs().max() <= TOLERANCE * by_hand.abs().max()
    assert (by_hand - before).abs().max() > 1000 * TOLERANCE * by_hand.abs().max()


@pytest.mark.parametrize("tie", [True, False])
def test_a_wrong_layer_score_would_be_noticed(tie: bool) -> None:
    """The comparisons would prove nothing of the layers if every score chose the same."""
    found = calibrate(parent(tie), tokens(7, seed=1), drops=(1,)).statistics
    scores = [scores_of(found, Scoring(kind), dropped=2)["layers"] for kind in LayerScore]
    chosen = {tuple(best(values, LEFT[Axis.LAYERS])) for values in scores}
    assert len(chosen) == len(LayerScore)


@pytest.mark.parametrize("tie", [True, False])
def test_ministral3_is_its_paper(tie: bool) -> None:
    model, rows = parent(tie), tokens(7, seed=1)
    axes = Prune(ratio=0.5, preset=Preset.MINISTRAL3).preset_axes
    require_same(model, Preset.MINISTRAL3, axes, ministral3(llama_of(model), rows), rows)


@pytest.mark.parametrize("depth", [(), (Axis.LAYERS,)])
@pytest.mark.parametrize("tie", [True, False])
def test_minitron_is_its_paper(tie: bool, depth: tuple[Axis, ...]) -> None:
    """Width alone, as the paper prefers, and with layers by the perplexity without each."""
    model, rows = parent(tie), tokens(7, seed=1)
    axes = (*Prune(ratio=0.5, preset=Preset.MINITRON).preset_axes, *depth)
    require_same(model, Preset.MINITRON, axes, minitron(llama_of(model), rows, axes), rows)
