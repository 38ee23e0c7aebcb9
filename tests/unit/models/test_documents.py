"""The check finds a model that lets a document see the one before it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cascade.errors import InputError
from cascade.models import documents
from cascade.models.documents import check_documents_apart
from tests.tiny import make_model
from tests.unit.distillation.teaching import make_rows

END = 256


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_keeps_documents_apart_passes(family: str, dtype: torch.dtype) -> None:
    overrides = {"num_key_value_heads": None, "head_dim": None} if family != "llama" else {}
    model = make_model(family, **overrides).to(dtype)
    check_documents_apart(model, replace(make_rows(), end_of_text=END))


def test_a_leak_is_refused_unless_a_row_is_one_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaking(model: PreTrainedModel, positions_BT: Tensor) -> dict[str, Any]:
        return {"position_ids": positions_BT, "attention_mask": torch.ones_like(positions_BT)}

    monkeypatch.setattr(documents, "documents_apart", leaking)
    with pytest.raises(InputError, match="see the one before") as caught:
        check_documents_apart(make_model(), replace(make_rows(), end_of_text=END))
    assert "llama" in str(caught.value)
    assert "separate_documents: false" in str(caught.value)
    check_documents_apart(make_model(), make_rows())
