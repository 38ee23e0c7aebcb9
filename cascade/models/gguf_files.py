"""GGUF parents: dequantised by transformers; the slow parse of the vocabulary is done once and kept."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from cascade.errors import InputError
from cascade.models.configs import BUILD_ERRORS
from cascade.models.folders import no_progress_bars, whole_model
from cascade.models.gguf_header import check_gguf
from cascade.storage.cache import touch
from cascade.storage.local import hidden_sibling


def describe(path: Path, fingerprint: str, cache: Path) -> Path:
    """A folder with the file's config and tokenizer in Hugging Face form, translated once into `cache`.

    Raises InputError when the file is not a GGUF file or transformers does not know its architecture.
    """
    try:
        check_gguf(path)
    except ValueError as error:
        raise _refusal(f"the GGUF file cannot be read: {error}", path) from error
    # The translation is transformers' own, so another version may give another one.
    folder = cache / "gguf" / f"{fingerprint[:12]}-{transformers.__version__}"
    if not folder.exists():
        staged = hidden_sibling(folder)
        try:
            _translate(path, staged)
            os.rename(staged, folder)
        except OSError:
            # Another process may have made the same translation meanwhile.
            if not folder.exists():
                raise
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    touch(folder)
    return folder


def _translate(path: Path, folder: Path) -> None:
    """Write the file's config and tokenizer to `folder`."""
    with _gguf_faults(path):
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # The name that the file's maker gave it: not a place that transformers could load from.
    vars(config).pop("_model_name_or_path", None)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load(path: Path, described_by: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """The dequantised model, float32 unless `dtype` says otherwise, free of what marks it as quantised."""
    config = AutoConfig.from_pretrained(described_by)
    with _gguf_faults(path):
        loaded = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            config=config,
            dtype=dtype or torch.float32,
            output_loading_info=True,
        )
    model = whole_model(loaded, path)
    # The weights are plain floats now, but transformers would refuse to save them.
    if hasattr(model, "hf_quantizer"):
        del model.hf_quantizer
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model.eval()


@contextlib.contextmanager
def _gguf_faults(path: Path) -> Iterator[None]:
    """Turn what the readers raise on a foreign or truncated file into an InputError; draw no bars."""
    try:
        # transformers draws the dequantiser's bar whatever its own setting says.
        with no_progress_bars(), contextlib.redirect_stderr(io.StringIO()):
            yield
    except (*BUILD_ERRORS, struct.error) as error:
        raise _refusal(f"the GGUF file cannot be read: {' '.join(str(error).split())[:300]}", path) from error


def _refusal(what: str, path: Path) -> InputError:
    return InputError(
        what,
        value=path,
        where="parent",
        remedy="fetch the file again, or give the model as a Hugging Face folder with safetensors weights",
    )
