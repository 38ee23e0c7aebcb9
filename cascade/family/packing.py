"""What makes the packed texts: the corpus, and one that is only watched."""

from __future__ import annotations

import itertools

from cascade.data import corpus as corpora
from cascade.data.corpus import Corpus, require_tokens
from cascade.data.packing import pack, pack_watched
from cascade.data.sources import Source, documents, fingerprint
from cascade.errors import InputError
from cascade.family.graph import Section
from cascade.family.students import the_source
from cascade.family.workplace import Result, Workplace
from cascade.models.sources import load_tokenizer


def make_corpus(place: Workplace) -> Result:
    """Documents to packed rows; too little text for a stage is an error before anything is stored."""
    section, hints = place.job.section, place.job.hints
    tokenizer = load_tokenizer(the_source(place, section["tokenizer"]))
    sources = [Source(**source) for source in hints["sources"]]
    packed = pack(
        itertools.chain.from_iterable(documents(source) for source in sources),
        tokenizer,
        sequence_length=section["sequence_length"],
        held_out=section["held_out"],
        seed=section["seed"],
        separate=section.get("separate_documents", False),
        report=place.report,
    )
    require_unchanged(sources, section["sources"])
    corpora.write(packed, place.folder)
    corpus = Corpus.open(place.folder)
    for need in hints["needs"]:
        require_tokens(len(corpus.train), corpus.sequence_length, **need)
    return Result(packed.facts(), tokens=(len(corpus.train) + len(corpus.held_out)) * corpus.sequence_length)


def make_watched(place: Workplace) -> Result:
    """Documents to packed rows that are measured while others are trained on."""
    section = place.job.section
    sources = [Source(**source) for source in place.job.hints["sources"]]
    packed = pack_watched(
        itertools.chain.from_iterable(documents(source) for source in sources),
        load_tokenizer(the_source(place, section["tokenizer"])),
        sequence_length=section["sequence_length"],
        separate=section.get("separate_documents", False),
        report=place.report,
    )
    require_unchanged(sources, section["sources"], "watch.sources")
    corpora.write(packed, place.folder)
    return Result(packed.facts(), tokens=packed.held_out.numel())


def require_unchanged(sources: list[Source], planned: list[Section], where: str = "corpus.sources") -> None:
    """What was just read must be what was planned, or it would be stored under another text's key."""
    for source, expected in zip(sources, planned, strict=True):
        if fingerprint(source) != expected["fingerprint"]:
            raise InputError(
                "a corpus source changed after the family was planned",
                value=source.path,
                where=where,
                remedy="run the command again; it plans with the source as it is now",
            )
