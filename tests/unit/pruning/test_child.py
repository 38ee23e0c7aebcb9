"""The fresh model: its config, its identity, and what must not leak into or out of it."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, MambaConfig, PreTrainedModel

from cascade.errors import CascadeError, InputError
from cascade.importance.calibration import calibrate
from cascade.importance.method import Scoring
from cascade.importance.scoring import scores_of
from cascade.models.decoder import decoder_of
from cascade.pruning.child import child_config, require_shape
from cascade.pruning.prune import prune
from tests.tiny import make_model

CUT = {"layers": 3, "hidden": 40, "ffn": 72, "kv_groups": 1}


def cut(model: PreTrainedModel, **sizes: int) -> tuple[PreTrainedModel, dict[str, list]]:
    rows = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(0))
    source = decoder_of(model).architecture
    target = replace(source, **sizes)
    scores = scores_of(calibrate(model, rows).statistics, Scoring(), source.layers - target.layers)
    return prune(model, target, scores)


def test_tied_embeddings_are_one_tensor_and_stay_one_through_training() -> None:
    child, _ = cut(make_model("llama"), **CUT)
    assert child.get_output_embeddings().weight is child.get_input_embeddings().weight
    optimiser = torch.optim.SGD(child.parameters(), lr=0.1)
    child(input_ids=torch.arange(8)[None]).logits.sum().backward()
    optimiser.step()
    assert child.get_output_embeddings().weight is child.get_input_embeddings().weight
    assert all(parameter.requires_grad for parameter in child.parameters())


def test_untied_embeddings_stay_two() -> None:
    child, _ = cut(make_model("llama", tie_word_embeddings=False), **CUT)
    head, embeddings = child.get_output_embeddings().weight, child.get_input_embeddings().weight
    assert head.data_ptr() != embeddings.data_ptr()
    assert child.config.tie_word_embeddings is False


@pytest.mark.parametrize("sizes", [CUT, {}])
def test_the_parent_is_not_changed_and_shares_no_memory(sizes: dict[str, int]) -> None:
    model = make_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    child, _ = cut(model, **sizes)
    with torch.no_grad():
        for parameter in child.parameters():
            parameter.fill_(7.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == config


def test_kept_layers_are_numbered_anew_and_keep_their_types() -> None:
    model = make_model("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=2)
    child, kept = cut(model, layers=2)
    assert [layer.self_attn.layer_idx for layer in child.get_decoder().layers] == [0, 1]
    expected = [model.config.layer_types[layer] for layer in kept["layers"]]
    assert child.config.layer_types == expected


def test_lists_that_are_not_per_layer_are_kept_whole() -> None:
    model = make_model("llama", eos_token_id=[1, 2, 3, 4])
    decoder = decoder_of(model)
    config = child_config(decoder, replace(decoder.architecture, layers=2, hidden=40, ffn=8), [0, 3])
    assert config.eos_token_id == [1, 2, 3, 4]
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (2, 40, 8)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_config_loads_alone_and_without_a_warning(family: str, tmp_path: Path) -> None:
    child, _ = cut(make_model(family), **CUT)
    child.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = AutoConfig.from_pretrained(tmp_path)
    assert config.head_dim == 16
    assert config.hidden_size == 40
    assert (config.num_attention_heads, config.num_key_value_heads) == (2, 1)


def test_generation_settings_are_inherited() -> None:
    model = make_model("llama")
    model.generation_config.max_new_tokens = 5
    child, _ = cut(model, **CUT)
    assert child.generation_config.max_new_tokens == 5
    assert child.generation_config is not model.generation_config


def test_type_and_mode_are_the_parents(tmp_path: Path) -> None:
    child, _ = cut(make_model("llama").bfloat16(), **CUT)
    assert {parameter.dtype for parameter in child.parameters()} == {torch.bfloat16}
    assert not child.training
    child.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_the_same_cut_twice_gives_the_same_bytes() -> None:
    states: list[dict[str, Tensor]] = [cut(make_model("llama"), **CUT)[0].state_dict() for _ in range(2)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_a_child_that_is_not_the_planned_one_is_refused() -> None:
    model = make_model("llama")
    decoder = decoder_of(model)
    with pytest.raises(CascadeError, match="not what was planned"):
        require_shape(model, decoder.anatomy, replace(decoder.architecture, ffn=64))


def test_decoders_that_are_not_understood_are_refused() -> None:
    model = AutoModelForCausalLM.from_config(MambaConfig(num_hidden_layers=1, hidden_size=16, vocab_size=32))
    shape = decoder_of(make_model("llama")).architecture
    with pytest.raises(InputError, match="cannot be pruned"):
        prune(model, shape, {})
