"""The anatomy of a decoder class: what every dimension of every parameter stands for.

No list of models. The class is built twice at sizes that are all different (miniatures of two layers), and
each dimension is recognised by its two lengths: 60 and 72 is the hidden size because nothing else is. What
lengths cannot tell, the order inside a fused projection and whether the class computes what a cut assumes, is
proved in `cascade.pruning.proof` by cutting a miniature.

Legend: D hidden, F FFN size, G KV groups, q query heads a group, h head size, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cascade.architecture import Sizes
from cascade.models import configs
from cascade.models.configs import BUILD_ERRORS, Form
from cascade.models.entries import OTHER_ORDER, SUMS, Entries, length
from cascade.models.norms import NormKind, norm_kind

VOCABULARY, LAYERS, ACTIVE_EXPERTS, DECOY = 32, 2, 2, 34
# Llama's config wants D to be a multiple of G * q, and torch's grouped products of experts want rows of 16
# bytes. Every sum in `entries.SUMS` differs between the two, and no F is a sum of heads.
SIZES = (
    {"hidden": 60, "ffn": 28, "kv_groups": 3, "heads_per_group": 2, "experts": 5},
    {"hidden": 72, "ffn": 36, "kv_groups": 4, "heads_per_group": 3, "experts": 7},
)
Dimensions = tuple[Entries, ...]


@dataclass(frozen=True)
class Anatomy:
    """A class of decoders, by the names of its parameters.

    stack: path of the ModuleList of layers. layer: dimensions by a parameter's name within a layer; outer:
    by full name, for the rest. layer_norms, outer_norms: the kind of every norm by the path of its module.
    ffn_reader, attention_reader: the linear modules within a layer that read the FFN's product and the heads'
    output. With experts ffn_reader is "", router the module that chooses them, and experts_down the parameter
    that reads the FFN's product.
    """

    form: Form
    stack: str
    layer: Mapping[str, Dimensions]
    outer: Mapping[str, Dimensions]
    layer_norms: Mapping[str, NormKind]
    outer_norms: Mapping[str, NormKind]
    ffn_reader: str
    attention_reader: str
    router: str
    experts_down: str

    def swapped(self, entries: Entries) -> Anatomy:
        """The same with the other order of one kind of fused dimension."""
        layer = {
            name: tuple(OTHER_ORDER[entries] if part is entries else part for part in dimensions)
            for name, dimensions in self.layer.items()
        }
        return replace(self, layer=layer)

    def has(self, entries: Entries) -> bool:
        """Whether any dimension in a layer is of that kind."""
        return any(entries in dimensions for dimensions in self.layer.values())


@dataclass(frozen=True)
class Misfit:
    """Why a class is not understood, in a person's words."""

    reason: str


@dataclass
class Miniature:
    """A small model of the class, and the sizes it was built with."""

    model: PreTrainedModel
    sizes: Sizes
    stack: str = field(init=False)

    def __post_init__(self) -> None:
        self.stack = stack_of(self.model)

    @property
    def layers(self) -> nn.ModuleList:
        """The two layers."""
        stack = self.model.get_submodule(self.stack)
        if not isinstance(stack, nn.ModuleList):
            raise TypeError(f"{self.stack} is not a ModuleList")
        return stack


_known: dict[tuple[type[PreTrainedModel], str], Anatomy | Misfit] = {}


def anatomy_of(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Anatomy | Misfit:
    """The anatomy of `model_class` with the options of `config`, or why there is none; found once."""
    key = (model_class, config.to_json_string(use_diff=False))
    if key not in _known:
        _known[key] = _anatomy(model_class, config)
    return _known[key]


def _anatomy(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Anatomy | Misfit:
    if getattr(config, "num_attention_heads", None) is None:
        return Misfit("no attention heads")
    misfits: list[str] = []
    for ffn_field in configs.present(config, configs.FFN_FIELDS):
        for bound in (False, True):
            found = _of_form(model_class, config, Form(ffn_field, bound))
            if isinstance(found, Anatomy):
                return found
            misfits.append(found.reason)
    return Misfit("; or ".join(dict.fromkeys(misfits)) or "no FFN size in its config")


def _of_form(model_class: type[PreTrainedModel], config: PreTrainedConfig, form: Form) -> Anatomy | Misfit:
    """Recognise the dimensions under the assumption of one form."""
    try:
        with torch.device("meta"):
            first, second = (miniature(model_class, config, form, which) for which in (0, 1))
    except BUILD_ERRORS as error:
        return Misfit(f"sizes that its config cannot set ({' '.join(str(error).split())[:200]})")
    ours = f"{first.stack}.0."
    layer: dict[str, Dimensions] = {}
    outer: dict[str, Dimensions] = {}
    others = dict(second.model.named_parameters())
    roles = bound_roles(first) if form.bound else {}
    for name, parameter in first.model.named_parameters():
        if name not in others:
            return Misfit(f"a parameter that comes and goes with its sizes ({name})")
        found = recognised(parameter.shape, others[name].shape, first.sizes, second.sizes)
        inside = name.startswith(f"{first.stack}.")
        if form.bound:
            found = [
                roles.get((name, place), entries) if entries is Entries.HIDDEN else entries
                for place, entries in enumerate(found)
            ]
        if any(entries is None for entries in found):
            return Misfit(f"a parameter whose sizes are not understood ({name})")
        dimensions = tuple(entries for entries in found if entries is not None)
        if not inside:
            outer[name] = dimensions
        elif name.startswith(ours):
            layer[name.removeprefix(ours)] = dimensions
        elif layer.get(within(name, first.stack)) != dimensions:
            return Misfit("layers of different kinds")
    readers = [reader(first, layer, entries) for entries in (Entries.FFN, Entries.QUERIES)]
    routers = [name for name in layer if is_router(name, layer[name])]
    downs = [name for name in layer if set(layer[name]) == {Entries.EXPERTS, Entries.FFN, Entries.HIDDEN}]
    problem = incomplete(layer, readers, routers, downs)
    if problem:
        return Misfit(problem)
    norms = norms_of(first, layer, outer)
    if isinstance(norms, Misfit):
        return norms
    router, down = (routers[0].rpartition(".")[0], downs[0]) if routers else ("", "")
    return Anatomy(form, first.stack, layer, outer, *norms, readers[0], readers[1], router, down)


def is_router(name: str, dimensions: Dimensions) -> bool:
    """A matrix [E, D]; the experts' output biases have that shape too, but are no module's weight."""
    return dimensions == (Entries.EXPERTS, Entries.HIDDEN) and name.endswith(".weight")


def incomplete(
    layer: Mapping[str, Dimensions], readers: list[str], routers: list[str], downs: list[str]
) -> str:
    """What a layer lacks of an attention block and an FFN, or "" if nothing."""
    kinds = {entries for dimensions in layer.values() for entries in dimensions}
    experts = Entries.EXPERTS in kinds
    if not readers[1]:
        return "no output projection of its attention"
    if Entries.FFN not in kinds or not (readers[0] or experts):
        return "no FFN of one hidden layer"
    if experts and len(routers) != 1:
        return f"{len(routers)} routers of experts instead of one"
    if experts and len(downs) != 1:
        return f"{len(downs)} stacked down projections of experts instead of one"
    stacked = [dimensions for dimensions in layer.values() if Entries.EXPERTS in dimensions[1:]]
    return "experts that do not come first in their parameters" if stacked else ""


def recognised(first: torch.Size, second: torch.Size, sizes: Sizes, other: Sizes) -> list[Entries | None]:
    """For every dimension what it stands for, None when nothing fits."""
    if len(first) != len(second):
        return [None]
    found: list[Entries | None] = []
    for here, there in zip(first, second, strict=True):
        fitting = (e for e in SUMS if (length(e, sizes), length(e, other)) == (here, there))
        found.append(next(fitting, Entries.FIXED if here == there else None))
    return found


def miniature_sizes(config: PreTrainedConfig, form: Form, which: int) -> Sizes:
    """One of the two sets of sizes, as far as the class has them."""
    chosen = dict(SIZES[which])
    if not hasattr(config, "num_key_value_heads"):
        chosen |= {"kv_groups": chosen["kv_groups"] * chosen["heads_per_group"], "heads_per_group": 1}
    if not configs.stated(config, configs.EXPERT_FIELDS):
        chosen["experts"] = 0
    size = configs.head_size(config)
    if form.bound:
        chosen["hidden"] = chosen["kv_groups"] * chosen["heads_per_group"] * size
    return Sizes(layers=LAYERS, head_size=size, **chosen)


def miniature(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, form: Form, which: int = 0
) -> Miniature:
    """Two layers of the class, the parent's first and last, at one of the two sets of sizes; in eval mode."""
    sizes = miniature_sizes(config, form, which)
    small = configs.resized(config, sizes, form, [0, config.num_hidden_layers - 1])
    for name in configs.present(config, configs.FFN_FIELDS):
        # Where several are set, the one that is not meant must not be mistaken for it.
        if name != form.ffn_field and getattr(config, name):
            setattr(small, name, DECOY + which)
    for name in configs.present(config, configs.ACTIVE_FIELDS):
        setattr(small, name, min(getattr(config, name) or 1, ACTIVE_EXPERTS))
    small.vocab_size, small.pad_token_id = VOCABULARY, None
    model = model_class._from_config(small, dtype=torch.float32, attn_implementation="eager")
    return Miniature(model.eval(), sizes)


def stack_of(model: PreTrainedModel) -> str:
    """Path of the one outermost ModuleList, which holds the layers; ValueError without exactly one."""
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]
    if len(outermost) != 1:
        raise ValueError(f"{len(outermost)} stacks of layers instead of one")
    return outermost[0]


def layers_of(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """The layers of the one stack, first to last; ValueError as `stack_of`."""
    return tuple(model.get_submodule(stack_of(model)).children())


def within(name: str, stack: str) -> str:
    """The name within its layer of a parameter or module of the stack."""
    return name.removeprefix(f"{stack}.").partition(".")[2]


def linear_modules(layer: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Path, module and whether inputs come first, of every linear map with a weight matrix of its own."""
    for path, module in layer.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield path, module, isinstance(module, Conv1D)


def reader(small: Miniature, layer: Mapping[str, Dimensions], entries: Entries) -> str:
    """Path of the linear module that maps `entries` to hidden channels; "" if there is none."""
    for path, _, inputs_first in linear_modules(small.layers[0]):
        pair = (entries, Entries.HIDDEN) if inputs_first else (Entries.HIDDEN, entries)
        if layer.get(f"{path}.weight") == pair:
            return path
    return ""


def bound_roles(small: Miniature) -> dict[tuple[str, int], Entries]:
    """Where D = G * q * h, the dimensions that hold queries although their length says hidden.

    Linear maps without a side of the FFN belong to attention, and of those from D to D the one that is
    registered last is its output. That is a custom, not a law: `cascade.pruning.proof` finds out.
    """
    roles: dict[tuple[str, int], Entries] = {}
    hidden, keys = small.sizes.hidden, small.sizes.keys
    for index, layer in enumerate(small.layers):
        attention = [
            (path, module, inputs_first)
            for path, module, inputs_first in linear_modules(layer)
            if set(module.get_parameter("weight").shape) <= {hidden, keys, hidden + 2 * keys}
        ]
        squares = [item for item in attention if item[1].get_parameter("weight").shape == (hidden, hidden)]
        output = squares[-1][0] if squares else ""
        for path, module, inputs_first in attention:
            reads_heads = path == output
            place = 0 if reads_heads == inputs_first else 1
            name = f"{small.stack}.{index}.{path}"
            roles[f"{name}.weight", place] = Entries.QUERIES
            if not reads_heads and getattr(module, "bias", None) is not None:
                roles[f"{name}.bias", 0] = Entries.QUERIES
    return roles


def norms_of(
    small: Miniature,
    layer: Mapping[str, Dimensions],
    outer: Mapping[str, Dimensions],
) -> tuple[dict[str, NormKind], dict[str, NormKind]] | Misfit:
    """Every module with one gain, by its path, with the formula of a norm that it follows."""
    found: tuple[dict[str, NormKind], dict[str, NormKind]] = ({}, {})
    for place, dimensions in enumerate((layer, outer)):
        for name, at in dimensions.items():
            path, _, last = name.rpartition(".")
            if last != "weight" or len(at) != 1:
                continue
            module = small.model.get_submodule(path if place else f"{small.stack}.0.{path}")
            kind = norm_kind(module, len(module.get_parameter("weight")))
            if kind is None:
                return Misfit(f"a norm of an unknown kind ({type(module).__name__})")
            found[place][path] = kind
    return found
