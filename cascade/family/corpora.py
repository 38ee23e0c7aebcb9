"""The nodes of the texts: the corpus that all learn from, and one that is only watched."""

from __future__ import annotations

from cascade.data import PACKING
from cascade.family.graph import Node, Section
from cascade.family.teachers import Parent
from cascade.kinds import PARENT_STAGE, Kind
from cascade.recipe import Recipe
from cascade.texts import Source


def corpus_node(recipe: Recipe, parent: Parent, fingerprints: tuple[str, ...], part: str = "distill") -> Node:
    """It comes first and needs only the parent's tokenizer: too little text is found before any write.

    part: of a stage, that says how many tokens it needs.
    """
    corpus = recipe.corpus
    section = {
        "sources": sources_section(corpus.sources, fingerprints),
        "tokenizer": parent.fingerprint,
        "sequence_length": corpus.sequence_length,
        "held_out": corpus.held_out,
        "seed": recipe.seed,
        "packing": PACKING,
    }
    if corpus.separate_documents:
        section["separate_documents"] = True
    hints = {
        "parent": parent.reference,
        "sources": [source.model_dump(mode="json") for source in corpus.sources],
        "needs": [
            {"stage": stage.name, "part": what, "tokens": tokens, "epochs": stage.distill.epochs}
            for stage in recipe.stages
            for what, tokens in ((part, stage.distill.tokens), ("on_policy", stage.on_policy.tokens))
            if tokens
        ]
        + correction_needs(recipe),
    }
    return Node(Kind.CORPUS, PARENT_STAGE, recipe.family, section, hints=hints)


def sources_section(sources: tuple[Source, ...], fingerprints: tuple[str, ...]) -> list[Section]:
    """What is read, and how; not where it lies."""
    return [
        {"field": source.field, "split": source.split, "config": source.config, "fingerprint": fingerprint}
        for source, fingerprint in zip(sources, fingerprints, strict=True)
    ]


def watched_node(recipe: Recipe, parent: Parent, fingerprints: tuple[str, ...]) -> Node:
    """Packed like the corpus."""
    sources = recipe.watch.sources
    section: Section = {
        "sources": sources_section(sources, fingerprints),
        "tokenizer": parent.fingerprint,
        "sequence_length": recipe.corpus.sequence_length,
        "packing": PACKING,
    }
    if recipe.corpus.separate_documents:
        section["separate_documents"] = True
    hints = {
        "parent": parent.reference,
        "sources": [source.model_dump(mode="json") for source in sources],
    }
    return Node(Kind.WATCHED, PARENT_STAGE, recipe.family, section, hints=hints)


def correction_needs(recipe: Recipe) -> list[Section]:
    """Tokens of the teacher's correction, in as many epochs as the stage that asks for most."""
    epochs = max(stage.distill.epochs for stage in recipe.stages)
    tokens = recipe.teacher.correction_tokens
    return [{"stage": "teacher", "tokens": tokens, "epochs": epochs}] if tokens else []
