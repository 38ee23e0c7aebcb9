"""Stored signals are the live teacher's, up to the codec, and refuse what they were not made for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from cascade.distillation.signals import OnlineTeacher, Part, StoredTeacher, write_signals, writing
from cascade.distillation.states import check_head, final_states, head_of
from cascade.errors import CascadeError, InputError
from tests.tiny import make_model
from tests.unit.distillation.teaching import LENGTH, make_rows, make_student, make_teacher


def test_online_states_times_the_head_are_the_logits() -> None:
    model, corpus = make_teacher(), make_rows()
    teacher = OnlineTeacher(model, corpus)
    with torch.no_grad():
        logits = model(input_ids=corpus.train[[5, 2]].long()).logits
    torch.testing.assert_close(teacher.targets(Part.TRAIN, [5, 2]).logits(), logits[:, :-1].flatten(0, 1))
    assert not teacher.head.weight.requires_grad


def test_stored_states_are_the_online_ones_in_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, corpus = make_teacher(), make_rows()
    width = head_of(model).width
    monkeypatch.setattr(writing, "SHARD_BYTES", 4 * LENGTH * width * 2)
    monkeypatch.setattr(writing, "BATCH_TOKENS", 3 * LENGTH)
    record = write_signals(model, corpus, tmp_path, rows=10, held_out_rows=3)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert shards == ["held_out-00000.safetensors", *(f"train-0000{n}.safetensors" for n in range(3))]
    with safe_open(tmp_path / "train-00002.safetensors", framework="pt") as file:
        assert file.get_slice("hidden").get_shape() == [2, LENGTH, width]
    assert record == json.loads((tmp_path / "signals.json").read_text())
    files = sum(path.stat().st_size for path in tmp_path.glob("train-*"))
    assert record["bytes_per_token"] == round(files / (10 * LENGTH), 3)
    stored = StoredTeacher(tmp_path, head_of(model), corpus.identity)
    online = OnlineTeacher(model, corpus)
    for part, rows in ((Part.TRAIN, [9, 0, 4, 4]), (Part.HELD_OUT, [2])):
        answer, exact = (teacher.targets(part, rows).states for teacher in (stored, online))
        assert answer.dtype is torch.float32
        torch.testing.assert_close(answer, exact.bfloat16().float(), rtol=1e-2, atol=1e-5)


def test_the_codecs_kl_is_measured(tmp_path: Path) -> None:
    """Against the definition, over all tokens of the rows that were probed."""
    model, corpus = make_model(tie_word_embeddings=False), make_rows()
    with torch.no_grad():
        head_of(model).weight.mul_(8)  # Confident logits, so that the codec's error stands out of float32's.
    record = write_signals(model, corpus, tmp_path, rows=1, held_out_rows=3)
    exact = OnlineTeacher(model, corpus).states(Part.HELD_OUT, range(3)).double()
    head = head_of(model).weight.detach().double()
    decoded = exact.float().bfloat16().double()
    log_q, log_p = ((states @ head.T).log_softmax(-1) for states in (decoded, exact))
    expected = (
        torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean().item()
    )
    assert record["decoded_kl"] == pytest.approx(expected, rel=0.05)
    assert expected > 1e-6


def test_the_same_teacher_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_signals(make_teacher(), make_rows(), tmp_path / name, rows=4, held_out_rows=1)
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two")
    )
    assert one == two


@pytest.mark.parametrize("change", ["codec", "corpus", "width"])
def test_signals_of_something_else_are_refused(tmp_path: Path, change: str) -> None:
    model, corpus = make_teacher(), make_rows()
    write_signals(model, corpus, tmp_path, rows=2, held_out_rows=1)
    path = tmp_path / "signals.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), change: "other"}))
    with pytest.raises(InputError, match=f"another {change}") as caught:
        StoredTeacher(tmp_path, head_of(model), corpus.identity)
    assert "other" in str(caught.value)


def test_a_row_that_was_not_stored_is_an_error(tmp_path: Path) -> None:
    model, corpus = make_teacher(), make_rows()
    write_signals(model, corpus, tmp_path, rows=2, held_out_rows=1)
    with pytest.raises(CascadeError, match="end before the row"):
        StoredTeacher(tmp_path, head_of(model), corpus.identity).targets(Part.TRAIN, [2])


def test_progress_counts_all_tokens(tmp_path: Path) -> None:
    class Counter:
        seen: tuple[int, ...] = ()

        def log(self, message: str) -> None: ...

        def progress(self, done: int, total: int, unit: str, **figures: float) -> None:
            self.seen = (*self.seen, done)
            assert total == 5 * LENGTH

    counter = Counter()
    write_signals(make_teacher(), make_rows(), tmp_path, rows=4, held_out_rows=1, report=counter)
    assert counter.seen == tuple(sorted(counter.seen))
    assert counter.seen[-1] == 5 * LENGTH


def test_a_plain_head_passes_in_float32_and_bfloat16() -> None:
    ids = make_rows().train[0].long()
    check_head(make_student(), ids)
    check_head(make_student().bfloat16(), ids)


def test_a_head_with_a_soft_cap_passes() -> None:
    config = AutoConfig.for_model(
        "gemma2",
        num_hidden_layers=1,
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=258,
        final_logit_softcapping=0.2,
    )
    torch.manual_seed(0)
    check_head(AutoModelForCausalLM.from_config(config), make_rows().train[0].long())


def test_final_states_come_after_the_final_norm() -> None:
    model, ids = make_teacher(), make_rows().train[:2].long()
    with torch.no_grad():
        before = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        after = final_states(model, ids)
    torch.testing.assert_close(head_of(model).logits(after), model(input_ids=ids).logits)
    torch.testing.assert_close(after, before)
