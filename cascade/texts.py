"""The texts of a recipe: the corpus that all learn from, and one that is only watched."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, model_validator

from cascade.fields import Count, Section, setting


class Source(Section):
    """Where documents come from."""

    path: str = setting(
        ..., 0, "Path", "`embedded`, a .jsonl, .parquet or .txt file or URL, or a hub data set.", min_length=1
    )
    field: str = setting("text", 1, "Field", "The column that holds the text of a document.", min_length=1)
    split: str = setting("train", 2, "Split", "The split of a hub data set.", min_length=1)
    config: str | None = setting(
        None, 3, "Configuration", "The configuration of a hub data set, if it has several."
    )


def source_from_path(value: object) -> object:
    """A plain string stands for a source with the default field and split."""
    return {"path": value} if isinstance(value, str) else value


class Corpus(Section):
    """The text that calibrates, teaches and measures every stage."""

    sources: tuple[Annotated[Source, BeforeValidator(source_from_path)], ...] = setting(
        ..., 0, "Sources", "One or more sources of documents.", min_length=1
    )
    sequence_length: int = setting(
        512, 1, "Sequence length", "Tokens in a packed sequence.", ge=8, le=1_048_576
    )
    held_out: float = setting(
        0.02,
        2,
        "Held-out share",
        "Share of documents kept out of training, chosen by document hash.",
        gt=0,
        lt=1,
    )
    held_out_tokens: Count = setting(
        8192,
        3,
        "Evaluated tokens",
        "Held-out tokens that are evaluated, rounded up to whole sequences.",
        ge=64,
    )
    separate_documents: bool = setting(
        True,
        4,
        "Separate documents",
        "No token sees another document of its sequence; false: a sequence is read as one text.",
    )


class Watch(Section):
    """A second corpus that nobody trains on, to end a training that over-fits the first."""

    sources: tuple[Annotated[Source, BeforeValidator(source_from_path)], ...] = setting(
        (), 0, "Sources", "Sources of documents, as in `corpus`; empty: nothing is watched."
    )
    tokens: Count = setting(
        8192, 1, "Tokens", "Tokens that are measured, rounded up to whole sequences, or all there are.", ge=64
    )
    every: int | None = setting(
        None, 2, "Every", "Steps between two measurements; when empty, a tenth of a training's steps.", ge=1
    )
    patience: int = setting(
        3, 3, "Patience", "Measurements in a row no better than the best that end a training.", ge=1
    )

    @model_validator(mode="after")
    def nothing_without_sources(self) -> Watch:
        """What says how is of no use where nothing is watched."""
        written = [
            f"`{name}`"
            for name, field in type(self).model_fields.items()
            if getattr(self, name) != field.default
        ]
        if written and not self.sources:
            raise ValueError(f"`sources` says what is watched, and is empty; leave out {', '.join(written)}")
        return self
