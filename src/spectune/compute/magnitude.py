"""A linear map's output with each of its features scaled by a trained number, keeping one wide tensor for backward."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def scale_features(y: Tensor, change: Tensor, ratio: Tensor, bias: Tensor | None) -> Tensor:
    """`bias + ratio * z` with `z = y - bias + change`; where `ratio` is 1 and `change` 0 it is `y`, bit for bit.

    The gradient of `ratio` is the sum of `gradient * z` over tokens. Plain autograd keeps both `y` and `change` for it.
    Here it is `z`; and without a bias nothing of its own: `ratio * z` is the output, which whatever comes next (a
    gate, attention) mostly keeps anyway, so the sum is taken with that and divided by `ratio` after. With a bias that
    would lose all digits where `ratio` is small.

    Args:
        y, change: `[..., features]`, of one floating dtype.
        ratio: `[features]` float32, or `[rows, 1, features]` for `y` `[rows, tokens, features]`.
        bias: as `ratio`, of any dtype, no gradient; None is none.

    Returns:
        `[..., features]`, in the dtype of `y`. The gradient of `ratio` is float32, and 0 where `ratio` is 0 and there
        is no bias.
    """
    if not torch.is_grad_enabled():
        return _scaled(y, change, ratio, bias)[0]
    out: Tensor = _ScaleFeatures.apply(y, change, ratio, bias)  # type: ignore[no-untyped-call]
    return out


def _scaled(y: Tensor, change: Tensor, ratio: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """What comes out, and `z`."""
    # in float32 until the end: near 1 a ratio of 16 bits would move in steps of 0.4%
    if bias is None:
        z = y + change
        return _cast(z * ratio, y.dtype), z
    z = y - bias.to(y.dtype) + change
    return _cast((z * (ratio - 1)).add_(y) + change, y.dtype), z


class _ScaleFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, change: Tensor, ratio: Tensor, bias: Tensor | None) -> Tensor:
        out, z = _scaled(y, change, ratio, bias)
        ctx.save_for_backward(out if bias is None else z, ratio)
        ctx.plain = bias is None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        kept, ratio = ctx.saved_tensors
        below = gradient * ratio.to(gradient.dtype) if any(ctx.needs_input_grad[:2]) else None
        total = None
        if ctx.needs_input_grad[2]:
            total = gradient * kept
            if ratio.dim() == 1:
                total = total.flatten(0, -2).sum(0, dtype=torch.float32)
            else:
                total = total.sum(1, keepdim=True, dtype=torch.float32)
            if ctx.plain:
                total = torch.where(ratio == 0, 0.0, total / ratio)
        wanted = ctx.needs_input_grad
        return below if wanted[0] else None, below if wanted[1] else None, total, None


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Where there is nothing to cast, `to` gives back the tensor itself, as operations in place do: compiled by torch
    2.11, the output of a `forward` that ends with such a one has no gradient, without a word."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
