"""The attention function of decoding steps, registered with transformers: what a block was given as `FILLED` says how
much of each row's cache is filled. Passes that were given none run through the function that was in force before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from spectune.compute.decode_attention import attend_by_length, attend_by_mask, takes_lengths
from spectune.deltas.hooks.attention_function import implementation
from spectune.deltas.hooks.prefix_kernel import BEYOND_KERNELS
from spectune.errors import ConfigError

#: the keyword of a `Filled` that blocks hand on to their attention
FILLED = "spectune_filled"
#: attention functions that end in SDPA
_KNOWN = ("sdpa", "spectune_sdpa")
_ENDING = "_step"


class Filled(NamedTuple):
    """Of keys and values of the whole cache, which ones this step sees.

    Attributes:
        lengths: int32 `[rows]`, how many of its first places each row has filled, the new token's included.
        begins: int32 `[2, rows + 1]`, numbers of rows, and of the first place of each in a cache that is one long row.
        capacity: no row has more; as many places as the step's masks have.
    """

    lengths: Tensor
    begins: Tensor
    capacity: int

    @classmethod
    def of(cls, places: Tensor, most_places: int, capacity: int) -> Filled:
        """`places`: int64 `[rows]`, where each row's new token goes, of `most_places` that a row has."""
        numbers = torch.arange(places.shape[0] + 1, dtype=torch.int32, device=places.device)
        return cls((places + 1).to(torch.int32), torch.stack([numbers, numbers * most_places]), capacity)


@contextlib.contextmanager
def step_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside the `with`, blocks that are given `FILLED` attend by it; the model's attention is as it was after it.
    Raises ConfigError: the model's attention is none that is known here."""
    before = known_attention(model)
    try:
        model.set_attn_implementation(before + _ENDING)
        if implementation(model) != before + _ENDING:
            raise ConfigError(f"{type(model).__name__} does not use transformers' attention interface")
        yield
    finally:
        model.set_attn_implementation(before)


def known_attention(model: PreTrainedModel) -> str:
    """The name of the model's attention function. Raises ConfigError: it is none that ends in SDPA."""
    found = implementation(model)
    if found not in _KNOWN:
        raise ConfigError(f"{type(model).__name__} attends by {found!r}; expected one of {', '.join(_KNOWN)}")
    return found


def _attend(
    before: Callable[..., tuple[Tensor, Tensor | None]], module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
    attention_mask: Tensor | None, **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """An attention function. `key`, `value`: of the whole cache, where there is something `FILLED`."""
    filled: Filled | None = kwargs.pop(FILLED, None)
    if filled is None:
        return before(module, query, key, value, attention_mask, **kwargs)
    plain = not any(kwargs.get(name) is not None for name in BEYOND_KERNELS)
    scale, window = kwargs.get("scaling"), kwargs.get("sliding_window")
    if plain and (window is None or filled.capacity <= window) and takes_lengths(query, key, value):
        return attend_by_length(query, key, value, *filled, scale=scale), None
    key, value = key[:, :, : filled.capacity], value[:, :, : filled.capacity]
    if plain:
        return attend_by_mask(query, key, value, attention_mask, scale=scale), None
    return before(module, query, key, value, attention_mask, **kwargs)


def _register() -> None:
    functions: Any = AttentionInterface
    masks: Any = AttentionMaskInterface
    for name in _KNOWN:
        AttentionInterface.register(name + _ENDING, partial(_attend, functions()[name]))
        AttentionMaskInterface.register(name + _ENDING, masks()[name])


_register()
