"""Nothing is ever unpickled: no code of ours can, and no form in which a parent is given gets that far."""

from __future__ import annotations

import ast
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

import cascade
import flows
from cascade.errors import CascadeError, InputError
from cascade.models import hub
from cascade.models.sources import load_model, resolve_parent
from cascade.storage.locations import open_location

SOURCES = [path for package in (cascade, flows) for path in Path(str(package.__file__)).parent.rglob("*.py")]
# Each can run code that lies in what it reads.
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CALLS = {"torch.load", "torch.jit.load", "numpy.load", "np.load", "yaml.unsafe_load", "yaml.full_load"}
BUILTINS = {"eval", "exec", "compile", "__import__"}


def names(tree: ast.AST) -> Iterator[str]:
    """What a module imports, and by dotted name what it calls."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module).split(".")[0]
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def forbidden(code: str) -> set[str]:
    """What of a module could run code out of data."""
    return set(names(ast.parse(code))) & (UNPICKLERS | CALLS | BUILTINS)


@pytest.mark.parametrize(
    "code", ["import pickle", "from pickle import loads", "import torch\ntorch.load('x')", "eval('1')"]
)
def test_the_search_finds_what_it_looks_for(code: str) -> None:
    assert forbidden(code)


def test_no_module_of_ours_can_unpickle() -> None:
    assert len(SOURCES) > 100
    assert {path.name: found for path in SOURCES if (found := forbidden(path.read_text("utf-8")))} == {}


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.place,)


@pytest.fixture
def sprung(tmp_path: Path) -> Path:
    """What the trap makes."""
    return tmp_path / "sprung"


@pytest.fixture(params=["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt"])
def trapped(request: pytest.FixtureRequest, tiny_parent: Path, sprung: Path, tmp_path: Path) -> Path:
    """A parent whose weights are such a trap."""
    folder = Path(shutil.copytree(tiny_parent, tmp_path / "trapped"))
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Trap(sprung)}, folder / request.param)
    return folder


def from_folder(trapped: Path, request: pytest.FixtureRequest) -> str:
    return str(trapped)


def from_bucket(trapped: Path, request: pytest.FixtureRequest) -> str:
    place = open_location(request.getfixturevalue("s3"))
    for path in trapped.iterdir():
        (place / path.name).upload(path)
    return place.uri


def from_package(trapped: Path, request: pytest.FixtureRequest) -> str:
    package = trapped.parent / "trapped_package"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copytree(trapped, package / "weights")
    request.getfixturevalue("monkeypatch").syspath_prepend(trapped.parent)
    return "package:trapped_package/weights"


def from_hub(trapped: Path, request: pytest.FixtureRequest) -> str:
    """Only the network's answers are made up."""
    monkeypatch, cache = request.getfixturevalue("monkeypatch"), trapped.parent / ("c0ffee" * 6 + "c0ff")
    files = [path.name for path in trapped.iterdir()]

    def download(name: str, *, revision: str | None, **patterns: list[str]) -> str:
        cache.mkdir(exist_ok=True)
        for wanted in filter_repo_objects(files, **patterns):
            shutil.copy(trapped / wanted, cache / wanted)
        return str(cache)

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.setattr(hub.HfApi, "list_repo_files", lambda api, name, revision: files)
    return "someone/trapped"


@pytest.mark.parametrize("form", [from_folder, from_bucket, from_package, from_hub])
def test_pickled_weights_are_refused_unread_with_the_way_to_convert_them(
    form: Callable[[Path, pytest.FixtureRequest], str],
    trapped: Path,
    sprung: Path,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    reference = form(trapped, request)
    with pytest.raises(InputError, match="weights are pickled") as caught:
        resolve_parent(reference, cache=tmp_path / "cache")
    assert caught.value.value == reference
    assert "save_pretrained(NEW) writes safetensors" in caught.value.remedy
    assert not sprung.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf"])
def test_a_pickle_under_another_name_is_damaged_weights_and_stays_unread(
    name: str, tiny_parent: Path, sprung: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_parent, tmp_path / "parent"))
    (folder / name).write_bytes(pickle.dumps(Trap(sprung)))
    reference = folder if name == "model.safetensors" else folder / name
    with pytest.raises(InputError):
        resolve_parent(str(reference), cache=tmp_path / "cache")
    assert not sprung.exists()


def test_pickles_that_an_index_names_or_that_lie_beside_safetensors_stay_unread(
    tiny_parent: Path, sprung: Path, tmp_path: Path
) -> None:
    """transformers would open what the index names."""
    folder = Path(shutil.copytree(tiny_parent, tmp_path / "parent"))
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "rng_state.pth"):
        torch.save(Trap(sprung), folder / name)
    load_model(resolve_parent(str(folder), cache=tmp_path / "cache"))
    index = '{"metadata": {}, "weight_map": {"model.norm.weight": "pytorch_model.bin"}}'
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CascadeError):
        load_model(resolve_parent(str(folder), cache=tmp_path / "cache"))
    assert not sprung.exists()


def test_the_trap_would_be_sprung(sprung: Path) -> None:
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists()


@pytest.mark.parametrize("trusted", [False, True])
def test_code_that_ships_with_a_model_runs_only_when_asked_for(
    trusted: bool, tiny_parent: Path, sprung: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_parent, tmp_path / "parent"))
    code = f"""
from pathlib import Path
from transformers import LlamaConfig
Path({str(sprung)!r}).touch()
class OddConfig(LlamaConfig):
    model_type = "odd-of-{tmp_path.name}"
"""
    (folder / "configuration_odd.py").write_text(code)
    text = (folder / "config.json").read_text().replace('"llama"', f'"odd-of-{tmp_path.name}"')
    remote = '{"AutoConfig": "configuration_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.Odd"},'
    (folder / "config.json").write_text('{"auto_map": ' + remote + text.lstrip().removeprefix("{"))
    if not trusted:
        with pytest.raises(InputError, match="needs Python code") as caught:
            resolve_parent(str(folder), cache=tmp_path / "cache")
        assert "trust_remote_code: true" in caught.value.remedy
    else:
        resolve_parent(str(folder), trust_remote_code=True, cache=tmp_path / "cache")
    assert sprung.exists() is trusted
