"""RoPE settings in a config against the papers' formulas in float64, through the model's own attention.

N heads, T tokens, h head size, P = h / 2 pairs of channels.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from cascade.errors import InputError
from cascade.models.positions import RopeSettings, RopeType
from cascade.models.rope import extended_config
from tests.architectures import ARCHITECTURES, tiny
from tests.tiny import make_model

HEAD, ORIGINAL, LONG, THETA = 32, 64, 256, 10_000.0
SIZES: dict[str, Any] = {"head_dim": HEAD, "num_hidden_layers": 1, "max_position_embeddings": ORIGINAL}
FACTOR = LONG / ORIGINAL
SETTINGS = {
    "theta": RopeSettings(theta=500_000.0),
    "linear": RopeSettings(type=RopeType.LINEAR),
    "yarn": RopeSettings(type=RopeType.YARN),
    "yarn with theta": RopeSettings(theta=50_000.0, type=RopeType.YARN, factor=4.0),
    "llama3": RopeSettings(type=RopeType.LLAMA3),
}


def plain(theta: float) -> Tensor:
    """Frequencies [P] of 2104.09864, equation 15."""
    return torch.tensor([theta ** (-2 * pair / HEAD) for pair in range(HEAD // 2)], dtype=torch.float64)


def yarn(theta: float) -> Tensor:
    """2309.00071, definition 3 and section 3.2: pairs that turn more than 32 times in the original length
    stay, those that turn less than once are divided; between them a ramp over the pairs' numbers."""
    fast, slow = (
        HEAD * math.log(ORIGINAL / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (32, 1)
    )
    low, high = max(math.floor(fast), 0), min(math.ceil(slow), HEAD - 1)
    divided = ((torch.arange(HEAD // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    return plain(theta) * (1 - divided) + plain(theta) / FACTOR * divided


def llama3(theta: float) -> Tensor:
    """Llama 3.1's released code: by wavelengths, whole above the original length, not below a quarter."""
    frequencies = plain(theta)
    smooth = ((ORIGINAL * frequencies / (2 * math.pi) - 1) / (4 - 1)).clamp(0, 1)
    return (1 - smooth) * frequencies / FACTOR + smooth * frequencies


def reference(name: str) -> tuple[Tensor, float]:
    """Frequencies [P] and the factor of both queries and keys."""
    theta = SETTINGS[name].theta or THETA
    if name == "linear":
        return plain(theta) / FACTOR, 1.0
    if name == "llama3":
        return llama3(theta), 1.0
    if name.startswith("yarn"):
        return yarn(theta), 0.1 * math.log(FACTOR) + 1
    return plain(theta), 1.0


def rotated(states_NTh: Tensor, frequencies_P: Tensor) -> Tensor:
    """Channels p and p + P of every token turned by its position times the frequency."""
    angles = torch.arange(states_NTh.shape[1], dtype=torch.float64)[:, None] * frequencies_P
    first, second = states_NTh.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


@torch.no_grad()
def attention_of(config: PreTrainedConfig, ids_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Attention [N, T, T] of a model of this config, and its queries and keys [N, T, h] before rotation."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    seen: dict[str, Tensor] = {}
    block = model.model.layers[0].self_attn
    for name in ("q_proj", "k_proj"):
        # Large weights, so that attention is far from uniform.
        getattr(block, name).weight.mul_(20)
        getattr(block, name).register_forward_hook(lambda _, __, out, name=name: seen.update({name: out[0]}))
    weights = model(input_ids=ids_T[None], output_attentions=True).attentions[0][0]
    queries, keys = (
        seen[name].double().unflatten(-1, (-1, HEAD)).transpose(0, 1) for name in ("q_proj", "k_proj")
    )
    return weights, queries, keys


@pytest.mark.parametrize("name", SETTINGS)
def test_the_forward_pass_turns_by_what_the_config_says(name: str) -> None:
    before = make_model("llama", **SIZES).config
    config = extended_config(before, SETTINGS[name], LONG)
    assert (config.max_position_embeddings, before.max_position_embeddings) == (LONG, ORIGINAL)
    # As a child is stored and found again.
    config = AutoConfig.for_model(**config.to_dict())
    ids = torch.randint(0, 256, (LONG,), generator=torch.Generator().manual_seed(1))
    weights, queries, keys = attention_of(config, ids)
    frequencies, sharpened = reference(name)
    turned, others = (rotated(states, frequencies) * sharpened for states in (queries, keys))
    others = others.repeat_interleave(len(turned) // len(others), 0)
    scores = turned @ others.transpose(-1, -2) / math.sqrt(HEAD)
    expected = scores.masked_fill(torch.ones(LONG, LONG).triu(1).bool(), -torch.inf).softmax(-1)
    assert (weights - expected).abs().max() < 1e-4
    wrong = rotated(queries, plain(THETA)) @ rotated(keys, plain(THETA)).repeat_interleave(2, 0).mT
    wrong = (wrong / math.sqrt(HEAD)).masked_fill(torch.ones(LONG, LONG).triu(1).bool(), -torch.inf)
    assert (weights - wrong.softmax(-1)).abs().max() > 1e-2


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_takes_the_settings_or_says_that_it_cannot(name: str) -> None:
    """What is accepted comes back from a file without a warning and changes what the model computes."""
    overrides = {"max_position_embeddings": 4096 * 32} if name == "gpt_oss" else {}
    model = tiny(name, **overrides)
    limit = model.config.max_position_embeddings
    ids = torch.arange(12)[None]
    for settings in (RopeSettings(type=RopeType.LINEAR), RopeSettings(type=RopeType.YARN)):
        if name in ("gpt2", "opt"):
            with pytest.raises(InputError, match="no rotary positions") as caught:
                extended_config(model.config, settings, 2 * limit, "extend.rope")
            assert caught.value.value == name
        elif name == "phi3":
            with pytest.raises(InputError, match="does not take these RoPE settings"):
                extended_config(model.config, settings, 2 * limit, "extend.rope")
        else:
            config = extended_config(model.config, settings, 2 * limit, "extend.rope")
            assert config.max_position_embeddings == 2 * limit
            own = config.rope_parameters.get("full_attention", config.rope_parameters)
            assert own["rope_type"] == settings.type
            if name == "gemma3_text":
                # Four layers of it have windows, and no settings for those change.
                assert config.rope_parameters["sliding_attention"]["rope_type"] == "default"
                continue
            again = type(model)._from_config(config, dtype=torch.float32).eval()
            again.load_state_dict(model.state_dict())
            with torch.no_grad():
                difference = (again(input_ids=ids).logits - model(input_ids=ids).logits).abs().max()
            assert difference > 1e-4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (RopeSettings(), "longer than the positions"),
        (RopeSettings(type=RopeType.LINEAR, factor=2.0), "does not reach"),
        (RopeSettings(type=RopeType.YARN, original_length=256), "does not reach"),
        (RopeSettings(type=RopeType.YARN, factor=4.3), "YaRN's factor"),
    ],
)
def test_settings_that_do_not_reach_are_refused(settings: RopeSettings, words: str) -> None:
    config = make_model("llama", **SIZES).config
    with pytest.raises(InputError, match=words) as caught:
        extended_config(config, settings, LONG, "stage a, extend.rope")
    assert caught.value.where == "stage a, extend.rope"
    assert caught.value.remedy


def test_a_kept_scaling_that_ends_with_its_positions_is_refused_and_an_open_one_goes_on() -> None:
    config = make_model("llama", **SIZES).config
    scaled = extended_config(config, SETTINGS["yarn"], LONG)
    with pytest.raises(InputError, match="and for no more"):
        extended_config(scaled, RopeSettings(theta=1e6), 2 * LONG)
    longer = extended_config(
        extended_config(config, SETTINGS["llama3"], LONG), RopeSettings(theta=1e6), 2 * LONG
    )
    assert longer.rope_parameters["rope_theta"] == 1e6
    assert longer.rope_parameters["original_max_position_embeddings"] == ORIGINAL
    assert longer.max_position_embeddings == 2 * LONG
