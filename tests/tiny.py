"""A tiny real parent and a tiny real corpus, both deterministic and made in under a second."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TokenizersBackend

from cascade.models.folders import no_progress_bars

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
SUBJECTS = (
    "the river|a small house|the old teacher|her brother|the engine|a quiet city|the careful reader|winter"
)
VERBS = "carries|follows|remembers|changes|explains|meets|repairs|leaves|measures|answers"
OBJECTS = (
    "the bridge|a long letter|every question|the morning train|its own shape|a broken clock|the next page"
)
TAILS = (
    "before noon|without a word|as it always did|in the rain|for the third time|because it must|near the sea"
)


def make_tokenizer() -> TokenizersBackend:
    """A byte-level tokenizer without merges: 256 byte tokens, then end of text (256) and padding (257)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return TokenizersBackend(tokenizer_object=backend, eos_token=END_OF_TEXT, pad_token=PAD)


def make_model(family: str = "llama", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
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


def make_parent(folder: Path, family: str = "llama", *, seed: int = 0, **overrides: Any) -> Path:
    """Write `make_model` and its byte-level tokenizer as a Hugging Face folder; returns `folder`."""
    with no_progress_bars():
        make_model(family, seed=seed, **overrides).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_corpus(path: Path, *, documents: int = 160, seed: int = 0) -> Path:
    """Write a .jsonl corpus with the field `text`: about 500 characters a document, 80 kB by default."""
    draw = random.Random(seed)
    with path.open("w", encoding="ascii") as stream:
        for _ in range(documents):
            stream.write(
                json.dumps({"text": " ".join(_sentence(draw) for _ in range(draw.randint(5, 14)))}) + "\n"
            )
    return path


def _sentence(draw: random.Random) -> str:
    parts = (draw.choice(words.split("|")) for words in (SUBJECTS, VERBS, OBJECTS, TAILS))
    return " ".join(parts).capitalize() + f" in {draw.randint(1800, 2020)}."
