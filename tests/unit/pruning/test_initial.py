"""Students from scratch: the planned shape, the class's own draw, the same for the same seed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cascade.models.decoder import decoder_of
from cascade.pruning.initial import random_model
from tests.architectures import CORE, tiny


@pytest.mark.parametrize("name", CORE)
def test_it_has_the_planned_shape_and_the_class_s_own_weights(name: str) -> None:
    like = decoder_of(tiny(name))
    target = replace(like.architecture, layers=1, ffn=like.architecture.ffn // 2)
    state = torch.get_rng_state()
    model, again, other = (random_model(like, target, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert decoder_of(model).architecture == target
    assert type(model) is type(like.model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    others = dict(other.named_parameters())
    drawn = [(name, one) for name, one in model.named_parameters() if one.ndim > 1 and "bias" not in name]
    assert drawn
    assert not [name for name, one in drawn if torch.equal(one, others[name])]
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), again.parameters(), strict=True))
    assert model.config.num_hidden_layers == 1
    if name == "llama":
        assert model.config.rms_norm_eps == like.model.config.rms_norm_eps
