"""A causal language model as a decoder: its parts by the anatomy of its class, and its shape."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from cascade.architecture import Architecture, Counts, Sizes, Term
from cascade.errors import InputError
from cascade.models import configs
from cascade.models.anatomy import Anatomy, Dimensions, Misfit, anatomy_of, is_router, within
from cascade.models.entries import SUMS, Entries, length
from cascade.models.norms import NormKind


@dataclass(frozen=True)
class Decoder:
    """A causal language model by its parts; the modules are the model's own, not copies.

    `embeddings` and `head` have weights [V, D].
    """

    model: PreTrainedModel
    anatomy: Anatomy
    architecture: Architecture
    embeddings: nn.Embedding
    head: nn.Linear
    layers: tuple[nn.Module, ...]

    @property
    def hidden_norms(self) -> list[tuple[nn.Module, NormKind]]:
        """Every norm over hidden channels and its kind: layer by layer as registered, then the others."""
        anatomy, kinds = self.anatomy, self.anatomy.layer_norms
        inner = [path for path in kinds if anatomy.layer[f"{path}.weight"] == (Entries.HIDDEN,)]
        norms = [(layer.get_submodule(path), kinds[path]) for layer in self.layers for path in inner]
        return norms + [(self.model.get_submodule(path), kind) for path, kind in anatomy.outer_norms.items()]

    @property
    def ffn_readers(self) -> list[nn.Module]:
        """In every layer the linear map that reads the FFN's product [.., F]; empty for experts."""
        path = self.anatomy.ffn_reader
        return [layer.get_submodule(path) for layer in self.layers] if path else []

    @property
    def attention_readers(self) -> list[nn.Module]:
        """In every layer the linear map that reads the heads' output [.., Gqh]."""
        return [layer.get_submodule(self.anatomy.attention_reader) for layer in self.layers]

    def parameters(self) -> Iterator[tuple[str, Tensor, Dimensions, int | None]]:
        """Name, tensor, what its dimensions stand for, and its layer (None outside) of every parameter."""
        for name, parameter in self.model.named_parameters():
            layer = layer_index(name, self.anatomy.stack)
            if layer is None:
                yield name, parameter, self.anatomy.outer[name], None
            else:
                yield name, parameter, self.anatomy.layer[within(name, self.anatomy.stack)], layer


def decoder_of(model: PreTrainedModel) -> Decoder:
    """Name the parts of `model` (on any device, meta included).

    Raises InputError that names the model type and what does not fit.
    """
    anatomy = anatomy_of(type(model), model.config)
    if isinstance(anatomy, Misfit):
        raise unsupported(model.config, anatomy.reason)
    return decoder_with(model, anatomy)


def decoder_with(model: PreTrainedModel, anatomy: Anatomy) -> Decoder:
    """The parts of `model` by an anatomy that is known; raises InputError where they do not agree."""
    config = model.config
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embeddings, nn.Embedding) or not isinstance(head, nn.Linear):
        raise unsupported(config, "no plain token embeddings and linear head")
    sizes = configs.read_sizes(config, anatomy.form)
    if not sizes.layers:
        raise unsupported(config, "no layers")
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if stored := sorted(model.state_dict().keys() - own):
        raise unsupported(config, f"a stored buffer, which no cut knows ({stored[0]})")
    check_sizes(model, anatomy, sizes)
    counts = counts_of(model, anatomy, embeddings, head)
    architecture = Architecture(**vars(sizes), counts=counts)
    layers = tuple(model.get_submodule(anatomy.stack).children())
    return Decoder(model, anatomy, architecture, embeddings, head, layers)


def architecture_of(config: PreTrainedConfig, trust_remote_code: bool = False) -> Architecture:
    """The shape of the model that `config` describes, from a build without weights.

    Raises InputError if the structure is not supported or not understood.
    """
    return decoder_of(empty_model_of(config, trust_remote_code)).architecture


def empty_model_of(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that `config` describes, on the meta device; raises InputError if there is no such class."""
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code
            )
    except configs.BUILD_ERRORS as error:
        reason = (
            f"no causal language model that transformers can build ({' '.join(str(error).split())[:200]})"
        )
        raise unsupported(config, reason) from error
    return model


def unsupported(config: PreTrainedConfig, reason: str) -> InputError:
    """The refusal of a model whose structure does not fit, with the reason."""
    return InputError(
        f"this decoder cannot be pruned: it has {reason}",
        value=config.model_type,
        where="parent",
        remedy="choose a decoder that README.md lists as tested, or one that is built like them",
    )


def layer_index(name: str, stack: str) -> int | None:
    """The layer that a parameter of this name belongs to."""
    inside = name.removeprefix(f"{stack}.")
    return None if inside == name else int(inside.partition(".")[0])


def check_sizes(model: PreTrainedModel, anatomy: Anatomy, sizes: Sizes) -> None:
    """Raise InputError unless every parameter of the real model has the lengths that its config explains."""
    seen: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        layer = layer_index(name, anatomy.stack)
        key = name if layer is None else within(name, anatomy.stack)
        dimensions = (anatomy.outer if layer is None else anatomy.layer).get(key)
        place = "outside its layers" if layer is None else f"in layer {layer}"
        if dimensions is None:
            raise unsupported(model.config, f"a parameter {place} that others of its class lack ({key})")
        if len(dimensions) != parameter.ndim:
            raise unsupported(model.config, f"another number of dimensions {place} than its class ({key})")
        for entries, found in zip(dimensions, parameter.shape, strict=True):
            if entries is not Entries.FIXED and length(entries, sizes) != found:
                raise unsupported(
                    model.config, f"a size {place} that its config does not explain ({key}: {found})"
                )
        seen[key] += 1
    missing = [key for key in anatomy.layer if seen[key] != sizes.layers]
    if missing:
        raise unsupported(model.config, f"layers of different kinds ({missing[0]})")


def counts_of(model: PreTrainedModel, anatomy: Anatomy, embeddings: nn.Embedding, head: nn.Linear) -> Counts:
    """The parameters as terms in the sizes."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    ends = {name for name, parameter in model.named_parameters() if parameter is embeddings.weight} | {
        name for name, parameter in model.named_parameters() if parameter is head.weight
    }
    first = f"{anatomy.stack}.0."
    inner = [(name, shapes[first + name], dimensions) for name, dimensions in anatomy.layer.items()]
    outer = [(name, shapes[name], at) for name, at in anatomy.outer.items() if name not in ends]
    active = configs.stated(model.config, configs.ACTIVE_FIELDS) if anatomy.router else 0
    if anatomy.router and not active:
        raise unsupported(model.config, "no count of active experts in its config")
    return Counts(
        vocabulary=embeddings.num_embeddings,
        tied=head.weight is embeddings.weight,
        layer=terms(inner),
        outer=terms(outer),
        active_experts=active,
        bound=anatomy.form.bound,
    )


def terms(parameters: list[tuple[str, torch.Size, Dimensions]]) -> tuple[Term, ...]:
    """Sizes of parameters (name, shape, dimensions) as a sum of products, equal products together."""
    total: Counter[tuple[tuple[str, ...], bool]] = Counter()
    for name, shape, dimensions in parameters:
        sides = [entries for entries in dimensions if entries is not Entries.EXPERTS]
        matrix = len(sides) > 1 or is_router(name, dimensions)
        sums = [
            {"": found} if entries is Entries.FIXED else SUMS[entries]
            for entries, found in zip(dimensions, shape, strict=True)
        ]
        for product in itertools.product(*(part.items() for part in sums)):
            factors = tuple(sorted(factor for factor, _ in product if factor))
            total[factors, matrix] += math.prod(count for _, count in product)
    return tuple(Term(factors, total[factors, matrix], matrix) for factors, matrix in sorted(total))
