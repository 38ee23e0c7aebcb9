"""Hub parents: the code paths are real, only the network's answers are made up."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects, httpx

from cascade.errors import CascadeError, InputError, StorageFault
from cascade.models import hub
from cascade.models.folders import load_folder
from cascade.models.sources import load_config, load_model, load_tokenizer, resolve_parent

COMMIT = "c0ffee" * 6 + "c0ff"
RESPONSE = httpx.Response(401, request=httpx.Request("GET", "https://hub.invalid/?token=hf_secret"))


class FakeHub:
    """Serves one repository's files into a cache folder, as `snapshot_download` would."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository, self.folder = repository, cache / "snapshots" / COMMIT
        self.asked: list[tuple[str, str | None]] = []

    def snapshot_download(
        self, name: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        self.asked.append((name, revision))
        self.folder.mkdir(parents=True, exist_ok=True)
        wanted = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        for path in filter_repo_objects(self.names(), **wanted):
            (self.folder / path).parent.mkdir(exist_ok=True)
            shutil.copy(self.repository / path, self.folder / path)
        return str(self.folder)

    def names(self) -> list[str]:
        files = (path for path in self.repository.rglob("*") if path.is_file())
        return [str(path.relative_to(self.repository)) for path in files]


@pytest.fixture
def fake(tiny_parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    repository = Path(shutil.copytree(tiny_parent, tmp_path / "repository"))
    server = FakeHub(repository, tmp_path / "hub")
    monkeypatch.setattr(hub, "snapshot_download", server.snapshot_download)
    monkeypatch.setattr(hub.HfApi, "list_repo_files", lambda api, name, revision: server.names())
    return server


def failing(error: Exception, cause: Exception | None = None) -> Callable[..., str]:
    def fail(*given: object, **named: object) -> str:
        raise error from cause

    return fail


def test_a_hub_parent_is_pinned_and_its_weights_come_last(
    fake: FakeHub, tiny_parent: Path, tmp_path: Path
) -> None:
    source = resolve_parent("someone/tiny@v1", cache=tmp_path)
    assert (source.form, source.path) == ("hub", "someone/tiny")
    assert (source.revision, source.fingerprint) == (COMMIT, COMMIT)
    assert not list(fake.folder.glob("*.safetensors"))
    assert load_config(source).hidden_size == 64
    assert load_tokenizer(source)("ab").input_ids == [64, 65]
    pairs = zip(load_model(source).parameters(), load_folder(tiny_parent).parameters(), strict=True)
    assert all(torch.equal(left, right) for left, right in pairs)
    assert fake.asked == [("someone/tiny", "v1"), ("someone/tiny", COMMIT)]


def test_other_forms_of_the_model_in_subfolders_stay_on_the_hub(fake: FakeHub, tmp_path: Path) -> None:
    (fake.repository / "onnx").mkdir()
    (fake.repository / "onnx" / "config.json").write_text("{}")
    (fake.repository / "onnx" / "model.bin").write_bytes(b"never opened")
    load_model(resolve_parent("someone/tiny", cache=tmp_path))
    assert not (fake.folder / "onnx").exists()


def test_code_is_fetched_only_when_trusted(fake: FakeHub, tmp_path: Path) -> None:
    (fake.repository / "modeling_odd.py").write_text("raise RuntimeError\n")
    resolve_parent("someone/tiny", cache=tmp_path)
    assert not (fake.folder / "modeling_odd.py").exists()
    resolve_parent("someone/tiny", trust_remote_code=True, cache=tmp_path)
    assert (fake.folder / "modeling_odd.py").exists()


def test_pickled_weights_on_the_hub_are_refused_before_a_download(fake: FakeHub, tmp_path: Path) -> None:
    (fake.repository / "model.safetensors").rename(fake.repository / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickled"):
        resolve_parent("someone/tiny", cache=tmp_path)


def test_without_a_list_of_files_pickled_weights_are_refused_at_the_download(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fake.repository / "model.safetensors").rename(fake.repository / "pytorch_model.bin")
    monkeypatch.setattr(hub.HfApi, "list_repo_files", failing(httpx.ConnectError("down")))
    source = resolve_parent("someone/tiny", cache=tmp_path)
    with pytest.raises(InputError, match="no weights"):
        load_model(source)


@pytest.mark.parametrize(
    ("error", "cause", "reason"),
    [
        (GatedRepoError("gated hf_secret", response=RESPONSE), None, "gated"),
        (RepositoryNotFoundError("absent hf_secret", response=RESPONSE), None, "no such model"),
        (RevisionNotFoundError("absent hf_secret", response=RESPONSE), None, "no revision v1"),
        (
            LocalEntryNotFoundError("hf_secret"),
            httpx.ConnectError("down"),
            r"cannot be reached \(ConnectError\)",
        ),
        (LocalEntryNotFoundError("hf_secret"), OfflineModeIsEnabled("off"), "OfflineModeIsEnabled"),
        (httpx.ProxyError("http://user:hf_secret@proxy"), None, r"cannot be reached \(ProxyError\)"),
    ],
)
def test_every_fault_is_an_input_error_without_a_secret(
    error: Exception, cause: Exception | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "snapshot_download", failing(error, cause))
    with pytest.raises(InputError, match=reason) as caught:
        resolve_parent("someone/tiny@v1", cache=tmp_path)
    assert caught.value.remedy
    assert "hf_secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("cause", "kind"),
    [(httpx.ReadTimeout("slow"), StorageFault), (OfflineModeIsEnabled("off"), InputError)],
)
def test_a_network_that_fails_under_the_weights_may_be_tried_again(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: Exception, kind: type[CascadeError]
) -> None:
    source = resolve_parent("someone/tiny", cache=tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", failing(LocalEntryNotFoundError("half"), cause))
    with pytest.raises(CascadeError) as caught:
        load_model(source)
    assert type(caught.value) is kind


def test_the_hubs_own_offline_switch_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is replaced here: the library itself refuses to reach out."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="cannot be reached"):
        resolve_parent("someone/tiny", cache=tmp_path)
