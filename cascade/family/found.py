"""The models that a recipe names: found, and refused if they cannot be cut or taught from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from cascade.architecture import Architecture
from cascade.distillation.states import check_head
from cascade.distillation.targets import PADDING
from cascade.errors import InputError
from cascade.family.teachers import Parent
from cascade.models.checks import check_amount
from cascade.models.decoder import Decoder, decoder_of, empty_model_of
from cascade.models.sources import ParentSource, load_config, load_tokenizer, resolve_parent
from cascade.models.tokenizers import require_embedded, require_same_tokenizer
from cascade.pruning.proof import TOKENS, random_miniature
from cascade.recipe import Recipe
from cascade.roles import PARENT, PREVIOUS

LARGE = 100.0


@dataclass(frozen=True)
class Found:
    """A model that the recipe names: identified, and its structure and tokenizer read."""

    source: ParentSource
    decoder: Decoder

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its own."""
        return load_tokenizer(self.source)

    @property
    def described(self) -> Parent:
        """What the graph has to know."""
        return Parent(self.source.reference, self.source.fingerprint, self.decoder.architecture)

    def latencies(self, cache: Path) -> Path:
        """Where its measurements are kept."""
        return cache / "latency" / self.source.fingerprint[:12]


def found_model(recipe: Recipe, reference: str, cache: Path, parent: Found | None = None) -> Found:
    """Read a model's config; raises InputError if it cannot be distilled, or has another tokenizer than the
    parent, or more entries beyond it than padding explains."""
    trust = recipe.trust_remote_code
    source = resolve_parent(reference, trust_remote_code=trust, cache=cache)
    found = Found(source, decoder_of(empty_model_of(load_config(source), trust_remote_code=trust)))
    require_plain_head(found.decoder)
    if source.form in ("folder", "store"):
        check_amount(Path(source.path), found.decoder.architecture.parameters, reference)
    require_embedded(found.tokenizer, found.decoder.architecture.vocabulary, where=reference)
    if parent is not None:
        require_same_tokenizer(parent.tokenizer, found.tokenizer, where=reference)
        require_padding(recipe, parent.decoder.architecture, found.decoder.architecture, reference)
    return found


def given_models(recipe: Recipe) -> list[str]:
    """What the recipe names beside the parent: teachers and students, each once."""
    teachers = [model.path for model in recipe.teacher.models if model.path not in (PARENT, PREVIOUS)]
    return list(
        dict.fromkeys([*teachers, *(stage.checkpoint for stage in recipe.stages if stage.checkpoint)])
    )


def require_padding(recipe: Recipe, parent: Architecture, other: Architecture, reference: str) -> None:
    """Raise InputError for a vocabulary that the loss would refuse, before anything is computed for it."""
    more, kept = other.vocabulary - parent.vocabulary, recipe.teacher.signals
    if abs(more) <= PADDING and not (more and kept.keeps_entries):
        return
    raise InputError(
        "the vocabularies differ by more than padding"
        if abs(more) > PADDING
        else f"signals {kept.value} keep entries of one vocabulary, and these differ in their padding",
        value=f"{other.vocabulary:,} entries, the parent's {parent.vocabulary:,}",
        where=reference,
        remedy="pad both alike" if abs(more) > PADDING else "use `signals: hidden`",
    )


def require_plain_head(decoder: Decoder) -> None:
    """Raise InputError for a parent that could be cut but not distilled, before anything is written."""
    small = random_miniature(decoder)
    # A soft cap shows only where logits are large.
    small.get_output_embeddings().weight.mul_(LARGE)
    check_head(small, torch.arange(TOKENS))
