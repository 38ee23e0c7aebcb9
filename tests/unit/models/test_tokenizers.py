"""Two tokenizers are the same when every token has the same id."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer
from transformers import TokenizersBackend

from cascade.errors import InputError
from cascade.models.tokenizers import require_embedded, require_same_tokenizer
from tests.tiny import END_OF_TEXT, PAD, make_tokenizer


def with_vocabulary(changes: dict[str, int | None]) -> TokenizersBackend:
    """The tiny tokenizer with some of its tokens renumbered, or left out where None."""
    tree = json.loads(make_tokenizer().backend_tokenizer.to_str())
    vocabulary = {**tree["model"]["vocab"], **changes}
    tree["model"]["vocab"] = {token: index for token, index in vocabulary.items() if index is not None}
    tree["added_tokens"] = []
    backend = Tokenizer.from_str(json.dumps(tree))
    return TokenizersBackend(tokenizer_object=backend, eos_token=END_OF_TEXT, pad_token=PAD)


def test_a_tokenizer_is_the_same_as_another_of_its_kind() -> None:
    require_same_tokenizer(make_tokenizer(), make_tokenizer())
    require_same_tokenizer(make_tokenizer(), with_vocabulary({}))


def test_two_exchanged_ids_are_refused_by_name() -> None:
    vocabulary = make_tokenizer().get_vocab()
    exchanged = with_vocabulary({"a": vocabulary["b"], "b": vocabulary["a"]})
    with pytest.raises(InputError, match="different tokenizers") as caught:
        require_same_tokenizer(make_tokenizer(), exchanged, where="teacher.model")
    assert caught.value.where == "teacher.model"
    assert caught.value.value == (
        f"2 of 258 tokens differ: 'a' is {vocabulary['a']} and {vocabulary['b']}; "
        f"'b' is {vocabulary['b']} and {vocabulary['a']}"
    )


@pytest.mark.parametrize("longer", ["student", "teacher"])
def test_an_additional_token_is_refused_on_either_side(longer: str) -> None:
    """Its embedding would be taken for padding by the other model."""
    pair = {"student": make_tokenizer(), "teacher": make_tokenizer()}
    pair[longer].add_tokens(["<|call|>"])
    with pytest.raises(InputError, match="different tokenizers") as caught:
        require_same_tokenizer(pair["student"], pair["teacher"])
    sides = {"student": "258 and absent", "teacher": "absent and 258"}
    assert f"1 of 259 tokens differ: '<|call|>' is {sides[longer]}" in str(caught.value)


def test_every_token_has_an_embedding() -> None:
    tokenizer = make_tokenizer()
    require_embedded(tokenizer, 258, where="parent")
    require_embedded(tokenizer, 300, where="parent")
    with pytest.raises(InputError, match="beyond the model's embeddings") as caught:
        require_embedded(tokenizer, 257, where="parent")
    assert "258 tokens, 257 embeddings; beyond: '<|pad|>' (257)" in str(caught.value)


def test_a_tokenizer_without_text_is_refused() -> None:
    nothing: dict[str, int | None] = dict.fromkeys(make_tokenizer().get_vocab())
    with pytest.raises(InputError, match="has no text"):
        require_embedded(with_vocabulary(nothing), 258, where="parent")
