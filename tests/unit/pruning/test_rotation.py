"""A rotated model: what it shares with its parent, what it refuses, and how its wiring is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama import modeling_llama
from transformers.pytorch_utils import Conv1D

from cascade.errors import InputError
from cascade.importance.calibration import calibrate
from cascade.importance.method import Scoring
from cascade.importance.scoring import scores_of
from cascade.models import anatomy
from cascade.models.anatomy import Misfit
from cascade.models.configs import Form
from cascade.models.decoder import decoder_of
from cascade.models.entries import Entries
from cascade.planning.shapes import untied
from cascade.pruning import rotation, wiring
from cascade.pruning.child import require_shape
from cascade.pruning.principal import principal_basis
from cascade.pruning.prune import prune
from cascade.pruning.rotation import random_basis, rotated, rotation_refusal
from cascade.pruning.selection import select
from cascade.pruning.surgery import cut
from cascade.pruning.wiring import divided, read_along
from tests.architectures import tiny
from tests.tiny import make_model

HIDDEN, FFN, EXPERTS, FIXED = Entries.HIDDEN, Entries.FFN, Entries.EXPERTS, Entries.FIXED


@pytest.fixture
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that was found out before a class was changed, and nothing of it afterwards."""
    monkeypatch.setattr(rotation, "_known", {})
    monkeypatch.setattr(anatomy, "_known", {})


def rows() -> Tensor:
    return torch.randint(0, 256, (5, 16), generator=torch.Generator().manual_seed(0))


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=rows()).logits
    return found


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_oss"])
def test_the_model_passed_in_is_not_changed_and_shares_no_memory(name: str) -> None:
    model = tiny(name).train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    basis, _ = principal_basis(model, rows(), [0, 2])
    other = rotated(decoder_of(model), basis)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(7.0)
    other.generation_config.max_new_tokens = 3
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert model.config.to_dict() == config
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.generation_config.max_new_tokens != 3
    assert hooks(model) == 0
    assert model.training


def test_gains_come_out_neutral_and_norms_of_heads_as_they_were() -> None:
    for name, neutral in (("gemma", 0.0), ("qwen3", 1.0)):
        model = tiny(name)
        decoder = decoder_of(rotated(decoder_of(model), random_basis(64)))
        assert len(decoder.hidden_norms) == 9
        assert all((norm.weight == neutral).all() for norm, _ in decoder.hidden_norms)
    before, after = (
        m.get_submodule("model.layers.1.self_attn.q_norm").weight for m in (model, decoder.model)
    )
    assert torch.equal(before, after)


def test_parameters_are_computed_wide_and_rounded_once() -> None:
    narrow = tiny("gpt_oss").bfloat16()
    wide = tiny("gpt_oss").bfloat16().double()
    left, right = (rotated(decoder_of(model), random_basis(64)) for model in (narrow, wide))
    assert {parameter.dtype for parameter in left.parameters()} == {torch.bfloat16}
    assert not left.training
    for name, parameter in left.named_parameters():
        assert torch.equal(parameter, right.get_parameter(name).bfloat16())


def test_each_parameter_keeps_its_own_type() -> None:
    model = tiny("mixtral").bfloat16()
    for layer in model.model.layers:
        layer.mlp.gate.float()
    other = rotated(decoder_of(model), random_basis(64))
    own = {name: parameter.dtype for name, parameter in model.named_parameters()}
    found = {name: parameter.dtype for name, parameter in other.named_parameters()}
    assert found == own | {"lm_head.weight": torch.bfloat16}


def test_blocks_of_rows_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = decoder_of(tiny("mixtral"))
    whole = rotated(decoder, random_basis(64)).state_dict()
    monkeypatch.setattr(rotation, "ROWS", 7)
    blocks = rotated(decoder, random_basis(64)).state_dict()
    assert all(torch.allclose(tensor, blocks[name], atol=1e-7) for name, tensor in whole.items())


def test_an_identity_only_folds_gains() -> None:
    model = tiny("llama")
    other = rotated(decoder_of(model), torch.eye(64))
    assert torch.equal(other.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert torch.allclose(other.lm_head.weight, model.lm_head.weight * model.model.norm.weight)


def test_the_head_of_its_own_is_counted_and_the_child_of_the_planned_shape(tmp_path: Path) -> None:
    model = tiny("llama")
    source = decoder_of(model).architecture
    assert untied(source).parameters == source.parameters + 258 * 64
    other = decoder_of(rotated(decoder_of(model), random_basis(64)))
    assert other.architecture == untied(source)
    target = replace(untied(source), hidden=40, layers=3, ffn=72)
    scores = scores_of(calibrate(other.model, rows()).statistics, Scoring(), 1) | {
        "hidden": -torch.arange(64.0)
    }
    child = cut(other, target, select(scores, other.architecture, target))
    require_shape(child, other.anatomy, target)
    child.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(stock), logits(child))
    assert stock.config.tie_word_embeddings is False
    assert sum(parameter.numel() for parameter in stock.parameters()) == target.parameters
    assert stock.lm_head.weight.data_ptr() != stock.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_scores_of_other_axes_are_those_of_the_parent(name: str) -> None:
    """So one calibration of the parent serves; eigenvalues stand in for the hidden scores."""
    model = tiny(name)
    basis, _ = principal_basis(model, rows(), range(4))
    before = calibrate(model, rows()).statistics
    after = calibrate(rotated(decoder_of(model), basis), rows()).statistics
    others = [name for name in before if not name.startswith("hidden")]
    assert len(others) > 8
    for name in others:
        assert torch.allclose(before[name], after[name], rtol=1e-3, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    ("basis", "message"),
    [
        (torch.eye(63), "of shape"),
        (2 * torch.eye(64), "not orthogonal"),
        (torch.eye(64) / 0, "not orthogonal"),
    ],
)
def test_what_is_no_basis_is_refused(basis: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        rotated(decoder_of(tiny("llama")), basis)


def test_a_refused_class_is_refused_with_a_way_out() -> None:
    with pytest.raises(InputError, match=r"cannot be rotated exactly.*LayerNorm") as caught:
        rotated(decoder_of(tiny("cohere")), torch.eye(64))
    assert caught.value.value == "cohere"
    assert "scores" in caught.value.remedy


def test_bound_channels_are_refused(forget: None) -> None:
    decoder = decoder_of(tiny("llama"))
    bound = replace(decoder.anatomy, form=Form("intermediate_size", bound=True))
    assert "binds hidden channels to heads" in wiring.unturnable(replace(decoder, anatomy=bound), {})


def changed_mlp(monkeypatch: pytest.MonkeyPatch, gate: Any, up: Any) -> None:
    """A Llama whose gate and up read `gate(x)` and `up(x)`."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(gate(x))) * self.up_proj(up(x)))

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)


def test_a_gain_that_only_copies_read_is_refused(monkeypatch: pytest.MonkeyPatch, forget: None) -> None:
    changed_mlp(monkeypatch, torch.clone, torch.clone)
    reason = rotation_refusal(decoder_of(tiny("llama")))
    assert "post_attention_layernorm goes into no matrix" in reason


@pytest.mark.parametrize("gate", [torch.clone, torch.abs, lambda x: x - x.mean(-1, keepdim=True)])
def test_what_the_wiring_does_not_see_the_proof_does(
    gate: Any, monkeypatch: pytest.MonkeyPatch, forget: None
) -> None:
    changed_mlp(monkeypatch, gate, lambda x: x)
    assert "a rotated miniature differs" in rotation_refusal(decoder_of(tiny("llama")))


def test_a_norm_that_is_added_to_the_stream_as_well_is_refused(
    monkeypatch: pytest.MonkeyPatch, forget: None
) -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return x + self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    assert "a rotated miniature differs" in rotation_refusal(decoder_of(tiny("llama")))


@pytest.mark.parametrize("which", ["mix", "mlp"])
def test_a_matrix_may_read_past_every_norm_but_not_both_ways(
    which: str, monkeypatch: pytest.MonkeyPatch, forget: None
) -> None:
    """A matrix of its own is turned without a gain; one that reads a norm as well cannot hold it and not."""
    plain = modeling_llama.LlamaDecoderLayer.forward

    def forward(self: nn.Module, hidden_states: Tensor, *rest: Any, **more: Any) -> Tensor:
        found: Tensor = plain(self, hidden_states, *rest, **more)
        return found + 0.1 * self.get_submodule(which)(hidden_states)

    with_parameter(monkeypatch, "mix", lambda size: nn.Linear(size, size))
    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", forward)
    reason = rotation_refusal(decoder_of(tiny("llama")))
    assert reason == "" if which == "mix" else "a rotated miniature differs" in reason


def with_parameter(
    monkeypatch: pytest.MonkeyPatch, name: str, make: Callable[[int], nn.Module | Tensor]
) -> None:
    """Llamas with something more in every layer, made for D channels."""
    plain = modeling_llama.LlamaDecoderLayer.__init__

    def init(self: nn.Module, config: Any, layer_idx: int) -> None:
        plain(self, config, layer_idx)
        setattr(self, name, make(config.hidden_size))

    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "__init__", init)


def test_a_vector_over_channels_that_is_no_bias_is_refused(
    monkeypatch: pytest.MonkeyPatch, forget: None
) -> None:
    with_parameter(monkeypatch, "scale", lambda size: nn.Parameter(torch.ones(size)))
    assert "layers.0.scale has an entry for each hidden channel" in rotation_refusal(
        decoder_of(tiny("llama"))
    )


def test_a_miniature_that_does_not_run_is_refused(monkeypatch: pytest.MonkeyPatch, forget: None) -> None:
    def broken(self: nn.Module, x: Tensor) -> Tensor:
        raise ValueError("no such\nkernel")

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", broken)
    assert rotation_refusal(decoder_of(make_model("llama"))).endswith("does not run (no such kernel)")


def test_a_proof_is_made_once(monkeypatch: pytest.MonkeyPatch, forget: None) -> None:
    decoder = decoder_of(tiny("llama"))
    assert rotation_refusal(decoder) == ""
    monkeypatch.setattr(rotation, "_prove", None)
    assert rotation_refusal(decoder) == ""


def test_a_module_that_reads_two_norms_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wiring, "readings", lambda small, norms: {"lm_head": {"a", "b"}})
    found = wiring.wiring_of(decoder_of(tiny("llama")))
    assert found == Misfit("lm_head reads more than one norm")


def test_the_wiring_is_that_of_one_layer() -> None:
    found = divided({"m.0.q": "m.0.n", "m.1.q": "m.1.n", "head": "norm"}, "m")
    assert not isinstance(found, Misfit)
    assert [found.norm_of(path, "m") for path in ("m.3.q", "head", "m.3.o", "embed")] == [
        "m.3.n",
        "norm",
        "",
        "",
    ]
    assert "another layer" in divided({"m.1.q": "m.0.n"}, "m").reason
    assert "another layer" in divided({"m.1.q": "norm"}, "m").reason
    assert "different ways" in divided({"m.0.q": "m.0.n", "m.1.q": "m.1.p"}, "m").reason


def test_one_norm_before_attention_and_ffn_feeds_both(monkeypatch: pytest.MonkeyPatch, forget: None) -> None:
    """A parallel block, as of Cohere and GPT-NeoX, but with an RMSNorm."""

    def init(self: nn.Module, config: Any, layer_idx: int) -> None:
        super(modeling_llama.LlamaDecoderLayer, self).__init__()
        self.self_attn = modeling_llama.LlamaAttention(config=config, layer_idx=layer_idx)
        self.mlp = modeling_llama.LlamaMLP(config)
        self.input_layernorm = modeling_llama.LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self: nn.Module, hidden_states: Tensor, **more: Any) -> Tensor:
        y = self.input_layernorm(hidden_states)
        return hidden_states + self.self_attn(hidden_states=y, **more)[0] + self.mlp(y)

    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "__init__", init)
    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", forward)
    model = tiny("llama")
    other = rotated(decoder_of(model), random_basis(64))
    assert (logits(other) - logits(model)).abs().max() <= 1e-4 * logits(model).abs().max()


@pytest.mark.parametrize(
    ("name", "module", "dimensions", "expected"),
    [
        ("q.weight", nn.Linear(2, 2), (Entries.QUERIES, HIDDEN), 1),
        ("o.weight", nn.Linear(2, 2), (HIDDEN, Entries.QUERIES), None),
        ("o.bias", nn.Linear(2, 2), (HIDDEN,), None),
        ("fc.weight", Conv1D(2, 2), (HIDDEN, FFN), 0),
        ("proj.weight", Conv1D(2, 2), (FFN, HIDDEN), None),
        ("embed.weight", nn.Embedding(2, 2), (FIXED, HIDDEN), None),
        ("router.weight", nn.Module(), (EXPERTS, HIDDEN), 1),
        ("experts.down_bias", nn.Module(), (EXPERTS, HIDDEN), None),
        ("experts.gate_up", nn.Module(), (EXPERTS, HIDDEN, Entries.FFN_PAIRS), 1),
        ("experts.gate_up", nn.Module(), (EXPERTS, Entries.FFN_HALVES, HIDDEN), 2),
        ("experts.down", nn.Module(), (EXPERTS, FFN, HIDDEN), None),
    ],
)
def test_which_side_of_a_matrix_reads(
    name: str, module: nn.Module, dimensions: tuple[Entries, ...], expected: int | None
) -> None:
    assert read_along(name, module, dimensions) == expected


def test_the_basis_does_not_depend_on_the_batch_and_can_be_repeated() -> None:
    model = tiny("qwen3")
    first, values = principal_basis(model, rows(), [0, 1, 3], batch=5)
    again, _ = principal_basis(model, rows(), [0, 1, 3], batch=5)
    assert torch.equal(first, again)
    for batch in (1, 2):
        other, own_values = principal_basis(model, rows(), [0, 1, 3], batch=batch)
        assert torch.allclose(own_values, values, atol=1e-6 * values[0])
        assert torch.allclose(other[:, :8], first[:, :8], atol=1e-3)
        assert torch.allclose(other * own_values @ other.T, first * values @ first.T, atol=1e-5 * values[0])
    assert (first.gather(0, first.abs().argmax(0, keepdim=True)) > 0).all()
    assert (values.diff() <= 0).all()


def test_the_eigenvalues_are_scores_that_keep_the_first_channels() -> None:
    model = make_model("llama", rms_norm_eps=0.05)
    basis, values = principal_basis(model, rows(), range(4))
    other = rotated(decoder_of(model), basis)
    _, kept = prune(other, replace(decoder_of(other).architecture, hidden=24), {"hidden": values})
    assert kept["hidden"] == list(range(24))


def test_activations_that_are_not_finite_name_their_layer() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(InputError, match="layer 2 of the model put out activations that are not finite"):
        principal_basis(model, rows(), [0, 1])
    assert hooks(model) == 0


def test_no_rows_and_layers_that_are_none_are_refused() -> None:
    model = tiny("llama")
    with pytest.raises(InputError, match="no tokens"):
        principal_basis(model, rows()[:0], [0])
    for layers in ([], [4], [-1], [1, 1]):
        with pytest.raises(InputError, match="some of 0 to 3"):
            principal_basis(model, rows(), layers)
