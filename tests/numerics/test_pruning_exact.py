"""A child is exactly its parent with the removed units masked: every axis of every architecture."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from cascade.architecture import Architecture
from cascade.models.decoder import decoder_of
from cascade.pruning.prune import prune
from cascade.pruning.selection import score_shapes
from tests.architectures import ARCHITECTURES, cuts
from tests.numerics.masking import masked
from tests.numerics.parents import parent, tokens
from tests.tiny import make_model

TOLERANCE = 1e-4
CASES = [(name, cut) for name in ARCHITECTURES for cut in cuts(name)]
# Runs alone, with nothing of ours: load every folder, compare its logits with those beside it.
FRESH = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
found = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    expected = load_file(folder / "expected.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(input_ids=expected["tokens"]).logits
    found[folder.name] = {
        "difference": (logits - expected["logits"]).abs().max().item(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
print(json.dumps(found))
"""


def random_scores(model: PreTrainedModel) -> dict[str, Tensor]:
    """Scores without order, so that what stays is scattered and differs from layer to layer."""
    draw = torch.Generator().manual_seed(5)
    shapes = score_shapes(decoder_of(model).architecture)
    return {axis.value: torch.rand(shape, generator=draw) for axis, shape in shapes.items()}


def cut(model: PreTrainedModel, sizes: dict[str, int]) -> tuple[PreTrainedModel, Any, Architecture]:
    changed: dict[str, Any] = dict(sizes)
    target = replace(decoder_of(model).architecture, **changed)
    return *prune(model, target, random_scores(model)), target


@pytest.fixture(scope="module")
def fresh(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, float]]:
    """What a fresh process measures on every child, by architecture and cut, of the tests that run."""
    root = tmp_path_factory.mktemp("children")
    mine = [item for item in request.session.items if getattr(item, "module", None) is request.module]
    asked = {item.callspec.params["name"] for item in mine if "fresh" in item.fixturenames}
    for name in sorted(asked):
        model = parent(name)
        for which, sizes in cuts(name).items():
            child, kept, _ = cut(model, sizes)
            folder = root / f"{name}, {which}"
            child.save_pretrained(folder)
            with torch.no_grad(), masked(model, kept):
                logits = model(input_ids=tokens()).logits
            save_file({"tokens": tokens(), "logits": logits}, folder / "expected.safetensors")
    done = subprocess.run([sys.executable, "-I", "-c", FRESH, str(root)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(("name", "which"), CASES)
def test_child_is_the_masked_parent_in_a_fresh_process(
    name: str, which: str, fresh: dict[str, dict[str, float]]
) -> None:
    measured = fresh[f"{name}, {which}"]
    changed: dict[str, Any] = dict(cuts(name)[which])
    target = replace(decoder_of(parent(name)).architecture, **changed)
    assert measured["difference"] <= TOLERANCE
    assert measured["parameters"] == target.parameters


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_cut_matters_and_parameters_are_counted_exactly(name: str) -> None:
    model = parent(name)
    with torch.no_grad():
        whole = model(input_ids=tokens()).logits
        assert whole.std() > 0.1
        for sizes in cuts(name).values():
            _, kept, target = cut(model, sizes)
            assert target.parameters < decoder_of(model).architecture.parameters
            with masked(model, kept):
                assert (model(input_ids=tokens()).logits - whole).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_cached_generation_is_that_of_the_masked_parent(name: str) -> None:
    model = parent(name)
    child, kept, _ = cut(model, cuts(name)["all"])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = child.generate(tokens()[:, :6], use_cache=True, **options)
    assert torch.equal(cached, child.generate(tokens()[:, :6], use_cache=False, **options))
    with masked(model, kept):
        assert torch.equal(cached, model.generate(tokens()[:, :6], use_cache=True, **options))


def test_a_cut_of_a_cut_is_still_exact() -> None:
    """Stages cut what earlier stages cut: gains and epsilon are folded twice."""
    model = parent("qwen3")
    first, _, _ = cut(model, {"hidden": 56, "layers": 3})
    second, kept, _ = cut(first, {"hidden": 40, "layers": 2, "ffn": 64})
    with torch.no_grad(), masked(first, kept):
        expected = first(input_ids=tokens()).logits
    with torch.no_grad():
        assert (second(input_ids=tokens()).logits - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    "options", [{"tie_word_embeddings": False, "mlp_bias": True}, {"num_key_value_heads": 4}]
)
def test_llamas_with_other_options(options: dict[str, Any]) -> None:
    model = make_model("llama", attention_bias=True, **options)
    child, kept, _ = cut(model, {"layers": 3, "hidden": 40, "ffn": 72, "kv_groups": 1})
    with torch.no_grad(), masked(model, kept):
        expected = model(input_ids=tokens()).logits
    with torch.no_grad():
        assert (child(input_ids=tokens()).logits - expected).abs().max() <= TOLERANCE


def test_the_reference_notices_one_wrong_neuron() -> None:
    """The tolerance would prove nothing if a wrong index stayed below it."""
    model = parent("llama")
    child, kept, _ = cut(model, {"ffn": 72})
    kept["ffn"][0][0] = next(neuron for neuron in range(128) if neuron not in kept["ffn"][0])
    with torch.no_grad(), masked(model, kept):
        expected = model(input_ids=tokens()).logits
    with torch.no_grad():
        assert (child(input_ids=tokens()).logits - expected).abs().max() > 10 * TOLERANCE
