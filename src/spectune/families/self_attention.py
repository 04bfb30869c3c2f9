"""A layer's attention: which of its modules that is, and the sizes of its keys and values."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from spectune.families.module_kinds import linear_shape
from spectune.families.parts import Slice, projections


@dataclass(frozen=True)
class Attention:
    """A self-attention module. Keys are `[batch, kv_heads, length, key_dim]`, values end in `value_dim`.

    `keys` and `values`: the outputs of its linears that they are made of, as names and shapes tell (fused projections
    are taken to be queries, keys, values one after the other); None where they do not tell."""

    path: str
    layer: int
    hidden_size: int
    kv_heads: int
    key_dim: int
    value_dim: int
    keys: Slice | None = None
    values: Slice | None = None


def attention_names(layer: nn.Module, path: str, beside: frozenset[str], *, by_class: bool = False) -> list[str]:
    """Attention is a module that knows its layer's number, is causal or has groups of heads, and owns projections.
    `by_class`: take what is called attention by its class instead; for types that are not written that way."""
    found: list[str] = []
    for name, module in layer.named_modules():
        if not name or f"{path}.{name}" in beside or any(name.startswith(outer + ".") for outer in found):
            continue
        causal = hasattr(module, "is_causal") or hasattr(module, "num_key_value_groups")
        named = "attention" in type(module).__name__.lower()
        if (named if by_class else causal and hasattr(module, "layer_idx")) and _owns_projections(module):
            found.append(name)
    return found


def _owns_projections(module: nn.Module) -> bool:
    """Linears of its own, or wrapped in modules that hold one each."""
    children = list(module.children())
    wrapped = [next(child.children()) for child in children if len(list(child.children())) == 1]
    return any(linear_shape(child) is not None for child in [*children, *wrapped])


def attention_of(module: nn.Module, path: str, layer: int, hidden: int, config: PretrainedConfig) -> Attention:
    """The sizes of an attention module: its own attributes if it has them, as layers may differ; else the config's."""
    heads = _number(module, "num_heads", "num_attention_heads") or _number(config, "num_attention_heads") or 1
    groups = _number(module, "num_key_value_groups")
    kv_heads = heads // groups if groups else _number(module, "num_key_value_heads", "num_kv_heads")
    kv_heads = kv_heads or _number(config, "num_key_value_heads") or heads
    key_dim = _number(module, "qk_head_dim", "head_dim") or _number(config, "head_dim") or hidden // heads
    value_dim = _number(module, "v_head_dim") or key_dim
    keys, values = projections(module, path, heads * key_dim, kv_heads * key_dim)
    if value_dim != key_dim:  # latent attention makes both of one projection, head by head
        keys = values = None
    return Attention(path, layer, hidden, kv_heads, key_dim, value_dim, keys, values)


def _number(owner: Any, *names: str) -> int | None:
    for name in names:
        try:
            value = getattr(owner, name, None)
        except Exception:  # a config whose layers differ in it refuses to name one value
            value = None
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
