"""Caches and what virtual tokens make of them: whose they are, how many, and the room that they need."""

from collections.abc import Iterable
from typing import Any

import torch

from spectune.errors import ConfigError

#: transformers 5.2x calls it `cache`, earlier ones `past_key_values` or, of state-space layers alone, `cache_params`
CACHE_NAMES = ("cache", "past_key_values", "cache_params")
#: what decoders without a cache are given of the passes before
OTHER_STATES = ("state", "mems", "past_buckets_states")
_FILLED = "_spectune_filled"
_LENGTH = "_spectune_length"


def caches_in(output: Any) -> list[Any]:
    """The caches that a model gives back. Where it has the new name, the old ones warn."""
    names = CACHE_NAMES[:1] if hasattr(output, CACHE_NAMES[0]) else CACHE_NAMES[1:]
    caches = [getattr(output, name, None) for name in names]
    return [cache for cache in caches if cache is not None]


def check_cache(cache: Any, first: bool, in_sequence: int, names: tuple[str | None, ...]) -> None:
    """A cache that holds virtual tokens belongs to the route that put them there: note it, and hold later calls to it.
    Raises ConfigError: the cache was filled under another route, so that text and virtual tokens cannot be told
    apart."""
    if cache is None or torch.compiler.is_compiling():
        return
    filled = getattr(cache, _FILLED, None)
    if first:
        if in_sequence:
            setattr(cache, _FILLED, names)
        elif filled is not None:
            delattr(cache, _FILLED)
        return
    if (filled is not None or in_sequence) and filled != names:
        raise ConfigError(
            f"this cache was filled under the route {_show(filled)} and the route is now {_show(names)}: the virtual "
            "tokens in it are not this route's. Use a cache for each route."
        )


def carries_other_state(names: Iterable[str]) -> str | None:
    """The argument by which a decoder that has no cache carries its state from pass to pass; None where it has none."""
    given = list(names)
    if any(name in CACHE_NAMES for name in given):
        return None
    return next((name for name in OTHER_STATES if name in given), None)


def seen_in(cache: Any) -> Any:
    """Places in a cache, virtual tokens included. Caches of state-space layers alone do not count them: we do."""
    try:
        return cache.get_seq_length()
    except (ValueError, AttributeError):
        return getattr(cache, _LENGTH, 0)


def note_length(cache: Any, length: Any) -> None:
    """Count for a cache that does not itself."""
    if cache is not None and not any(hasattr(layer, "keys") for layer in getattr(cache, "layers", [])):
        setattr(cache, _LENGTH, length)


def make_room(cache: Any, extra: int, length: int) -> None:
    """A static cache is as long as the text that `generate` was asked for: it needs `extra` more places."""
    for layer in getattr(cache, "layers", []):
        longest = getattr(layer, "max_cache_len", None)
        if longest is None or getattr(layer, "is_sliding", False):
            continue
        if not getattr(layer, "is_initialized", True):
            layer.max_cache_len = longest + extra
        elif length > longest:
            raise ConfigError(
                f"the static cache has {longest} places, text and virtual tokens need {length}; "
                f"make it at least {extra} longer than the text (max_cache_len)"
            )


def _show(names: tuple[str | None, ...] | None) -> str:
    if names is None:
        return "of no prompt"
    return repr(names[0]) if len(names) == 1 else repr(list(names))
