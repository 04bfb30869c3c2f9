"""The parts of a causal language model: decoder, layers, attention, feed-forward, linears, embeddings, head.

Everything is found by what a module *is* and where it stands (a list as long as the config says, a module that knows
its layer's number and owns projections), so that a model type nobody here has heard of is described the same way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from spectune.errors import ConfigError
from spectune.families.modules import adds_its_bias_last, linear_shape
from spectune.families.parts import Slice, inner_activation, projections
from spectune.families.quantised import is_transposed, packed_away


@dataclass(frozen=True)
class Linear:
    """A linear map inside a layer: `y[..., out_features] = W x[..., in_features] (+ b)`."""

    path: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class Attention:
    """A self-attention module. Keys are `[batch, kv_heads, length, key_dim]`, values end in `value_dim`.

    `keys` and `values`: the outputs of its linears that they are made of, as names and shapes tell (fused projections
    are taken to be queries, keys, values one after the other); None where they do not tell.
    """

    path: str
    layer: int
    hidden_size: int
    kv_heads: int
    key_dim: int
    value_dim: int
    keys: Slice | None = None
    values: Slice | None = None


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward sublayer. `whole` is False where its linears stand in the layer itself (OPT has no module of its
    own for it): its output is then the last linear's, and its input cannot be seen at the same place.

    `activation`: the module of its nonlinearity, which gives `inner_size` features; None where it has none of its own
    (experts share one, or it is a function).
    """

    path: str
    hidden_size: int
    whole: bool = True
    activation: str | None = None
    inner_size: int = 0


@dataclass(frozen=True)
class Layer:
    """One decoder layer (a transformer block)."""

    path: str
    hidden_size: int
    attention: Attention | None
    feed_forward: FeedForward | None


@dataclass(frozen=True)
class Bias:
    """A trainable bias vector of the base and the module whose output it is added to."""

    path: str
    size: int
    additive: bool


@dataclass(frozen=True)
class Family:
    """The parts of one model, as module paths (`model.get_submodule(path)`) and sizes."""

    model_type: str
    decoder: str
    embedding: str
    head: str | None
    hidden_size: int
    vocab_size: int
    layers: tuple[Layer, ...]
    linears: tuple[Linear, ...]
    biases: tuple[Bias, ...]
    num_parameters: int
    #: every linear is a `Conv1D`, or stands for one: its weight is transposed (PEFT calls that fan_in_fan_out)
    conv1d: bool
    #: rows of a learned table of absolute positions, None where positions are rotary or relative
    position_table: int | None
    #: tokens that some layers' attention reaches back at most, None where all see everything
    sliding_window: int | None = None

    @property
    def attentions(self) -> tuple[Attention, ...]:
        return tuple(layer.attention for layer in self.layers if layer.attention is not None)


def describe(model: PreTrainedModel) -> Family:
    """The parts of `model`, which may be on the meta device.

    Raises:
        ConfigError: the model has no list of decoder layers or no token embeddings that can be recognised.
    """
    text = model.config.get_text_config()
    names = {id(module): name for name, module in model.named_modules()}
    decoder: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    stack = _layer_stack(decoder, int(text.num_hidden_layers), type(model).__name__)
    embedding = model.get_input_embeddings()
    if embedding is None or id(embedding) not in names:
        raise ConfigError(f"{type(model).__name__}: no token embeddings were found (get_input_embeddings() gave none)")
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    hidden = int(getattr(embedding, "embedding_dim", text.hidden_size))
    stack_path = names[id(stack)]
    layers = tuple(
        _describe_layer(module, f"{stack_path}.{index}", index, hidden, text) for index, module in enumerate(stack)
    )
    linears = tuple(
        Linear(f"{stack_path}.{name}", *shape)
        for name, module in stack.named_modules()
        if (shape := linear_shape(module)) is not None
    )
    return Family(
        model_type=str(model.config.model_type),
        decoder=names[id(decoder)],
        embedding=names[id(embedding)],
        head=names.get(id(head)) if head is not None else None,
        hidden_size=hidden,
        vocab_size=int(getattr(embedding, "num_embeddings", text.vocab_size)),
        layers=layers,
        linears=linears,
        biases=_biases(model),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()) + packed_away(model),
        conv1d=bool(linears) and all(is_transposed(model.get_submodule(t.path)) for t in linears),
        position_table=_position_table(decoder, embedding, text),
        sliding_window=_sliding_window(text),
    )


def family_from_config(config: PretrainedConfig) -> Family:
    """The same from a config alone: the model is built on the meta device, no weight is made or read."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return describe(model)


def _layer_stack(decoder: nn.Module, depth: int, model_name: str) -> nn.ModuleList:
    """The list of decoder layers: of all module lists as long as the config says, the one with most weights."""
    stacks = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not stacks:
        raise ConfigError(
            f"{model_name}: no list of {depth} decoder layers was found (num_hidden_layers = {depth}); "
            "spectune needs a decoder whose layers stand in one torch.nn.ModuleList"
        )
    return max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))


def _describe_layer(layer: nn.Module, path: str, index: int, hidden: int, config: PretrainedConfig) -> Layer:
    attention_name = _attention_name(layer)
    attention = None
    if attention_name is not None:
        module = layer.get_submodule(attention_name)
        heads = int(config.num_attention_heads)
        key_dim = int(getattr(module, "head_dim", None) or getattr(config, "head_dim", None) or hidden // heads)
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        whole_path = f"{path}.{attention_name}"
        keys, values = projections(module, whole_path, heads * key_dim, kv_heads * key_dim)
        attention = Attention(whole_path, index, hidden, kv_heads, key_dim, key_dim, keys, values)
    return Layer(path, hidden, attention, _feed_forward(layer, path, attention_name, hidden))


def _attention_name(layer: nn.Module) -> str | None:
    """Attention is the module that knows its layer's number and directly owns projections."""
    name: str
    for name, module in layer.named_modules():
        owns_projections = any(linear_shape(child) is not None for child in module.children())
        if name and hasattr(module, "layer_idx") and hasattr(module, "is_causal") and owns_projections:
            return name
    return None


def _feed_forward(layer: nn.Module, path: str, attention_name: str | None, hidden: int) -> FeedForward | None:
    """Feed-forward is the heaviest other child of the layer; or the layer's own linears, in their order."""
    attention_child = attention_name.split(".")[0] if attention_name else None
    weights = {
        name: sum(p.numel() for p in child.parameters())
        for name, child in layer.named_children()
        if name != attention_child and linear_shape(child) is None and any(p.dim() > 1 for p in child.parameters())
    }
    if weights:
        name = max(weights, key=lambda name: weights[name])
        activation, inner = inner_activation(layer.get_submodule(name))
        return FeedForward(f"{path}.{name}", hidden, True, activation and f"{path}.{name}.{activation}", inner)
    own = [name for name, child in layer.named_children() if linear_shape(child) is not None]
    if not own:
        return None
    activation, inner = inner_activation(layer)
    return FeedForward(f"{path}.{own[-1]}", hidden, False, activation and f"{path}.{activation}", inner)


def _biases(model: nn.Module) -> tuple[Bias, ...]:
    found = []
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if leaf.endswith("bias"):
            module = model.get_submodule(owner)
            found.append(Bias(owner, parameter.numel(), leaf == "bias" and adds_its_bias_last(module)))
    return tuple(found)


def _position_table(decoder: nn.Module, embedding: nn.Module, config: PretrainedConfig) -> int | None:
    """Rows of a table of learned absolute positions: another embedding of the decoder's, as long as the context."""
    context = getattr(config, "max_position_embeddings", None)
    for module in decoder.children():
        if isinstance(module, nn.Embedding) and module is not embedding and context is not None:
            # some tables have two rows more than the context (OPT), which the model's forward adds itself
            found = context <= module.num_embeddings <= context + 2
            if found:
                return int(context)
    return None


def _sliding_window(config: PretrainedConfig) -> int | None:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    return window if isinstance(window, int) and (kinds is None or "sliding_attention" in kinds) else None
