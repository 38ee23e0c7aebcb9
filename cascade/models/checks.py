"""What a parent's folder must hold, checked before any weight is loaded."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cascade.errors import InputError
from cascade.models.configs import BUILD_ERRORS
from cascade.models.folders import first_words
from cascade.parsing import parse_json
from cascade.storage.local import file_sha256
from cascade.wording import short

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
PARENT_SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".jinja", ".py")
INDEX = "model.safetensors.index.json"
# What plain weights are stored in, as safetensors calls them; integers are masks, or quantised.
FLOATS = ("F16", "BF16", "F32", "F64")
# Of file systems.
LONGEST_NAME = 255
# Of what a config counts, far beyond any model: a class makes as many modules, or matrices as wide, only to
# find out its structure.
MOST = {"layer": 10_000, "expert": 10_000, "head": 65_536, "rank": 65_536}


def parent_files(folder: Path) -> list[str]:
    """Names of the files that make the parent what it is: config, weights, tokenizer, code; no subfolders."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.is_file() and path.suffix in PARENT_SUFFIXES and not path.name.startswith(".")
    )


def folder_fingerprint(folder: Path) -> str:
    """sha256 over names and contents of `parent_files`: the same wherever the folder lies."""
    lines = [f"{file_sha256(folder / name)}  {name}\n" for name in parent_files(folder)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_weight_names(names: list[str], reference: str) -> None:
    """Raise InputError unless there are safetensors weights among `names`."""
    if any(name.endswith(".safetensors") and not name.startswith("adapter_") for name in names):
        return
    pickled = [name for name in names if name.endswith(PICKLED)]
    gguf = [name for name in names if name.endswith(".gguf")]
    if pickled:
        what = (
            f"the parent's weights are pickled ({', '.join(pickled[:3])}); unpickling runs whatever is inside"
        )
        remedy = (
            "convert them once where you trust them: "
            "AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW) writes safetensors to NEW"
        )
    elif gguf:
        what, remedy = "the parent's weights are a GGUF file", f"give the file itself: {reference}/{gguf[0]}"
    elif any(name.startswith("adapter_") for name in names):
        what, remedy = "this is an adapter, not a model", "merge it into its base model and save that"
    else:
        what, remedy = "the parent has no weights", "give a folder with .safetensors files beside config.json"
    raise InputError(what, value=reference, where="parent", remedy=remedy)


def check_weight_files(folder: Path, reference: str) -> None:
    """Raise InputError if a safetensors file is truncated, foreign, or named by the index and absent."""
    named = {path.name for path in folder.glob("*.safetensors")}
    if (folder / INDEX).is_file():
        named |= _shards(_read_json(folder / INDEX, reference), reference)
    for name in sorted(named):
        problem = "it is missing" if not (folder / name).is_file() else _header_problem(folder / name)
        if problem:
            raise InputError(
                f"the parent's weights are damaged: {name}: {problem}",
                value=reference,
                where="parent",
                remedy="fetch the file again",
            )


def check_amount(folder: Path, parameters: int, reference: str) -> None:
    """Raise InputError if the weights hold fewer floats than the config describes: transformers would make
    room for all of them, whatever a damaged config says, before it names what is missing."""
    stored = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as weights:
            slices = [weights.get_slice(name) for name in weights.keys()]  # noqa: SIM118
            stored += sum(math.prod(part.get_shape()) for part in slices if part.get_dtype() in FLOATS)
    if stored < parameters:
        raise InputError(
            "the weights do not fit the config",
            value=f"{parameters:,} parameters in config.json, {stored:,} in the weights",
            where=reference,
            remedy="fetch the model again, config and weights from the same revision",
        )


def _shards(index: dict[str, Any], reference: str) -> set[str]:
    """The files that an index of weights names, each in the parent's own folder."""
    files = index.get("weight_map")
    names: set[str] = set()
    for name in files.values() if isinstance(files, dict) else [None]:
        if not isinstance(name, str) or Path(name).name != name or "\0" in name or len(name) > LONGEST_NAME:
            raise _refusal(
                f"{INDEX} does not map every tensor to a file beside it, but one to {short(repr(name))}",
                reference,
                "fetch the file again",
            )
        names.add(name)
    return names


def check_config(folder: Path, reference: str, trust_remote_code: bool) -> PreTrainedConfig:
    """The parsed config; raises InputError unless it is that of a causal language model in plain floats.

    Code that ships with the model is needed only where transformers does not know the model type.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise _refusal("there is no config.json", reference, "give a folder that save_pretrained has written")
    record = _read_json(path, reference)
    _check_counts(record, reference)
    model_type = str(record.get("model_type"))
    if "auto_map" in record and model_type not in CONFIG_MAPPING and not trust_remote_code:
        raise _refusal(
            f"the parent ({short(model_type)}) needs Python code that ships with it",
            reference,
            "read that code; if you trust it, set `trust_remote_code: true` in the recipe",
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (*BUILD_ERRORS, RecursionError) as error:
        reason = first_words(error)
        raise _refusal(
            f"config.json is not one that transformers understands: {reason}", reference, "mend it"
        ) from error
    _check_kind(config, record, reference)
    return config


def _check_counts(record: dict[str, Any], reference: str) -> None:
    """Raise InputError for a count that no model has: only to build it would hang, or take all memory."""
    for name, value in record.items():
        if isinstance(value, dict):
            _check_counts(value, reference)
        most = next((most for word, most in MOST.items() if word in name), None)
        if most and isinstance(value, int | float) and not abs(value) <= most:
            raise _refusal(
                f"config.json says {name}: {str(value)[:40]}, and no model has more than {most}",
                reference,
                "fetch the file again",
            )


def _check_kind(config: PreTrainedConfig, record: dict[str, Any], reference: str) -> None:
    """A causal language model, by its stated class or else by its config's class, and not quantised."""
    named = record.get("architectures") or []
    stated = [str(name) for name in (named if isinstance(named, list) else [named])]
    remote = "AutoModelForCausalLM" in (record.get("auto_map") or {})
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) & set(stated)
    if not remote and not (causal if stated else type(config) in MODEL_FOR_CAUSAL_LM_MAPPING):
        found = short(", ".join(stated) or config.model_type)
        raise _refusal(
            f"the parent is not a causal language model but {found}", reference, "choose one that is"
        )
    if getattr(config, "quantization_config", None):
        raise _refusal("the parent's weights are quantised", reference, "choose its release in bf16 or fp32")


def _read_json(path: Path, reference: str) -> dict[str, Any]:
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise _refusal(f"{path.name} is not JSON: {error}", reference, "fetch the file again") from error
    if not isinstance(content, dict):
        raise _refusal(f"{path.name} is not a JSON object", reference, "fetch the file again")
    return content


def _header_problem(path: Path) -> str:
    """Why a safetensors file cannot be read, or "": its header must match its length."""
    try:
        with safe_open(path, framework="pt"):
            return ""
    except (SafetensorError, OSError) as error:
        return str(error)


def _refusal(what: str, reference: str, remedy: str) -> InputError:
    return InputError(what, value=reference, where="parent", remedy=remedy)
