"""Cases for `tests.faults.trial`: every broken file there is, and whole ones spoiled at seeded places."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cascade.storage.artifacts import publish
from cascade.storage.locations import open_location
from cascade.storage.manifest import MANIFEST, Draft
from tests.faults import broken, broken_models
from tests.faults.spoil import damaged, spoiled_tree
from tests.faults.trial import Case
from tests.tiny import make_corpus, make_model, make_parent
from tests.tiny_family import tiny_tree
from tests.tiny_gguf import write_gguf

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
WEIGHTS, INDEX = "model.safetensors", "family.json"


@dataclass
class Whole:
    """What is whole: a parent as a folder and as a GGUF file, a corpus, an artifact; and where cases go."""

    folder: Path

    def __post_init__(self) -> None:
        self.parent = make_parent(self.folder / "parent", **SMALL)
        self.gguf = write_gguf(self.folder / "parent.gguf", make_model(vocab_size=259, **SMALL)).read_bytes()
        self.corpus = make_corpus(self.folder / "corpus.jsonl")
        work = self.folder / "work"
        work.mkdir()
        (work / "weights.bin").write_bytes(bytes(100))
        (work / "config.json").write_text("{}")
        self.artifact = self.folder / "store" / "tiny" / "small" / "pruned" / ("0" * 12)
        draft = Draft(kind="pruned", key="0" * 64, family="tiny", stage="small", facts={"loss": 1.5})
        publish(work, open_location(str(self.artifact)), draft)
        self.made = 0

    def place(self) -> Path:
        """A new folder for a case."""
        self.made += 1
        path = self.folder / "cases" / str(self.made)
        path.mkdir(parents=True)
        return path

    def file(self, name: str, kind: str, file: str, data: bytes) -> Case:
        """A case that is one file."""
        path = self.place() / file
        path.write_bytes(data)
        return Case(name, kind, str(path))

    def tree(self, name: str, file: str, content: Any) -> Case:
        """A parent with another file."""
        return Case(
            name,
            "load_parent",
            str(broken_models.spoiled_folder(self.parent, self.place() / "x", file, content)),
        )

    def family(self, name: str, content: Any) -> Case:
        """A family with this index."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        return Case(name, "show_family", str(Path(self.file(name, "", INDEX, data).path).parent))

    def stored(self, name: str, file: str, data: bytes) -> Case:
        """An artifact with another file."""
        return Case(
            name,
            "fetch_artifact",
            str(broken_models.spoiled_folder(self.artifact, self.place() / "x", file, data)),
        )

    def whole(self) -> Iterator[Case]:
        """Nothing is wrong with these."""
        yield Case("whole parent", "load_parent", str(self.parent))
        yield self.file("whole gguf", "load_parent", "parent.gguf", self.gguf)
        yield Case("whole corpus", "read_corpus", str(self.corpus))
        yield self.file("whole table", "read_corpus", "corpus.parquet", broken.parquet())
        yield Case("whole artifact", "fetch_artifact", str(self.artifact))
        yield self.family("whole family", broken.whole_index(self.artifact))
        yield self.file("whole recipe", "plan", "recipe.yaml", self.recipe())

    def recipe(self) -> bytes:
        """As a person writes it."""
        return yaml.safe_dump(tiny_tree(self.parent, self.corpus)).encode()

    def corpora(self) -> Iterator[Case]:
        """Broken corpus files."""
        for name, data in broken.corpora().items():
            yield self.file(f"corpus {name}", "read_corpus", name, data)

    def parents(self) -> Iterator[Case]:
        """Broken files of a Hugging Face folder."""
        for name, data in broken_models.weight_files((self.parent / WEIGHTS).read_bytes()).items():
            yield self.tree(f"weights {name}", WEIGHTS, data)
        for name, tensors in broken_models.missing_tensors(self.parent):
            target = broken_models.copy_of(self.parent, self.place() / "x", (WEIGHTS,))
            broken_models.write_tensors(target, tensors)
            yield Case(f"tensors {name}", "load_parent", str(target))
        made = {
            f"{WEIGHTS}.index.json": broken_models.weight_indexes(),
            "config.json": broken_models.configs(json.loads((self.parent / "config.json").read_text())),
            "tokenizer.json": broken_models.tokenizers(
                json.loads((self.parent / "tokenizer.json").read_text())
            ),
        }
        for file, contents in made.items():
            for name, content in contents.items():
                yield self.tree(f"{file} {name}", file, content)
        for file in ("config.json", "tokenizer.json", WEIGHTS):
            target = broken_models.copy_of(self.parent, self.place() / "x", (file,))
            yield Case(f"{file} absent", "load_parent", str(target))

    def ggufs(self) -> Iterator[Case]:
        """Broken GGUF files."""
        for name, data in broken_models.gguf_files(self.gguf).items():
            yield self.file(f"gguf {name}", "load_parent", "parent.gguf", data)

    def endless(self) -> Iterator[Case]:
        """Files without an end."""
        yield Case("endless recipe", "load_recipe", "/dev/zero")

    def families(self) -> Iterator[Case]:
        """Broken indexes."""
        for name, content in broken.indexes(broken.whole_index(self.artifact)).items():
            yield self.family(f"index {name}", content)

    def spoiled(self, count: int, seed: int) -> Iterator[Case]:
        """`count` of every kind of file, with bytes changed at seeded places, and as many trees."""
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS):
            data = (self.parent / file).read_bytes()
            near = 4096 if file == WEIGHTS else None
            for name, content in damaged(data, count, seed, near):
                yield self.tree(f"{file} {name}", file, content)
        for name, content in damaged(self.gguf, count, seed, near=8192):
            yield self.file(f"gguf {name}", "load_parent", "parent.gguf", content)
        tables = {"x.jsonl": broken.jsonl(), "x.parquet": broken.parquet()}
        tables["x.jsonl.gz"] = gzip.compress(broken.jsonl(), mtime=0)
        for file, data in tables.items():
            for name, content in damaged(data, count, seed):
                yield self.file(f"{file} {name}", "read_corpus", file, content)
        manifest = (self.artifact / MANIFEST).read_bytes()
        for name, content in damaged(manifest, count, seed):
            yield self.stored(f"manifest {name}", MANIFEST, content)
        for name, content in damaged(json.dumps(broken.whole_index(self.artifact)).encode(), count, seed):
            yield self.family(f"index {name}", content)
        for name, content in damaged(self.recipe(), count, seed):
            yield self.file(f"recipe {name}", "load_recipe", "recipe.yaml", content)
        yield from self.spoiled_trees(count, seed, manifest)

    def spoiled_trees(self, count: int, seed: int, manifest: bytes) -> Iterator[Case]:
        """JSON and YAML that is well formed, and says something else."""
        draw = random.Random(seed)
        for file in ("config.json", "tokenizer_config.json", "tokenizer.json"):
            whole = json.loads((self.parent / file).read_text())
            for number in range(count):
                name, tree = spoiled_tree(whole, draw, 1 + number % 2)
                yield self.tree(f"{file} {name}", file, tree)
        for number in range(count):
            name, tree = spoiled_tree(json.loads(manifest), draw, 1 + number % 2)
            yield self.stored(f"manifest {name}", MANIFEST, json.dumps(tree).encode())
        for number in range(count):
            name, tree = spoiled_tree(broken.whole_index(self.artifact), draw, 1 + number % 2)
            yield self.family(f"index {name}", tree)
        for number in range(count):
            name, tree = spoiled_tree(tiny_tree(self.parent, self.corpus), draw, 1 + number % 2)
            data = yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")
            yield self.file(f"plan {name}", "plan", "recipe.yaml", data)
