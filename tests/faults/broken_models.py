"""Broken files of models, made from whole ones: safetensors, config.json, tokenizer.json, GGUF."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tests.faults.spoil import DEEP, nested

Content = dict[str, bytes]


def with_header(header: Any, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file; length: what the first eight bytes say, if that is a lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def parts_of(weights: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    size = struct.unpack("<Q", weights[:8])[0]
    return json.loads(weights[8 : 8 + size]), weights[8 + size :]


def changed(header: dict[str, Any], number: int, **fields: Any) -> dict[str, Any]:
    """The header with other fields for one tensor."""
    name = [key for key in header if key != "__metadata__"][number]
    return header | {name: header[name] | fields}


def weight_files(weights: bytes) -> Content:
    """Broken safetensors files, by what is wrong."""
    header, data = parts_of(weights)
    names = [key for key in header if key != "__metadata__"]
    first, second = header[names[0]], header[names[1]]
    begin, end = first["data_offsets"]
    return {
        "empty": b"",
        "short": weights[:7],
        "header_cut": weights[:60],
        "data_cut": weights[:-1],
        "data_more": weights + b"\x00",
        "length_zero": with_header(header, data, 0),
        "length_one": with_header(header, data, 1),
        "length_huge": with_header(header, data, 2**64 - 1),
        "length_gigabytes": with_header(header, data, 2**34),
        "length_limit": with_header(header, data, 99_999_999),
        "header_empty": with_header({}, b""),
        "header_list": with_header([], b""),
        "header_words": with_header(b"what is this", b""),
        "header_latin": with_header(b'{"\xe9": 1}', b""),
        "header_deep": with_header(b'{"a":' * 5000 + b"1" + b"}" * 5000, b""),
        "header_twice": with_header(
            json.dumps(header).encode()[:-1] + b"," + json.dumps(header).encode()[1:], data
        ),
        "pickle": b"\x80\x02}q\x00." + bytes(100),
        "overlap": with_header(
            changed(
                header, 1, data_offsets=[begin, begin + second["data_offsets"][1] - second["data_offsets"][0]]
            ),
            data,
        ),
        "hole": with_header(header | {names[0]: first | {"data_offsets": [begin + 4, end + 4]}}, data),
        "backwards": with_header(changed(header, 0, data_offsets=[end, begin]), data),
        "negative": with_header(changed(header, 0, data_offsets=[-4, end]), data),
        "beyond": with_header(changed(header, 0, data_offsets=[begin, 2**40]), data),
        "shape_huge": with_header(changed(header, 0, shape=[2**40, 2**40]), data),
        "shape_overflow": with_header(changed(header, 0, shape=[2**32, 2**32, 2]), data),
        "shape_negative": with_header(changed(header, 0, shape=[-1, 2]), data),
        "shape_words": with_header(changed(header, 0, shape="large"), data),
        "shape_flat": with_header(changed(header, 0, shape=[(end - begin) // 4]), data),
        "shape_turned": with_header(
            changed(
                header, 0, shape=first["shape"][::-1] if len(first["shape"]) > 1 else [1, *first["shape"]]
            ),
            data,
        ),
        "dtype_unknown": with_header(changed(header, 0, dtype="F17"), data),
        "dtype_smaller": with_header(changed(header, 0, dtype="F16"), data),
        "dtype_integer": with_header(changed(header, 0, dtype="I32"), data),
        "dtype_number": with_header(changed(header, 0, dtype=3), data),
        "renamed": with_header(
            {f"{name}_" if name == names[0] else name: entry for name, entry in header.items()}, data
        ),
        "metadata_number": with_header(header | {"__metadata__": {"format": 1}}, data),
    }


def missing_tensors(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Whole safetensors files with the wrong tensors in them."""
    tensors = load_file(folder / "model.safetensors")
    names = list(tensors)
    for name in names[:4]:
        yield f"without {name}", {key: value for key, value in tensors.items() if key != name}
        yield f"half of {name}", tensors | {name: tensors[name][: len(tensors[name]) // 2].clone()}
    yield "no tensor", {}
    yield "one more", tensors | {"model.extra.weight": tensors[names[0]].clone()}
    yield (
        "one more layer",
        tensors
        | {
            key.replace("layers.0.", "layers.9."): value.clone()
            for key, value in tensors.items()
            if "layers.0." in key
        },
    )
    yield "integers", {key: value.int() for key, value in tensors.items()}
    yield "no number", tensors | {names[0]: tensors[names[0]] * float("nan")}


def write_tensors(folder: Path, tensors: dict[str, Any]) -> None:
    """In place of the folder's weights."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def weight_indexes() -> dict[str, Any]:
    """What may be in model.safetensors.index.json, all of it wrong."""
    return {
        "empty": b"",
        "cut": b'{"weight_map": {',
        "list": [],
        "no map": {},
        "map of words": {"weight_map": "model.safetensors"},
        "map of lists": {"weight_map": []},
        "map of numbers": {"weight_map": {"a": 3}},
        "map of null": {"weight_map": {"a": None}},
        "absent shard": {"weight_map": {"model.embed_tokens.weight": "model-2.safetensors"}},
        "shard elsewhere": {"weight_map": {"model.embed_tokens.weight": "../model.safetensors"}},
        "absolute shard": {"weight_map": {"model.embed_tokens.weight": "/etc/passwd"}},
        "nul": {"weight_map": {"model.embed_tokens.weight": "a\x00b"}},
        "long name": {"weight_map": {"model.embed_tokens.weight": "a" * 5000}},
        "folder": {"weight_map": {"model.embed_tokens.weight": "."}},
        "latin": b'{"\xe9": 1}',
        "deep": b"[" * DEEP,
        "deep map": {"weight_map": {"a": nested(50)}},
    }


def configs(config: dict[str, Any]) -> dict[str, Any]:
    """Contents of a config.json that is wrong; bytes, or a tree."""
    fields: dict[str, list[Any]] = {
        "model_type": [None, "", "unheard-of", 3, [], {}, "bert", "../llama"],
        "architectures": [3, [3], [None], ["BertModel"], {"a": 1}],
        "hidden_size": [0, -64, 63, 10**12, "large", None, 1.5, [64], True],
        "num_hidden_layers": [0, -1, 3, 10**9, 10**18, "two", None, 1.5, [2]],
        "num_attention_heads": [0, -1, 3, 10**9, None, "x"],
        "num_key_value_heads": [0, -1, 3, 10**9, "x"],
        "head_dim": [0, -1, 10**9, "x", 7],
        "intermediate_size": [0, -1, 10**12, None, "x", [1, 2]],
        "vocab_size": [0, -1, 10, 10**12, None, "x"],
        "rms_norm_eps": ["x", None, "1e400"],
        "hidden_act": ["unheard-of", None, 3],
        "tie_word_embeddings": [False, "x", 3],
        "max_position_embeddings": [None, "x"],
        "rope_parameters": [
            3,
            "x",
            {"rope_type": "unheard-of"},
            {"rope_type": "yarn"},
            {"rope_theta": "x"},
            {"rope_type": "default", "rope_theta": 0},
        ],
        "dtype": ["unheard-of", 3, "int8", "float8"],
        "auto_map": [3],
        "quantization_config": [{"quant_method": "gptq"}, {"quant_method": "unheard-of"}, 3],
        "layer_types": [["full_attention"] * 9, 3, ["unheard-of", "unheard-of"]],
    }
    made: dict[str, Any] = {
        f"{name}={str(value)[:30]!r}": config | {name: value}
        for name, values in fields.items()
        for value in values
    }
    return made | {
        "empty": b"",
        "cut": json.dumps(config).encode()[:50],
        "list": [],
        "null": None,
        "no type": {key: value for key, value in config.items() if key != "model_type"},
        "latin": b'{"model_type": "\xe9"}',
        "deep": b"[" * DEEP,
        "deep value": json.dumps(config).encode()[:-1] + b', "x": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        "digits": json.dumps(config).encode()[:-1] + b', "x": ' + b"9" * 5000 + b"}",
    }


def tokenizers(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Contents of a tokenizer.json that is wrong; bytes, or a tree."""
    model = tokenizer["model"]
    vocabulary = model["vocab"]
    more = {f"extra {number}": number for number in range(258, 5000)}
    return {
        "empty": b"",
        "cut": json.dumps(tokenizer).encode()[:500],
        "list": [],
        "null": None,
        "object": {},
        "latin": b'{"\xe9": 1}',
        "deep": b"[" * DEEP,
        "no model": {key: value for key, value in tokenizer.items() if key != "model"},
        "model of words": tokenizer | {"model": "BPE"},
        "type": tokenizer | {"model": model | {"type": "unheard-of"}},
        "no vocabulary": tokenizer | {"model": model | {"vocab": {}}},
        "vocabulary of words": tokenizer | {"model": model | {"vocab": "a b c"}},
        "vocabulary of lists": tokenizer | {"model": model | {"vocab": [["a", 1]]}},
        "negative id": tokenizer | {"model": model | {"vocab": vocabulary | {"a": -1}}},
        "huge id": tokenizer | {"model": model | {"vocab": vocabulary | {"a": 2**32 - 1}}},
        "larger than the embedding": tokenizer | {"model": model | {"vocab": vocabulary | more}},
        "one past the embedding": tokenizer | {"model": model | {"vocab": vocabulary | {"past": 5000}}},
        "merges": tokenizer | {"model": model | {"merges": ["a zz", "q"]}},
        "merges of numbers": tokenizer | {"model": model | {"merges": [1, 2]}},
        "pre-tokenizer": tokenizer | {"pre_tokenizer": {"type": "unheard-of"}},
        "decoder": tokenizer | {"decoder": 3},
        "added": tokenizer | {"added_tokens": [{"id": "x"}]},
        "pattern": tokenizer
        | {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "("},
                "behavior": "Isolated",
                "invert": False,
            }
        },
    }


def gguf_files(data: bytes) -> Content:
    """Broken GGUF files, by what is wrong; the fields are where `tests.tiny_gguf` puts them."""

    def number(at: int, value: int, size: int) -> bytes:
        return data[:at] + value.to_bytes(size, "little") + data[at + size :]

    def after(name: bytes) -> int:
        return data.index(name) + len(name)

    tokens, blocks = after(b"tokenizer.ggml.tokens"), after(b"llama.block_count")
    shape = after(b"token_embd.weight")
    kind = shape + 4 + 16
    huge = {"ones": 2**64 - 1, "half": 2**63 - 1, "billions": 2**40, "more": 10_000}
    lies = {
        f"{what} {name}": number(at, value, 8)
        for name, value in huge.items()
        for what, at in {
            "tensors": 8,
            "fields": 16,
            "length of a name": 24,
            "tokens": tokens + 8,
            "length of a token": tokens + 16,
            "rows": shape + 4,
            "columns": shape + 12,
            "offset": kind + 4,
        }.items()
    }
    kinds = {f"quantisation {value}": number(kind, value, 4) for value in (4, 5, 31, 99, 2**32 - 1)}
    fitting = {f"other quantisation {value}": number(kind, value, 4) for value in (1, 2, 8, 12, 24)}
    return {
        **lies,
        **kinds,
        **fitting,
        "empty": b"",
        "short": data[:3],
        "magic": b"GGML" + data[4:],
        "magic alone": data[:4],
        "version 0": number(4, 0, 4),
        "version 1": number(4, 1, 4),
        "version 99": number(4, 99, 4),
        "no tensors": number(8, 0, 8),
        "no fields": number(16, 0, 8),
        "type of a field": number(blocks, 77, 4),
        "layers 0": number(blocks + 4, 0, 4),
        "layers more": number(blocks + 4, 5, 4),
        "layers billions": number(blocks + 4, 2**32 - 1, 4),
        "type of an array": number(tokens + 4, 9, 4),
        "dimensions 0": number(shape, 0, 4),
        "dimensions 99": number(shape, 99, 4),
        "heads 0": number(after(b"llama.attention.head_count") + 4, 0, 4),
        "heads billions": number(after(b"llama.attention.head_count") + 4, 2**32 - 1, 4),
        "hidden billions": number(after(b"llama.embedding_length") + 4, 2**32 - 1, 4),
        "ffn billions": number(after(b"llama.feed_forward_length") + 4, 2**32 - 1, 4),
        "vocabulary billions": number(after(b"llama.vocab_size") + 4, 2**32 - 1, 4),
        "head size billions": number(after(b"llama.rope.dimension_count") + 4, 2**32 - 1, 4),
        "architecture": data.replace(
            b"\x05\x00\x00\x00\x00\x00\x00\x00llama", b"\x05\x00\x00\x00\x00\x00\x00\x00xlama"
        ),
        "tokenizer": data.replace(b"gpt2", b"gpt9"),
        "name": data.replace(b"token_embd", b"token_\xff\xfe\xfd\xfc"),
        "renamed tensor": data.replace(b"blk.0.attn_q.weight", b"blk.0.attn_x.weight"),
        "tensor twice": data.replace(b"blk.0.attn_k.weight", b"blk.0.attn_v.weight"),
        "cut in the data": data[:-1],
        "cut in the head": data[: len(data) // 8],
        "safetensors": with_header({}, b""),
        "zip": b"PK\x03\x04" + bytes(100),
    }


def copy_of(folder: Path, target: Path, without: tuple[str, ...] = ()) -> Path:
    """A Hugging Face folder whose files are links to those of another one, but for some."""
    target.mkdir(parents=True)
    for path in folder.iterdir():
        if path.name not in without:
            (target / path.name).symlink_to(path)
    return target


def spoiled_folder(folder: Path, target: Path, name: str, content: Any) -> Path:
    """A copy in which one file has another content: bytes, or what JSON makes of a tree."""
    copy_of(folder, target, without=(name,))
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (target / name).write_bytes(data)
    return target
