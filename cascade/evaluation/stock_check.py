"""Run by `gate` in a process of its own: does a folder work with stock torch and transformers alone?

Usage: python -I stock_check.py FOLDER. Imports nothing of this package. Prints READY to stderr when
its imports are done, so that what a library says while being imported is not held against the
folder, and at the end one JSON object to stdout. What the figures must be is decided by `gate`.
"""

import gc
import json
import logging
import os
import sys
import warnings
from typing import Any

if __name__ == "__main__":
    # Imports make what stays: a search for garbage in it takes almost as long (see `cascade.collector`).
    gc.disable()

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

READY = "stock-check-ready"
PROMPT = "The first thing to know about the language is that it"
NEW_TOKENS = 16


@torch.no_grad()
def figures(folder: str) -> dict[str, object]:
    """Load, count, run and generate. Float32, so that cached and uncached differ by rounding alone."""
    # Any: the annotations of generate in transformers do not type-check.
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    length = model.config.max_position_embeddings - NEW_TOKENS
    ids, mask = inputs["input_ids"][:, :length], inputs["attention_mask"][:, :length]
    whole = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    stepwise, cache = [], None
    for position in range(ids.shape[1]):
        step = model(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        stepwise.append(step.logits)
        cache = step.past_key_values
    generated = [
        model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy(use_cache)).tolist()
        for use_cache in (True, False)
    ]
    difference = (whole - torch.cat(stepwise, 1)).abs().max() / whole.abs().max()
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tied_in_config": bool(model.config.tie_word_embeddings),
        "tied_in_memory": embeddings.data_ptr() == head.data_ptr(),
        "finite": bool(torch.isfinite(whole).all()),
        "cached_difference": difference.item(),
        "same_generation": generated[0] == generated[1],
        "new_tokens": len(generated[0][0]) - ids.shape[1],
        "vocabulary_fits": len(tokenizer) <= embeddings.shape[0],
    }


def greedy(use_cache: bool) -> GenerationConfig:
    """Not the model's own settings: they may sample, stop at once, or lack a padding token."""
    return GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=use_cache, pad_token_id=0)


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    warnings.simplefilter("always")
    logging.basicConfig(level=logging.WARNING)
    print(READY, file=sys.stderr, flush=True)
    print(json.dumps(figures(sys.argv[1])), flush=True)
    sys.stderr.flush()
    # What libraries say while Python ends is not judged, and it takes a second.
    os._exit(0)
