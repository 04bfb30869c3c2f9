"""Tensors of several modules laid into one, smaller ones filled up with zeros, in a few operations however many there
are: on a device, what a small operation costs is its launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spectune.deltas.device_numbers import DeviceNumbers

_Shapes = tuple[torch.Size, ...]
#: numbers of a stack up to which places are kept, 8 bytes for each; what is larger takes longer than its launches
MOST_PLACES = 1 << 22


@dataclass(frozen=True, eq=False)
class _Places:
    """Where numbers go, int32. `filled`: of each number of the stack its place among all that were given, one behind
    the other, and behind them `zero`. `back`: of each number given its place in the stack."""

    filled: Tensor
    back: Tensor
    zero: Tensor


class Stacking:
    """Stacks tensors. What it needs on the device it puts there once, and keeps: what is captured reads it again."""

    def __init__(self) -> None:
        self._numbers = DeviceNumbers()
        self._kept: dict[tuple[_Shapes, torch.dtype, torch.device], _Places] = {}

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        """`[tensors, ...]` of one dtype, each filled up with zeros to the largest sizes; gradients flow."""
        if len(tensors) == 1:
            return tensors[0][None]
        shapes = tuple(tensor.shape for tensor in tensors)
        alike, most = len(set(shapes)) == 1, _most(shapes)
        # a compiler fuses these
        if torch.compiler.is_compiling() or (not alike and len(shapes) * most.numel() > MOST_PLACES):
            return torch.stack([_filled(tensor, most) for tensor in tensors])
        places = None if alike else self._places(shapes, tensors[0])
        made: Tensor = _Stack.apply(places, *tensors)  # type: ignore[no-untyped-call]
        return made

    def column(self, values: Sequence[float], device: torch.device) -> Tensor:
        """`[values, 1, 1]`, float32."""
        return self._numbers.real(device, values)[:, None, None]

    def _places(self, shapes: _Shapes, like: Tensor) -> _Places:
        key = shapes, like.dtype, like.device
        found = self._kept.get(key)
        if found is None:
            with torch.inference_mode(False):  # a later pass may want gradients
                found = self._kept[key] = _places(shapes, like)
        return found


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, places: _Places | None, *tensors: Tensor) -> Tensor:
        ctx.places, ctx.shapes = places, tuple(tensor.shape for tensor in tensors)
        if places is None:
            return torch.stack(tensors)
        row = torch.cat([*(tensor.reshape(-1) for tensor in tensors), places.zero])
        return row.index_select(0, places.filled).view(len(tensors), *_most(ctx.shapes))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # contiguous, so that each is taken as a weight's gradient as it is
        if ctx.places is None:
            return None, *gradient.contiguous().unbind()
        row = gradient.reshape(-1).index_select(0, ctx.places.back)
        parts = torch.split(row, [shape.numel() for shape in ctx.shapes])
        return None, *(part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True))


def _places(shapes: _Shapes, like: Tensor) -> _Places:
    sizes = _most(shapes)
    numbers = torch.arange(len(shapes) * sizes.numel(), dtype=torch.int32).view(len(shapes), *sizes)
    back = torch.cat(
        [of[tuple(map(slice, shape))].reshape(-1) for of, shape in zip(numbers, shapes, strict=True)]
    )  # fmt: skip
    filled = torch.full((numbers.numel(),), back.numel(), dtype=torch.int32)
    filled[back.long()] = torch.arange(back.numel(), dtype=torch.int32)
    zero = torch.zeros(1, dtype=like.dtype, device=like.device)
    return _Places(filled.to(like.device), back.to(like.device), zero)


def _most(shapes: _Shapes) -> torch.Size:
    return torch.Size(max(sizes) for sizes in zip(*shapes, strict=True))


def _filled(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    missing = [size - own for size, own in zip(sizes, tensor.shape, strict=True)]
    return F.pad(tensor, [end for size in reversed(missing) for end in (0, size)])
