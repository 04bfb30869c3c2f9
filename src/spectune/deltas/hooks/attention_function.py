"""The attention function, registered with transformers, that puts learned keys and values before a layer's own, and
keeps the documents of a packed batch apart.

It works at the last moment, on the keys and values that attention is about to use: after rotary positions, after the
cache. So gradient checkpointing, caches of any kind and `generate` need to know nothing of prefixes. A mask function
is registered too: without one, transformers passes no mask at all to a custom attention function.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from spectune.compute.masks import mask_of_none, widen_mask
from spectune.deltas.forward_state import ForwardState
from spectune.deltas.hooks import packed_attention, prefix_kernel
from spectune.deltas.hooks.prefix_kernel import attends_causally
from spectune.deltas.layout import BatchLayout
from spectune.deltas.modules import AttentionModule
from spectune.deltas.slots import get
from spectune.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUPPORTED = ("eager", "sdpa")
PREFIX = "spectune_"


class _Running(threading.local):
    """The model whose forward pass runs on this thread. transformers asks a mask function of no model: the decoder's
    entry says which one it is, and its exit takes that back."""

    def __init__(self) -> None:
        self.state: ForwardState | None = None


running = _Running()


def switch_on(model: PreTrainedModel, what: str = "prefix tuning") -> str:
    """Set the model's attention to the function that knows prefixes and packs; returns the plain name of what it had.
    `what` needs it. Raises ConfigError: the model's attention is neither eager nor SDPA, or the type has no
    exchangeable attention."""
    before = implementation(model).removeprefix(PREFIX)
    if before not in SUPPORTED:
        raise ConfigError(
            f"{what} works with eager and SDPA attention; this model uses {before!r}. "
            "Call model.set_attn_implementation('sdpa') first."
        )
    model.set_attn_implementation(PREFIX + before)
    if not is_on(model):
        raise ConfigError(
            f"{type(model).__name__} does not use transformers' attention interface, so keys and values cannot be put "
            f"before its own, nor documents told apart: {what} is refused."
            + (" Use another method (lora, adapter, prompt)." if what == "prefix tuning" else "")
        )
    return before


def implementation(model: PreTrainedModel) -> str:
    """The name of the attention function in force."""
    return str(model.config.get_text_config()._attn_implementation)


def is_on(model: PreTrainedModel) -> bool:
    """Whether the function that knows prefixes is in force."""
    return implementation(model).startswith(PREFIX)


def listen(module: nn.Module, state: ForwardState) -> None:
    """Let an attention module's function find the forward state of its model."""
    module._spectune_state = state  # type: ignore[assignment]


def stop_listening(module: nn.Module) -> None:
    module.__dict__.pop("_spectune_state", None)


def _with_prefix(
    attend: Any, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """An attention function: `attend` with each row's prefix before the keys, and documents kept apart."""
    state: ForwardState | None = module.__dict__.get("_spectune_state")
    if state is not None and not state.current.cached:
        if state.thread.attention_calls is not None:
            state.thread.attention_calls[id(module)] = (key.detach(), value.detach())
        pack = state.pack
        if pack is not None and attention_mask is None:  # the mask function left it to the kernel
            causal = attends_causally(module, query, kwargs)
            found = (
                packed_attention.attend(pack, query, key, value, _prefixes(module, state), kwargs) if causal else None
            )
            if found is not None:
                if state.thread.kernel_calls is not None:
                    state.thread.kernel_calls.add(id(module))
                return found
            attention_mask = pack.mask(kwargs.get("sliding_window"), causal=causal)
        route = state.current
        names = dict.fromkeys(route.names) if attention_mask is None else {}
        acting = any(isinstance(get(module, name), AttentionModule) for name in names)
        if acting and attend is sdpa_attention_forward:
            if attends_causally(module, query, kwargs):  # a static cache that is empty yet: transformers cuts it, too
                key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
            one = None if route.mixed else get(module, route.name)
            if isinstance(one, AttentionModule) and prefix_kernel.fits(module, query, key, one.slides, kwargs):
                return prefix_kernel.attend(attend, module, query, key, value, one(), kwargs)
        if acting:
            attention_mask = _mask_of_none(attend, module, query, key, kwargs)
        if not route.bare:
            key, value, attention_mask = _put_before(module, state, query, key, value, attention_mask, kwargs)
    result: tuple[Tensor, Tensor | None] = attend(module, query, key, value, attention_mask, **kwargs)
    return result


def _prefixes(module: nn.Module, state: ForwardState) -> list[tuple[Tensor, Tensor] | None]:
    """Each row's prefix at this attention, one for all where they are of one delta."""
    route, layout = state.current, state.layout
    names = layout.names if route.mixed and layout is not None else route.names[:1]
    found = {name: get(module, name) for name in dict.fromkeys(names)}
    made = {name: prefix() for name, prefix in found.items() if isinstance(prefix, AttentionModule)}
    return [made.get(name) for name in names]


def _mask_of_none(attend: Any, module: nn.Module, query: Tensor, key: Tensor, settings: dict[str, Any]) -> Tensor:
    """The mask of attention that came without one, as `attend` would have understood that."""
    queries, keys = query.shape[2], key.shape[2]
    if attend is not sdpa_attention_forward:  # eager attention hides nothing of its own accord
        return mask_of_none(queries, keys, causal=False, dtype=query.dtype, device=query.device)
    causal = attends_causally(module, query, settings)
    return mask_of_none(queries, keys, causal=causal, dtype=torch.bool, device=query.device)


def _put_before(
    module: nn.Module, state: ForwardState, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
    settings: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Keys, values and mask with each row's prefix in front. Shorter prefixes are filled up with hidden places."""
    route = state.current
    names = state.layout_of(key.shape[0]).names if route.mixed else route.names[:1]
    found = {name: get(module, name) for name in dict.fromkeys(names)}
    prefixes = {name: prefix for name, prefix in found.items() if isinstance(prefix, AttentionModule)}
    if not prefixes:
        return key, value, mask
    made = {name: prefix() for name, prefix in prefixes.items()}
    counts = [made[name][0].shape[1] if name in made else 0 for name in names]
    layout = state.layout_of(key.shape[0])
    longest, batch = max(counts), key.shape[0]
    filled = {
        name: [_lengthened(part.to(text.dtype), longest) for part, text in zip(pair, (key, value), strict=True)]
        for name, pair in made.items()
    }
    none = [part.new_zeros(part.shape[1], longest, part.shape[3]) for part in (key, value)]
    keys, values = (torch.stack([filled.get(name, none)[side] for name in names]) for side in (0, 1))

    # which token of its prefix stands at each place, `[rows or 1, longest]`; negative where there is none
    place = torch.arange(longest, device=key.device) - (longest - _column(layout, counts, key.device))
    visible = (place >= 0)[:, None].expand(-1, query.shape[2], -1)
    window = settings.get("sliding_window")
    slides = [name in prefixes and prefixes[name].slides for name in names]
    if window is not None and any(slides):
        visible = visible & _within_window(layout, place, counts, slides, query, window)
    assert mask is not None, "where there is a prefix, there is a mask"
    mask = widen_mask(mask, visible[:, None])
    key = torch.cat([keys.expand(batch, -1, -1, -1), key], dim=2)
    value = torch.cat([values.expand(batch, -1, -1, -1), value], dim=2)
    return key, value, mask


def _lengthened(part: Tensor, length: int) -> Tensor:
    """Keys or values with zeros before a shorter prefix."""
    # filled up with none it would be copied
    return part if part.shape[1] == length else F.pad(part, (0, 0, length - part.shape[1], 0))


def _within_window(
    layout: BatchLayout, place: Tensor, counts: list[int], slides: list[bool], query: Tensor, window: int
) -> Tensor:
    """Where a sliding window reaches the prefix counted as the first tokens of the sequence, right before the text:
    boolean `[rows or batch, queries, longest]`."""
    device = query.device
    text = torch.arange(query.shape[2], device=device) + layout.seen - layout.virtual
    if layout.pack is not None:
        text = layout.pack.positions
    here = text + _column(layout, counts, device)
    if layout.padding is not None:
        here = here - layout.padding
    reached = place[:, None] > here[..., None] - window
    return reached | ~_column(layout, slides, device).bool()[..., None]


def _column(layout: BatchLayout, values: Sequence[int], device: torch.device) -> Tensor:
    """`[rows or 1, 1]`, int64. One for all where all are alike: it is made on the device, and copied nowhere; others
    are copied once for all passes of the route."""
    if len(set(values)) == 1:
        return torch.full((1, 1), int(values[0]), device=device)
    return layout.grouping.numbers.whole(device, values)[:, None]


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
    pack = None if running.state is None else running.state.pack
    if pack is not None:
        if pack.kernel is not None and packed_attention.is_plain(kwargs):
            return None  # attention keeps the documents apart
        return packed_attention.mask_of(sdpa_mask, pack, kwargs)
    if running.state is not None and running.state.thread.attention_calls is not None:
        # keys and values that deltas start from are the same with eager attention, where `is_causal` says nothing
        kwargs["allow_is_causal_skip"] = False
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


def _eager_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    pack = None if running.state is None else running.state.pack
    if pack is not None:
        return packed_attention.mask_of(eager_mask, pack, kwargs)
    mask: Tensor | None = eager_mask(*args, **kwargs)
    return mask


AttentionInterface.register("spectune_sdpa", _sdpa)
AttentionInterface.register("spectune_eager", _eager)
AttentionMaskInterface.register("spectune_sdpa", _sdpa_mask)
AttentionMaskInterface.register("spectune_eager", _eager_mask)
