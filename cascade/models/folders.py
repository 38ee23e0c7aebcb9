"""Plain Hugging Face folders: what every stage reads and writes, loadable without this package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from cascade.errors import InputError

# What transformers writes about where a tokenizer came from, not what it is.
ORIGIN_FIELDS = ("is_local", "local_files_only", "name_or_path")


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write weights (safetensors, the model's own dtype; tied ones once), config and tokenizer to `folder`.

    The same weights, config and tokenizer give the same bytes, wherever they were loaded from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = _valid_generation(model.generation_config)
    for field in ORIGIN_FIELDS:
        tokenizer.init_kwargs.pop(field, None)
    with no_progress_bars():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    # safetensors writes through a private temporary file (mode 0600); its neighbours have the user's mode.
    mode = (folder / "config.json").stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


def load_folder(
    path: Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    config: PreTrainedConfig | None = None,
) -> PreTrainedModel:
    """The model in `path`, in eval mode on `device`; dtype None keeps the one it was saved in.

    config: in place of its own.

    Raises InputError when the weights are damaged or are not the ones that the config describes
    (transformers would fill the gaps with random numbers).
    """
    try:
        with no_progress_bars():
            loaded = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=dtype or "auto",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except SafetensorError as error:
        raise InputError(
            "the weights are damaged", value=error, where=str(path), remedy="fetch the folder again"
        ) from error
    return nn.Module.to(whole_model(loaded, path), torch.device(device))


def load_folder_config(path: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config in `path`."""
    config: PreTrainedConfig = AutoConfig.from_pretrained(
        path, local_files_only=True, trust_remote_code=trust_remote_code
    )
    return config


def whole_model(loaded: object, where: Path) -> PreTrainedModel:
    """The model of a `from_pretrained(..., output_loading_info=True)`, in eval mode.

    Raises InputError when a tensor was missing, superfluous or of another shape.
    """
    model, info = cast(tuple[PreTrainedModel, dict[str, set[str | tuple[str, ...]]]], loaded)
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        names = sorted(key if isinstance(key, str) else key[0] for key in info[kind])
        if names:
            raise InputError(
                f"the weights do not fit the config: {len(names)} {kind.removesuffix('_keys')} tensors",
                value=", ".join(names[:3]),
                where=str(where),
                remedy="fetch the model again, config and weights from the same revision",
            )
    return model.eval()


def load_folder_tokenizer(path: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in `path`; raises InputError when there is none."""
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:
        # The Rust library behind it raises plain exceptions, and Python's own code whatever a field leads to.
        raise InputError(
            "there is no tokenizer that can be loaded",
            value=first_words(error),
            where=str(path),
            remedy="put the tokenizer's files (tokenizer.json, tokenizer_config.json) beside the weights",
        ) from error


def first_words(error: BaseException) -> str:
    """The beginning of what an error says, or its kind."""
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep the libraries' own progress bars out of the logs."""
    models, hub = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.disable_progress_bar()
    disable_progress_bars()
    try:
        yield
    finally:
        if models:
            logging.enable_progress_bar()
        if hub:
            enable_progress_bars()


def _valid_generation(config: GenerationConfig) -> GenerationConfig:
    """The config itself, or only its token ids where its sampling settings contradict each other.

    transformers refuses to save such settings once anything was changed, and warns at every load.
    """
    try:
        config.validate(strict=True)
    except ValueError:
        return GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )
    return config
