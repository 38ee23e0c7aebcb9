"""Broken corpus files and broken indexes of families, made from whole ones."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.faults.spoil import DEEP, nested

Content = dict[str, bytes]
LINES = [json.dumps({"text": f"Sentence {number} of a text. " * 3}) for number in range(20)]


def jsonl() -> bytes:
    """Twenty documents."""
    return "\n".join(LINES).encode() + b"\n"


def parquet() -> bytes:
    """Twenty documents."""
    table = pa.table({"text": [json.loads(line)["text"] for line in LINES], "number": list(range(20))})
    stream = pa.BufferOutputStream()
    pq.write_table(table, stream)
    return stream.getvalue().to_pybytes()


def corpora() -> Content:
    """Corpus files, every one of them broken, by name."""
    good = jsonl()
    deep = b"[" * DEEP + b"]" * DEEP
    return {
        "empty.jsonl": b"",
        "blank.jsonl": b"\n \n\t\n",
        "bare.jsonl": b"just words\n",
        "cut.jsonl": good[:-30],
        "comma.jsonl": good + b'{"text": "a",}\n',
        "quotes.jsonl": good + b"{'text': 'a'}\n",
        "latin.jsonl": good + b'{"text": "caf\xe9"}\n',
        "utf16.jsonl": good.decode().encode("utf-16"),
        "nul.jsonl": good + b"\x00" * 100,
        "array.json": b"[" + good.replace(b"\n", b",\n"),
        "numbers.jsonl": b'{"text": 1}\n{"text": 2}\n',
        "mixed.jsonl": b'{"text": "a"}\n{"text": 2}\n',
        "lists.jsonl": b'{"text": ["a"]}\n',
        "objects.jsonl": b'{"text": {"a": "b"}}\n',
        "nulls.jsonl": b'{"text": null}\n' * 3,
        "blanks.jsonl": b'{"text": " "}\n' * 3,
        "absent.jsonl": b'{"body": "a"}\n',
        "scalars.jsonl": b'"a"\n"b"\n',
        "deep.jsonl": b'{"text": ' + deep + b"}\n",
        "deep.json": deep,
        "deep_objects.jsonl": b'{"text": ' * 20_000 + b'"a"' + b"}" * 20_000 + b"\n",
        "surrogate.jsonl": b'{"text": "\\ud800"}\n',
        "twice.jsonl": b'{"text": "a", "text": "b"}\n',
        "nan.jsonl": b'{"text": NaN}\n',
        "not.jsonl.gz": good,
        "cut.jsonl.gz": gzip.compress(good, mtime=0)[:-20],
        "flipped.jsonl.gz": flipped_gzip(good),
        "header.jsonl.gz": gzip.compress(good, mtime=0)[:10],
        "empty.jsonl.gz": b"",
        "latin.txt": b"caf\xe9 " * 20,
        "utf16.txt": "a text".encode("utf-16"),
        "empty.txt": b"",
        "blank.txt": b" \n" * 9,
        **tables(),
    }


def flipped_gzip(data: bytes) -> bytes:
    """Compressed data that does not unpack."""
    packed = bytearray(gzip.compress(data, mtime=0))
    packed[len(packed) // 2] ^= 0xFF
    packed[-30] ^= 0xFF
    return bytes(packed)


def tables() -> Content:
    """Broken Parquet files."""
    good = parquet()
    footer = struct.unpack("<I", good[-8:-4])[0]
    longer = struct.pack("<I", 2**31 - 1)
    columns: dict[str, pa.Table] = {
        "numbers.parquet": pa.table({"text": [1, 2]}),
        "absent.parquet": pa.table({"body": ["a"]}),
        "none.parquet": pa.table({"text": pa.array([], pa.string())}),
        "nulls.parquet": pa.table({"text": pa.array([None, None], pa.string())}),
        "bytes.parquet": pa.table({"text": [b"\xff\xfe"]}),
        "lists.parquet": pa.table({"text": [["a"]]}),
        "no_columns.parquet": pa.table({}),
    }
    made = {}
    for name, table in columns.items():
        stream = pa.BufferOutputStream()
        pq.write_table(table, stream)
        made[name] = stream.getvalue().to_pybytes()
    return made | {
        "empty.parquet": b"",
        "magic.parquet": b"PAR1",
        "ends.parquet": b"PAR1PAR1",
        "text.parquet": jsonl(),
        "cut.parquet": good[: len(good) // 2],
        "headless.parquet": good[8:],
        "footer_length.parquet": good[:-8] + longer + good[-4:],
        "footer_cut.parquet": good[: -8 - footer // 2] + good[-8:],
        "footer_zero.parquet": good[: -8 - footer] + bytes(footer) + good[-8:],
        "footer_ones.parquet": good[: -8 - footer] + b"\xff" * footer + good[-8:],
        "pages.parquet": good[:4] + b"\xff" * (len(good) - 12 - footer) + good[-8 - footer :],
    }


def indexes(index: dict[str, Any]) -> dict[str, Any]:
    """Contents of a family.json that is wrong; bytes, or a tree."""
    wrong: list[Any] = [None, 3, "x", [], {}, [3], ["[/x]"], {"a": 1}]
    made: dict[str, Any] = {
        f"{name}={value!r}": index | {name: value}
        for name in ("parent", "stages", "artifacts", "ledger")
        for value in wrong
        if value or name != "stages"
    }
    rows = {
        f"stages.{name}={value!r}": index | {"stages": [index["stages"][0] | {name: value}]}
        for name, figure in index["stages"][0].items()
        if isinstance(figure, int | float) and not isinstance(figure, bool)
        for value in (None, "x", [1])
    }
    return (
        made
        | rows
        | {
            "empty": b"",
            "cut": json.dumps(index).encode()[:200],
            "list": [],
            "null": None,
            "object": {},
            "latin": b'{"\xe9": 1}',
            "deep": b"[" * DEEP,
            "deep value": index | {"stages": nested(150)},
            "digits": json.dumps(index).encode()[:-1] + b', "x": ' + b"9" * 5000 + b"}",
            "markup": index | {"family": "[/red]"},
            "surrogate": index | {"family": "\ud800"},
        }
    )


def whole_index(artifact: Path) -> dict[str, Any]:
    """A family.json as a build writes it, of one artifact."""
    figures = {"pruned_held_out_ce": 4.0, "held_out_ce": 3.0, "kl_to_parent": 0.4, "top1_agreement": 0.75}
    counts = {"parameters": 500, "tokens_per_second": 150.0, "tokens_trained": 4096, "seconds": 12.0}
    stage = {"name": "small", "checkpoint": "/nowhere", "reused": True, "race": [], **figures, **counts}
    cost = {
        "tokens": 10,
        "flops": 10**12,
        "student_flops": 10**12,
        "teacher_flops": 0,
        "seconds": 1.0,
        "bytes": 9,
    }
    node = {"name": "pruned", **cost}
    return {
        "family": "tiny",
        "parent": {"uri": "/nowhere", "parameters": 1000, "held_out_ce": 2.5, "tokens_per_second": 100.0},
        "stages": [stage],
        "extended": [],
        "controls": [],
        "ledger": {
            "entries": [{"name": "small", **cost, "nodes": [node]}],
            "family": {"name": "family", **cost},
            "controls": {"name": "controls", **cost},
            "floor_flops": 10**12,
            "separate_flops": 2 * 10**12,
            "over_floor": 1.0,
            "separate_over_family": 2.0,
        },
        "artifacts": [{"uri": str(artifact)}],
    }
