"""The gate passes a sound folder and names what is wrong with each unsound one."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cascade.errors import CascadeError
from cascade.evaluation import gate as gate_module
from cascade.evaluation import stock_check
from cascade.evaluation.gate import SCRIPT, gate
from tests.tiny import make_parent

PARAMETERS = 164_544
"""Of tests.tiny's parent: 258 x 64 embeddings, 4 layers of 36,992 (12,288 attention, 24,576 FFN, 128
norm gains) and a final norm of 64."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_parent(tmp_path / "model")


def test_a_sound_folder_passes_with_its_figures(folder: Path) -> None:
    figures = gate(folder, PARAMETERS)
    assert figures["parameters"] == PARAMETERS
    assert figures["tied_in_memory"] is True
    assert figures["finite"] is True
    assert figures["same_generation"] is True
    assert figures["new_tokens"] == 16
    assert figures["cached_difference"] < 1e-4
    assert json.loads(json.dumps(figures)) == figures


def test_the_script_imports_nothing_of_ours() -> None:
    imports = [node for node in ast.walk(ast.parse(SCRIPT.read_text())) if isinstance(node, ast.Import)]
    imports_from = [
        node for node in ast.walk(ast.parse(SCRIPT.read_text())) if isinstance(node, ast.ImportFrom)
    ]
    names = {alias.name for node in imports for alias in node.names} | {node.module for node in imports_from}
    assert names == {"gc", "json", "logging", "os", "sys", "typing", "warnings", "torch", "transformers"}


def change_weights(folder: Path, change: Callable[[dict], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_missing_tensor_is_a_warning_and_fails(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CascadeError, match="no warning") as caught:
        gate(folder, PARAMETERS)
    assert "up_proj" in str(caught.value)


def test_a_folder_that_does_not_load_fails_with_the_reason(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    with pytest.raises(CascadeError, match="loads and runs") as caught:
        gate(folder, PARAMETERS)
    assert "config.json" in str(caught.value)


def test_weights_that_are_not_finite_are_seen(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    assert stock_check.figures(str(folder))["finite"] is False


def test_embeddings_that_came_apart_are_seen(tmp_path: Path) -> None:
    """A model whose tie was cut while its config still claims one: both tensors are in the file."""
    apart = make_parent(tmp_path / "apart", tie_word_embeddings=False)
    config = json.loads((apart / "config.json").read_text())
    (apart / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    figures = stock_check.figures(str(apart))
    assert (figures["tied_in_config"], figures["tied_in_memory"]) == (True, False)


SOUND = {
    "parameters": 10,
    "tied_in_config": True,
    "tied_in_memory": True,
    "finite": True,
    "cached_difference": 1e-6,
    "same_generation": True,
    "new_tokens": 16,
    "vocabulary_fits": True,
}


@pytest.mark.parametrize(
    ("change", "check"),
    [
        ({"parameters": 11}, "parameter count"),
        ({"tied_in_memory": False}, "tied embeddings"),
        ({"tied_in_config": False}, "tied embeddings"),
        ({"finite": False}, "finite"),
        ({"cached_difference": 0.1}, "cached logits"),
        ({"cached_difference": float("nan")}, "cached logits"),
        ({"same_generation": False}, "cached generation"),
        ({"new_tokens": 0}, "cached generation"),
        ({"vocabulary_fits": False}, "tokenizer"),
    ],
)
def test_every_figure_is_judged(
    change: dict[str, object], check: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a script that prints the figures, since a stock model cannot be made to fail each of them."""
    for figures in (SOUND, {**SOUND, **change}):
        script = tmp_path / "figures.py"
        line = json.dumps(figures)
        script.write_text(f"import sys; print({gate_module.READY!r}, file=sys.stderr); print({line!r})")
        monkeypatch.setattr(gate_module, "SCRIPT", script)
        if figures == SOUND:
            assert gate(tmp_path, 10) == SOUND
            continue
        with pytest.raises(CascadeError, match=check):
            gate(tmp_path, 10)
