"""The parts of a decoder, found by structure: no list of supported models, but a shape that must fit.

The stack of layers, the norms and the heads are found by their place and their sizes. Projections of
equal size are told apart by the names that every Llama-like decoder in transformers gives them, and
`cascade.models.formula` then proves on a miniature that they are wired as the names say.

Legend: V vocabulary, D hidden, F FFN size, H query heads, G KV groups, h head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from cascade.architecture import Architecture
from cascade.errors import InputError
from cascade.models import formula

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN = ("gate_proj", "up_proj", "down_proj")
SUPPORTED = (
    "pre-norm decoders with RMSNorm, separate q, k, v, o and gate, up, down projections (Llama, Qwen, ...)"
)


@dataclass(frozen=True)
class DecoderLayer:
    """One layer's real modules, which can be changed through it.

    Weights: q [Hh, D], k and v [Gh, D], o [D, Hh], gate and up [F, D], down [D, F]. `input_norm` feeds
    q, k and v, `ffn_norm` feeds gate and up, both with gains [D]; `q_norm` and `k_norm` (gains [h], per
    head) exist in some families.
    """

    module: nn.Module
    attention: nn.Module
    ffn: nn.Module
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    input_norm: nn.Module
    ffn_norm: nn.Module
    q_norm: nn.Module | None
    k_norm: nn.Module | None

    @property
    def shapes(self) -> list[torch.Size]:
        """Shapes of every parameter in registration order."""
        return [parameter.shape for parameter in self.module.parameters()]


@dataclass(frozen=True)
class Decoder:
    """A causal language model by its parts; the modules are the model's own, not copies.

    `stack` is the ModuleList that holds the layers; `embeddings` and `head` have weights [V, D].
    """

    model: PreTrainedModel
    embeddings: nn.Embedding
    stack: nn.ModuleList
    layers: tuple[DecoderLayer, ...]
    final_norm: nn.Module
    head: nn.Linear

    @property
    def tied(self) -> bool:
        """Whether input and output embeddings are one tensor."""
        return self.head.weight is self.embeddings.weight

    @property
    def architecture(self) -> Architecture:
        """The shape, read off the modules; raises InputError if its count differs from the modules' own."""
        layer = self.layers[0]
        heads = int(self.model.config.num_attention_heads)
        head_size = layer.q.out_features // heads
        groups = layer.k.out_features // head_size
        architecture = Architecture(
            layers=len(self.layers),
            hidden=self.embeddings.embedding_dim,
            ffn=layer.gate.out_features,
            kv_groups=groups,
            heads_per_group=heads // groups,
            head_size=head_size,
            vocabulary=self.embeddings.num_embeddings,
            tied=self.tied,
            qkv_bias=layer.q.bias is not None,
            output_bias=layer.o.bias is not None,
            ffn_bias=layer.gate.bias is not None,
            qk_norm=layer.q_norm is not None,
        )
        counted = sum(parameter.numel() for parameter in self.model.parameters())
        if counted != architecture.parameters:
            reason = f"{counted - architecture.parameters:+,} parameters that its shape does not explain"
            raise unsupported(self.model.config, reason)
        return architecture


def decoder_of(model: PreTrainedModel) -> Decoder:
    """Name the parts of `model` (on any device, meta included).

    Raises InputError that names the model type and what does not fit.
    """
    decoder = find_parts(model)
    difference = formula.difference(decoder, find_parts)
    if difference:
        raise unsupported(model.config, difference)
    return decoder


def architecture_of(config: PreTrainedConfig, trust_remote_code: bool = False) -> Architecture:
    """The shape of the model that `config` describes, from a build without weights.

    Raises InputError if the structure is not supported or not understood.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise unsupported(config, "no causal language model in transformers") from error
    return decoder_of(model).architecture


def unsupported(config: PreTrainedConfig, reason: str) -> InputError:
    """The refusal of a model whose structure does not fit, with the reason."""
    return InputError(
        f"this decoder cannot be pruned: it has {reason}",
        value=config.model_type,
        where="parent",
        remedy=f"choose a parent among {SUPPORTED}",
    )


def find_parts(model: PreTrainedModel) -> Decoder:
    """The parts by place, name and size alone; raises InputError with what is missing."""
    config = model.config
    if getattr(config, "num_attention_heads", None) is None:
        raise unsupported(config, "no attention heads")
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embeddings, nn.Embedding) or not isinstance(head, nn.Linear):
        raise unsupported(config, "no plain token embeddings and linear head")
    path, stack = _stack(model)
    layers = tuple(_layer(module, config) for module in stack)
    if any(layer.shapes != layers[0].shapes for layer in layers):
        raise unsupported(config, "layers of different sizes")
    holder = model.get_submodule(path.rpartition(".")[0])
    norms = [child for child in holder.children() if _norm_size(child) == embeddings.embedding_dim]
    if len(norms) != 1:
        raise unsupported(config, f"{len(norms)} RMSNorms after its layers instead of one")
    known = {id(p) for part in (embeddings, stack, norms[0], head) for p in part.parameters()}
    extra = [name for name, parameter in model.named_parameters() if id(parameter) not in known]
    if extra:
        raise unsupported(config, f"parameters outside its layers: {', '.join(extra[:3])}")
    return Decoder(model, embeddings, stack, layers, norms[0], head)


def _stack(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Path and module of the one outermost ModuleList, which holds the layers."""
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [pair for pair in lists if not any(pair[0].startswith(f"{path}.") for path, _ in lists)]
    if len(outermost) != 1 or len(outermost[0][1]) == 0:
        raise unsupported(model.config, f"{len(outermost)} stacks of layers instead of one")
    return outermost[0]


def _layer(module: nn.Module, config: PreTrainedConfig) -> DecoderLayer:
    """One layer's parts; raises InputError with what is missing."""
    found = {
        path.rpartition(".")[2]: (path, child)
        for path, child in module.named_modules()
        if isinstance(child, nn.Linear)
    }
    if set(found) != {*ATTENTION, *FFN}:
        raise unsupported(config, _misfit(module, set(found), config))
    q, k, v, o, gate, up, down = (found[name][1] for name in (*ATTENTION, *FFN))
    norms = [child for child in module.children() if _norm_size(child) == q.in_features]
    if len(norms) != 2:
        kind = "post-norms" if len(norms) > 2 else "no RMSNorm before attention or FFN"
        raise unsupported(config, f"{kind} ({len(norms)} RMSNorms a layer instead of two)")
    attention = module.get_submodule(found["q_proj"][0].rpartition(".")[0])
    ffn = module.get_submodule(found["down_proj"][0].rpartition(".")[0])
    q_norm, k_norm = _head_norms(attention, config)
    return DecoderLayer(
        module, attention, ffn, q, k, v, o, gate, up, down, norms[0], norms[1], q_norm, k_norm
    )


def _head_norms(attention: nn.Module, config: PreTrainedConfig) -> tuple[nn.Module | None, nn.Module | None]:
    """The optional q and k norms, which must act on each head alone."""
    norms = {name: child for name, child in attention.named_children() if _norm_size(child) is not None}
    head_size = formula.head_size(config)
    if norms and set(norms) != {"q_norm", "k_norm"}:
        raise unsupported(config, f"norms inside attention other than q and k norms: {', '.join(norms)}")
    if any(_norm_size(norm) != head_size for norm in norms.values()):
        raise unsupported(config, "q/k norms that reach across heads")
    return norms.get("q_norm"), norms.get("k_norm")


def _norm_size(module: nn.Module) -> int | None:
    """Length of the gain of a module that is an RMSNorm by its parameters: one vector named weight."""
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    return weight.numel() if weight is not None and weight.ndim == 1 and len(parameters) == 1 else None


def _misfit(layer: nn.Module, linears: set[str], config: PreTrainedConfig) -> str:
    """Why a layer's linear maps are not the seven of a Llama-like layer, in a person's words."""
    heads = int(config.num_attention_heads)
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    fused_qkv = (heads + 2 * groups) * formula.head_size(config)
    fused_ffn = 2 * int(getattr(config, "intermediate_size", None) or 0)
    shapes = [parameter.shape for name, parameter in layer.named_parameters() if parameter.ndim > 1]
    if any(len(shape) > 2 for shape in shapes) or any(isinstance(m, nn.ModuleList) for m in layer.modules()):
        return "a mixture of experts"
    if not {"q_proj", "k_proj", "v_proj"} & linears and any(fused_qkv in shape for shape in shapes):
        return "a fused qkv projection"
    if not {"gate_proj", "up_proj"} & linears and any(fused_ffn in shape for shape in shapes):
        return "a fused gate and up projection"
    missing = [name for name in (*ATTENTION, *FFN) if name not in linears]
    if missing:
        return f"no {', '.join(missing)} in its layers"
    return f"linear maps that are not understood: {', '.join(sorted(linears - {*ATTENTION, *FFN}))}"
