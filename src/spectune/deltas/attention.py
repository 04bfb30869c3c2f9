"""The attention function, registered with transformers, that puts learned keys and values before a layer's own.

It works at the last moment, on the keys and values that attention is about to use: after rotary positions, after the
cache. So gradient checkpointing, caches of any kind and `generate` need to know nothing of prefixes. A mask function
is registered too: without one, transformers passes no mask at all to a custom attention function.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from spectune.compute.masks import widen_mask
from spectune.deltas.modules import AttentionModule
from spectune.deltas.sites import get
from spectune.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from spectune.deltas.registry import Registry

SUPPORTED = ("eager", "sdpa")
_PREFIX = "spectune_"


def switch_on(model: PreTrainedModel) -> str:
    """Set the model's attention to the function that knows prefixes; returns the plain name of what it had.

    Raises:
        ConfigError: the model's attention is neither eager nor SDPA, or the type has no exchangeable attention.
    """
    before = implementation(model).removeprefix(_PREFIX)
    if before not in SUPPORTED:
        raise ConfigError(
            f"prefix tuning works with eager and SDPA attention; this model uses {before!r}. "
            "Call model.set_attn_implementation('sdpa') first."
        )
    model.set_attn_implementation(_PREFIX + before)
    if not is_on(model):
        raise ConfigError(
            f"{type(model).__name__} does not use transformers' attention interface, so keys and values cannot be put "
            "before its own: prefix tuning is refused. Use another method (lora, adapter, prompt)."
        )
    return before


def implementation(model: PreTrainedModel) -> str:
    """The name of the attention function in force."""
    return str(model.config.get_text_config()._attn_implementation)


def is_on(model: PreTrainedModel) -> bool:
    """Whether the function that knows prefixes is in force."""
    return implementation(model).startswith(_PREFIX)


def listen(module: nn.Module, registry: Registry) -> None:
    """Let an attention module's function know the model's registry."""
    module._spectune_registry = registry  # type: ignore[assignment]


def stop_listening(module: nn.Module) -> None:
    module.__dict__.pop("_spectune_registry", None)


def _with_prefix(
    attend: Any,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    registry = module.__dict__.get("_spectune_registry")
    if registry is not None:
        if registry.attention_calls is not None:
            registry.attention_calls[id(module)] = (key.detach(), value.detach())
        key, value, attention_mask = _put_before(module, registry, query, key, value, attention_mask, kwargs)
    result: tuple[Tensor, Tensor | None] = attend(module, query, key, value, attention_mask, **kwargs)
    return result


def _put_before(
    module: nn.Module,
    registry: Registry,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    settings: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values and mask with each row's prefix in front. Shorter prefixes are filled up with hidden places."""
    route = registry.current
    rows = registry.rows(key.shape[0]) if route.mixed else None
    names = route.names[:1] if rows is None else rows.names
    found = {name: get(module, name) for name in dict.fromkeys(names)}
    prefixes = {name: prefix for name, prefix in found.items() if isinstance(prefix, AttentionModule)}
    if not prefixes:
        return key, value, mask
    made = {name: prefix() for name, prefix in prefixes.items()}
    longest = max(keys.shape[1] for keys, _ in made.values())
    window = settings.get("sliding_window")
    pieces = [
        _piece(prefixes.get(name), made.get(name), longest, query, key, value, registry, window) for name in names
    ]
    keys, values, visible = (torch.stack(parts) for parts in zip(*pieces, strict=True))
    batch = key.shape[0]
    mask = widen_mask(mask, query.shape[2], key.shape[2], visible[:, None])
    key = torch.cat([keys.expand(batch, -1, -1, -1), key], dim=2)
    value = torch.cat([values.expand(batch, -1, -1, -1), value], dim=2)
    return key, value, mask


def _piece(
    prefix: AttentionModule | None,
    made: tuple[Tensor, Tensor] | None,
    longest: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    registry: Registry,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One row's keys and values `[heads, longest, dim]`, and which are visible: boolean `[queries, longest]`."""
    if prefix is None or made is None:
        return (
            key.new_zeros(key.shape[1], longest, key.shape[3]),
            value.new_zeros(value.shape[1], longest, value.shape[3]),
            torch.zeros(query.shape[2], longest, dtype=torch.bool, device=key.device),
        )
    prefix_key, prefix_value = (part.to(like.dtype) for part, like in zip(made, (key, value), strict=True))
    count = prefix_key.shape[1]
    place = torch.arange(longest, device=key.device) - (longest - count)
    visible = (place >= 0).expand(query.shape[2], -1)
    if prefix.slides and window is not None:
        # the prefix counted as tokens 0 to count - 1 of the sequence, the text after it
        here = count + registry.rows(key.shape[0]).seen + torch.arange(query.shape[2], device=key.device)
        visible = visible & (place > here[:, None] - window)
    if count < longest:
        prefix_key, prefix_value = (F.pad(part, (0, 0, longest - count, 0)) for part in (prefix_key, prefix_value))
    return prefix_key, prefix_value, visible


def _sdpa(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    return _with_prefix(sdpa_attention_forward, module, *args, **kwargs)


def _eager(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    # eager attention is each modeling file's own (soft caps, sinks): take it from where the module's class stands
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if own is None:
        raise ConfigError(
            f"{type(module).__name__} has no eager attention function that keys could be given to; "
            "call model.set_attn_implementation('sdpa') before attach"
        )
    return _with_prefix(own, module, *args, **kwargs)


def _sdpa_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    # always a real mask: SDPA's causal flag is aligned to the top left, wrong once keys stand in front
    kwargs["allow_is_causal_skip"] = False
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


AttentionInterface.register("spectune_sdpa", _sdpa)
AttentionInterface.register("spectune_eager", _eager)
AttentionMaskInterface.register("spectune_sdpa", _sdpa_mask)
AttentionMaskInterface.register("spectune_eager", eager_mask)
