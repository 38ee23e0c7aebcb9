"""Folders are plain, deterministic, and refused when weights and config do not belong together."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cascade.errors import InputError
from cascade.models.folders import load_folder, load_folder_tokenizer, save_model
from tests.tiny import make_model, make_tokenizer


def test_the_round_trip_is_exact_and_keeps_the_tie(tmp_path: Path) -> None:
    model = make_model()
    save_model(model, make_tokenizer(), tmp_path / "a")
    again = load_folder(tmp_path / "a")
    assert not again.training
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
    assert "lm_head.weight" not in load_file(tmp_path / "a" / "model.safetensors")
    tokens = torch.arange(20)[None]
    assert torch.equal(model(tokens).logits, again(tokens).logits)
    assert load_folder_tokenizer(tmp_path / "a")("a b").input_ids == make_tokenizer()("a b").input_ids


def test_the_same_model_gives_the_same_bytes_wherever_it_was_loaded_from(tmp_path: Path) -> None:
    save_model(make_model(), make_tokenizer(), tmp_path / "a")
    save_model(load_folder(tmp_path / "a"), load_folder_tokenizer(tmp_path / "a"), tmp_path / "b")
    shutil.copytree(tmp_path / "b", tmp_path / "elsewhere")
    save_model(
        load_folder(tmp_path / "elsewhere"), load_folder_tokenizer(tmp_path / "elsewhere"), tmp_path / "c"
    )
    first = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    for folder in ("b", "c"):
        assert {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} == first


def test_precision_is_kept_or_chosen(tmp_path: Path) -> None:
    save_model(make_model().to(torch.bfloat16), make_tokenizer(), tmp_path)
    assert load_folder(tmp_path).dtype == torch.bfloat16
    assert load_folder(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_everyone_who_may_read_the_config_may_read_the_weights(tmp_path: Path) -> None:
    save_model(make_model(), make_tokenizer(), tmp_path)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_contradicting_sampling_settings_do_not_travel(tmp_path: Path) -> None:
    model = make_model()
    model.generation_config.temperature = 0.6
    save_model(model, make_tokenizer(), tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert "temperature" not in saved
    assert (saved["eos_token_id"], saved["pad_token_id"]) == (256, 257)


def test_sound_sampling_settings_travel(tmp_path: Path) -> None:
    model = make_model()
    model.generation_config.update(do_sample=True, temperature=0.6)
    save_model(model, make_tokenizer(), tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["temperature"] == 0.6


def test_stock_transformers_loads_and_runs_it_whole(tmp_path: Path) -> None:
    save_model(make_model(), make_tokenizer(), tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    tokens = AutoTokenizer.from_pretrained(tmp_path)("one two", return_tensors="pt")
    assert model.generate(**tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (1, 11)


@pytest.mark.parametrize("change", ["missing", "unexpected", "mismatched"])
def test_weights_of_another_model_are_refused(tmp_path: Path, change: str) -> None:
    save_model(make_model(), make_tokenizer(), tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    if change == "missing":
        del weights[name]
    elif change == "unexpected":
        weights["model.layers.9.mlp.up_proj.weight"] = weights[name].clone()
    else:
        weights[name] = weights[name][:5].clone()
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"1 {change} tensors") as caught:
        load_folder(tmp_path)
    assert "mlp.up_proj.weight" in str(caught.value.value)


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    save_model(make_model(), make_tokenizer(), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="damaged"):
        load_folder(tmp_path)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no tokenizer"):
        load_folder_tokenizer(tmp_path)
