"""Whether two models mean the same by a token id."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from cascade.errors import InputError

NAMED = 3


def require_embedded(tokenizer: PreTrainedTokenizerBase, vocabulary: int, where: str) -> None:
    """Raise InputError unless the tokenizer has text, and each of its tokens one of `vocabulary` embeddings.

    Special tokens count as well: whoever uses the child may write them.
    """
    tokens = tokenizer.get_vocab()
    beyond = [f"{token!a} ({number})" for token, number in tokens.items() if number >= vocabulary]
    if not beyond and len(tokens) > len(tokenizer.added_tokens_decoder):
        return
    raise InputError(
        "the tokenizer has tokens beyond the model's embeddings" if beyond else "the tokenizer has no text",
        value=f"{len(tokens)} tokens, {vocabulary} embeddings; beyond: {', '.join(beyond[:NAMED]) or 'none'}",
        where=where,
        remedy="put the tokenizer's files that belong to the model beside its weights",
    )


def require_same_tokenizer(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, where: str = "the tokenizers"
) -> None:
    """Raise InputError unless every token has the same id in both.

    Embeddings may still differ in their padding: entries that no token has. `where`: the recipe's field.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    differing = sorted(
        (token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)),
        key=lambda token: (min(ours.get(token, len(ours)), theirs.get(token, len(theirs))), token),
    )
    examples = [
        f"{token!a} is {ours.get(token, 'absent')} and {theirs.get(token, 'absent')}"
        for token in differing[:NAMED]
    ]
    raise InputError(
        "student and teacher have different tokenizers",
        value=f"{len(differing)} of {len(ours.keys() | theirs.keys())} tokens differ: {'; '.join(examples)}",
        where=where,
        remedy="choose two models whose tokenizers give every token the same id",
    )
