"""A parent of random weights that anybody can make: to see that an installation works, not to be kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TokenizersBackend

from cascade.errors import InputError
from cascade.models.folders import no_progress_bars
from cascade.storage.cache import touch
from cascade.storage.local import hidden_sibling

RANDOM = "random:"
LLAMA = "llama"
END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
SIZES: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


def random_folder(reference: str, cache: Path) -> Path:
    """The folder of `random:llama` in the cache, made if it is not there; the same bytes on every machine
    with the same versions.

    Raises InputError for any other name.
    """
    if reference != RANDOM + LLAMA:
        raise InputError(
            "there is no such random parent", value=reference, where="parent", remedy=f"give {RANDOM}{LLAMA}"
        )
    folder = cache / "parents" / f"random-{LLAMA}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = make_parent(hidden_sibling(folder))
        try:
            made.rename(folder)
        except OSError:
            # Another process was faster.
            if not folder.is_dir():
                raise
            shutil.rmtree(made)
    touch(folder)
    return folder


def make_tokenizer() -> TokenizersBackend:
    """A byte-level tokenizer without merges: 256 byte tokens, then end of text (256) and padding (257)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return TokenizersBackend(tokenizer_object=backend, eos_token=END_OF_TEXT, pad_token=PAD)


def make_model(family: str = LLAMA, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A seeded random decoder of `SIZES` (overridden by `overrides`, None drops one) in float32, eval mode.

    Weights are drawn at four times the initialiser's scale, and gains and biases away from their
    constants, so that logits are far from uniform and every parameter matters to them.
    """
    ids = {"vocab_size": 258, "bos_token_id": None, "eos_token_id": 256, "pad_token_id": 257}
    sizes = {name: value for name, value in {**SIZES, **overrides}.items() if value is not None}
    config = AutoConfig.for_model(family, **{**ids, **sizes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim >= 2:
                    nn.init.normal_(parameter, std=0.08)
                else:
                    nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.1)
    return model.eval()


def make_parent(folder: Path, family: str = LLAMA, *, seed: int = 0, **overrides: Any) -> Path:
    """Write `make_model` and its byte-level tokenizer as a Hugging Face folder; returns `folder`."""
    with no_progress_bars():
        make_model(family, seed=seed, **overrides).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
