"""Repairs against dense references: least squares on all activations at once, folding by a loop."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cascade.architecture import Architecture
from cascade.models.decoder import Decoder, decoder_of
from cascade.pruning.compensation import least_squares
from cascade.pruning.folding import fold_heads
from cascade.pruning.proof import proof_of
from cascade.pruning.selection import Kept, score_shapes, select
from cascade.pruning.surgery import cut
from tests.architectures import tiny
from tests.tiny import make_model

HEAD = 16
# By module: what the residual stream is read from, and which of the kept units it reads.
LLAMA = {"model.layers.{}.mlp.down_proj": "ffn", "model.layers.{}.self_attn.o_proj": "heads"}
GPT2 = {"transformer.h.{}.mlp.c_proj": "ffn", "transformer.h.{}.attn.c_proj": "heads"}


@dataclass(frozen=True)
class Case:
    """A model, a cut of it by scores, and tokens."""

    decoder: Decoder
    target: Architecture
    kept: Kept
    scores: dict[str, Tensor]
    rows: Tensor = field(
        default_factory=lambda: torch.randint(0, 256, (60, 24), generator=torch.Generator().manual_seed(1))
    )

    @property
    def model(self) -> PreTrainedModel:
        return self.decoder.model

    def columns(self, place: int, units: str) -> list[int]:
        """Entries that stay of what a reader in the child's layer `place` reads."""
        record = self.kept.record()
        if units == "ffn":
            return record["ffn"][place]
        per_group = self.decoder.architecture.heads_per_group
        pairs = zip(record["kv_groups"][place], record["heads_per_group"][place], strict=True)
        heads = [group * per_group + head for group, within in pairs for head in within]
        return [head * HEAD + entry for head in heads for entry in range(HEAD)]


def case(model: PreTrainedModel, scores: dict[str, Tensor] | None = None, **sizes: int) -> Case:
    """A cut to `sizes` by random scores, where none are given."""
    decoder, draw = decoder_of(model), torch.Generator().manual_seed(5)
    decoder = replace(decoder, anatomy=proof_of(decoder).anatomy)
    changed: dict[str, Any] = dict(sizes)
    target = replace(decoder.architecture, **changed)
    shapes = score_shapes(decoder.architecture).items()
    drawn = {axis.value: torch.rand(shape, generator=draw) for axis, shape in shapes} | (scores or {})
    return Case(decoder, target, select(drawn, decoder.architecture, target), drawn)


def read_by(model: PreTrainedModel, name: str, rows: Tensor) -> Tensor:
    """Everything that the module reads in one pass over all rows: [N, n], float64."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].flatten(0, -2).double())
    )
    with torch.no_grad():
        model(input_ids=rows)
    handle.remove()
    return torch.cat(seen)


def put_out(module: nn.Module, z: Tensor) -> Tensor:
    """What a Linear or Conv1D with these inputs puts out, in float64."""
    weight = module.weight.detach().double()
    bias = module.bias.detach().double() if module.bias is not None else 0.0
    return z @ (weight.T if isinstance(module, nn.Linear) else weight) + bias


@pytest.mark.parametrize(
    "sizes",
    [
        {"ffn": 72},
        {"kv_groups": 1},
        {"heads_per_group": 1},
        {"layers": 3, "hidden": 40, "ffn": 72, "heads_per_group": 1},
    ],
)
def test_llama_readers_are_the_least_squares_fit(sizes: dict[str, int]) -> None:
    made = case(make_model("llama", seed=3), **sizes)
    child = cut(
        made.decoder, made.target, made.kept, least_squares(made.decoder, made.kept, made.rows, damping=1e-9)
    )
    hidden, checked = made.kept.record()["hidden"], 0
    for (path, units), (place, layer) in itertools.product(
        LLAMA.items(), enumerate(made.kept.layers.tolist())
    ):
        module = made.model.get_submodule(path.format(layer))
        z, columns = read_by(made.model, path.format(layer), made.rows), made.columns(place, units)
        found = child.get_submodule(path.format(place)).weight.detach().double()
        if len(columns) == z.shape[1]:
            assert torch.equal(found, module.weight.double()[hidden])
            continue
        fit = torch.linalg.lstsq(z[:, columns], put_out(module, z)[:, hidden]).solution.T
        torch.testing.assert_close(found, fit, rtol=1e-3, atol=1e-4)
        assert (fit - module.weight.double()[hidden][:, columns]).abs().max() > 0.01
        checked += 1
    assert checked == made.target.layers * (2 if {"ffn", "heads_per_group"} <= set(sizes) else 1)


@pytest.mark.parametrize("sizes", [{"ffn": 72}, {"ffn": 72, "kv_groups": 2, "hidden": 32, "layers": 3}])
def test_gpt2_readers_are_the_affine_fit(sizes: dict[str, int]) -> None:
    """Its Conv1D has inputs first and a bias: a column of ones is one more thing to regress on."""
    model = tiny("gpt2")
    with torch.no_grad():
        # So that what is cut has a mean that a fit without it would miss.
        for block in model.transformer.h:
            block.mlp.c_fc.bias.add_(0.5)
    made = case(model, **sizes)
    replaced = least_squares(made.decoder, made.kept, made.rows, damping=1e-9)
    for (path, units), (place, layer) in itertools.product(
        GPT2.items(), enumerate(made.kept.layers.tolist())
    ):
        name = path.format(layer)
        z, columns = read_by(model, name, made.rows), made.columns(place, units)
        if len(columns) == z.shape[1]:
            assert f"{name}.weight" not in replaced
            continue
        with_one = torch.cat([z[:, columns], torch.ones(len(z), 1, dtype=torch.float64)], dim=1)
        expected = put_out(model.get_submodule(name), z)
        fit = torch.linalg.lstsq(with_one, expected).solution
        weight, bias = replaced[f"{name}.weight"].double(), replaced[f"{name}.bias"].double()
        torch.testing.assert_close(weight[columns], fit[:-1], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(bias, fit[-1], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close((z[:, columns] @ weight[columns] + bias).mean(0), expected.mean(0))


@pytest.mark.parametrize(
    ("dtype", "share", "apart"), [(torch.float32, 0.05, 1e-5), (torch.bfloat16, 1e-3, 5e-4)]
)
def test_damping_is_the_ridge_that_draws_to_the_old_weights(
    dtype: torch.dtype, share: float, apart: float
) -> None:
    """Ridge regression as least squares with rows of sqrt(lambda N) added, on the change of the weights."""
    made = case(make_model("llama", seed=3).to(dtype), ffn=72)
    # All rows at once, because in bfloat16 the activations depend on the batch.
    replaced = least_squares(made.decoder, made.kept, made.rows, damping=share, batch=len(made.rows))
    for layer in range(4):
        name = f"model.layers.{layer}.mlp.down_proj"
        z, columns = read_by(made.model, name, made.rows), made.columns(layer, "ffn")
        weight = made.model.get_submodule(name).weight.detach().double()
        lost = z @ weight.T - z[:, columns] @ weight[:, columns].T
        ridge = (share * z[:, columns].pow(2).mean() * len(z)).sqrt() * torch.eye(72, dtype=torch.float64)
        padded = torch.cat([z[:, columns], ridge]), torch.cat([lost, torch.zeros(72, 64)])
        fit = weight[:, columns] + torch.linalg.lstsq(*padded).solution.T
        found = replaced[f"{name}.weight"].double()[:, columns]
        # Rounding the result moves it by half a step of its type at most.
        torch.testing.assert_close(found, fit, rtol=torch.finfo(dtype).eps / 2 + 1e-4, atol=apart)


@pytest.mark.parametrize("count", [60, 1])
@pytest.mark.parametrize(("name", "readers"), [("llama", LLAMA), ("gpt2", GPT2)])
def test_a_repaired_layer_is_never_further_from_the_parents(
    name: str, readers: dict[str, str], count: int
) -> None:
    heads = {"kv_groups": 1} if name == "llama" else {"kv_groups": 2, "hidden": 32}
    made = case(tiny(name), ffn=72, **heads)
    rows, hidden = made.rows[:count], made.kept.record()["hidden"]
    children = [
        cut(made.decoder, made.target, made.kept, replaced)
        for replaced in ({}, least_squares(made.decoder, made.kept, rows))
    ]
    for (path, units), layer in itertools.product(readers.items(), range(4)):
        z = read_by(made.model, path.format(layer), rows)
        whole = put_out(made.model.get_submodule(path.format(layer)), z)[:, hidden]
        kept = z[:, made.columns(layer, units)]
        plain, repaired = (
            (put_out(child.get_submodule(path.format(layer)), kept) - whole).pow(2).mean()
            for child in children
        )
        assert repaired < 0.95 * plain


def redundant_llama() -> PreTrainedModel:
    """Neurons 80 and on are sums of two of the first 80, the second KV group is a map of the first."""
    model, draw = make_model("llama", seed=3), torch.Generator().manual_seed(9)
    with torch.no_grad():
        for layer in model.model.layers:
            gate, up = layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight
            gate[1:80:2] = gate[0:80:2]
            # Neurons 2i and 2i + 1 share a gate; the ups of both add up.
            first = torch.arange(48) * 2 % 80
            gate[80:] = gate[first]
            up[80:] = 0.7 * up[first] - 1.2 * up[first + 1]
            attention = layer.self_attn
            attention.q_proj.weight[32:] = attention.q_proj.weight[:32]
            attention.k_proj.weight[16:] = attention.k_proj.weight[:16]
            mixing = torch.randn(16, 16, generator=draw) / 4
            attention.v_proj.weight[16:] = mixing @ attention.v_proj.weight[:16]
    return model


def test_what_the_kept_units_can_say_is_not_lost() -> None:
    first = {"ffn": torch.arange(128.0).flip(0).expand(4, 128), "kv_groups": torch.tensor([[2.0, 1.0]] * 4)}
    made = case(redundant_llama(), first, ffn=80, kv_groups=1)
    fresh = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(7))
    replaced = least_squares(made.decoder, made.kept, made.rows, damping=1e-8)
    with torch.no_grad():
        whole = made.model(input_ids=fresh).logits
        plain = cut(made.decoder, made.target, made.kept)(input_ids=fresh).logits
        repaired = cut(made.decoder, made.target, made.kept, replaced)(input_ids=fresh).logits
    assert (repaired - whole).abs().max() < 1e-3
    assert (plain - whole).abs().max() > 0.1


def block(name: str, first: int, size: int = HEAD) -> tuple[str, slice]:
    return name, slice(first, first + size)


def llama_queries(layer: int, head: int) -> list[tuple[str, slice]]:
    return [block(f"model.layers.{layer}.self_attn.q_proj.weight", HEAD * head)]


def qwen2_queries(layer: int, head: int) -> list[tuple[str, slice]]:
    path = f"model.layers.{layer}.self_attn.q_proj"
    return [block(f"{path}.weight", HEAD * head), block(f"{path}.bias", HEAD * head)]


def phi3_queries(layer: int, head: int) -> list[tuple[str, slice]]:
    return [block(f"model.layers.{layer}.self_attn.qkv_proj.weight", HEAD * head)]


def llama_heads(layer: int, head: int) -> list[tuple[str, slice]]:
    path = f"model.layers.{layer}.self_attn"
    return [block(f"{path}.{part}_proj.weight", HEAD * head) for part in "qkv"]


def opt_heads(layer: int, head: int) -> list[tuple[str, slice]]:
    path = f"model.decoder.layers.{layer}.self_attn"
    kinds = itertools.product("qkv", ("weight", "bias"))
    return [block(f"{path}.{part}_proj.{kind}", HEAD * head) for part, kind in kinds]


def gpt2_heads(layer: int, head: int) -> list[tuple[str, slice]]:
    """All queries, all keys, all values of five heads; the weight is a Conv1D, its outputs come last."""
    path = f"transformer.h.{layer}.attn.c_attn"
    starts = [part * 5 * HEAD + HEAD * head for part in range(3)]
    return [block(f"{path}.{kind}", start) for kind in ("weight", "bias") for start in starts]


def gpt_neox_heads(layer: int, head: int) -> list[tuple[str, slice]]:
    """Query, key and value of each head side by side."""
    path = f"gpt_neox.layers.{layer}.attention.query_key_value"
    return [block(f"{path}.{kind}", 3 * HEAD * head, 3 * HEAD) for kind in ("weight", "bias")]


Where = Callable[[int, int], list[tuple[str, slice]]]
GROUPED = {"hidden_size": 80, "num_attention_heads": 10, "num_key_value_heads": 2}
ALONE = {"hidden_size": 80, "num_attention_heads": 5}
BOUND = {"kv_groups": 3, "hidden": 48}
FOLDS: list[tuple[str, dict[str, Any], dict[str, int], Where]] = [
    *(("llama", GROUPED, {"heads_per_group": count, "layers": 3}, llama_queries) for count in (1, 2, 3, 4)),
    ("llama", {**GROUPED, "num_key_value_heads": 1}, {"heads_per_group": 6}, llama_queries),
    ("llama", GROUPED, {"heads_per_group": 3, "kv_groups": 1, "hidden": 60, "layers": 2}, llama_queries),
    ("qwen2", GROUPED, {"heads_per_group": 3}, qwen2_queries),
    ("phi3", GROUPED, {"heads_per_group": 3, "kv_groups": 1}, phi3_queries),
    ("llama", {**ALONE, "num_key_value_heads": 5}, {"kv_groups": 3, "layers": 2}, llama_heads),
    ("opt", {**ALONE, "word_embed_proj_dim": 80}, BOUND, opt_heads),
    ("gpt2", ALONE, BOUND | {"layers": 3}, gpt2_heads),
    ("gpt2", ALONE, {"kv_groups": 2, "hidden": 32}, gpt2_heads),
    ("gpt_neox", ALONE, BOUND, gpt_neox_heads),
]


@pytest.mark.parametrize(("name", "options", "sizes", "where"), FOLDS)
def test_heads_are_folded_as_a_loop_over_ranks_does_it(
    name: str, options: dict[str, Any], sizes: dict[str, int], where: Where
) -> None:
    made = case(tiny(name, **options), **sizes)
    per_group = made.decoder.architecture.heads_per_group
    old = {n: p.detach() for n, p in made.model.named_parameters()}
    expected: dict[str, Tensor] = {}
    for place, layer in enumerate(made.kept.layers.tolist()):
        if per_group > 1:
            given = made.scores["heads_per_group"][layer].flatten().tolist()
            firsts = [group * per_group for group in made.kept.record()["kv_groups"][place]]
            pools = [{head: given[head] for head in range(first, first + per_group)} for first in firsts]
            stay = made.target.heads_per_group
        else:
            pools, stay = [dict(enumerate(made.scores["kv_groups"][layer].tolist()))], made.target.kv_groups
        for pool in pools:
            ranks = dict(enumerate(sorted(pool, key=lambda head: -pool[head]), start=1))
            fold(expected, old, ranks, stay, layer, where)
    assert expected
    found = fold_heads(made.decoder, made.kept, made.scores)
    assert found.keys() == expected.keys()
    for parameter, values in expected.items():
        torch.testing.assert_close(found[parameter], values)


def fold(
    new: dict[str, Tensor], old: dict[str, Tensor], ranks: dict[int, int], stay: int, layer: int, where: Where
) -> None:
    """2407.14679, section 2.3: ranks from 1 to heads, `stay` of them remain."""
    cut_away = len(ranks) - stay
    for rank in range(max(1, stay - cut_away + 1), stay + 1):
        ours, theirs = where(layer, ranks[rank]), where(layer, ranks[2 * stay - rank + 1])
        for (name, here), (_, there) in zip(ours, theirs, strict=True):
            values = old[name]
            target = new.setdefault(name, values.clone())
            at = (..., here) if "c_attn" in name else (here,)
            from_ = (..., there) if "c_attn" in name else (there,)
            target[at] = values[at] + (values[at] - values[from_])


def test_the_child_has_the_folded_heads() -> None:
    """A fused projection end to end: queries of kept heads folded, keys and values as they were."""
    made = case(tiny("phi3", **GROUPED), heads_per_group=3)
    found = fold_heads(made.decoder, made.kept, made.scores)
    child = cut(made.decoder, made.target, made.kept, found)
    for layer in range(4):
        name = f"model.layers.{layer}.self_attn.qkv_proj.weight"
        rows, old = child.get_parameter(name), made.model.get_parameter(name)
        assert torch.equal(rows[: 6 * HEAD], found[name][made.columns(layer, "heads")])
        assert torch.equal(rows[6 * HEAD :], old[10 * HEAD :])
        assert torch.equal(found[name][10 * HEAD :], old[10 * HEAD :])
