"""A frozen linear whose weight is NF4 with double quantisation, by bitsandbytes' kernels.

Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314, section 3: blocks of 64 weights
share a scale, 16 levels at the quantiles of a normal distribution; the scales are 8-bit in blocks of 256, with a
float32 scale each. The weight is decoded for each product, in forward and again in backward, and never kept.

Not `bitsandbytes.nn.Linear4bit`: it casts the base's bias in place, and on a CPU with AVX512 repacks its weight at the
first inference. And the weight is one long row to its kernels: on a CPU, 0.50.2 decodes a matrix wrongly whose rows are
no multiple of 64 long (relative error 0.25 instead of 0.09 at 224).
"""

from typing import Any

import torch
from torch import Tensor

from spectune.compute.frozen import Context, FrozenLinear, Gradients, like, rows_of
from spectune.errors import ConfigError

BLOCK = 64
SCALES_BLOCK = 256
_PARTS = ("absmax", "nested_absmax", "offset", "nested_code")


def bitsandbytes_functions() -> Any:
    """`bitsandbytes.functional`. Raises ConfigError where it is not installed."""
    try:
        import bitsandbytes.functional as functions
    except ImportError as error:
        raise ConfigError(
            f"base_precision = nf4 needs bitsandbytes ({error}): pip install 'spectune[quantised]'. "
            "base_precision = int8 and fp8 need nothing more."
        ) from error
    return functions


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, shape: tuple[int, int], weight: Tensor, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(weight, *parts)
        ctx.shape = shape
        return like(rows_of(x) @ _decoded(weight, parts, shape, x.dtype).t(), x)

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> Gradients:
        [grad] = gradients
        weight, *parts = ctx.saved_tensors
        rows = rows_of(grad)
        dx = like(rows @ _decoded(weight, tuple(parts), ctx.shape, grad.dtype, after=rows), grad)
        return (dx, *(None for _ in range(2 + len(parts))))


def _decoded(
    weight: Tensor, parts: tuple[Tensor, ...], shape: tuple[int, int], dtype: torch.dtype, after: Tensor | None = None
) -> Tensor:
    """The weight `[out, in]` in `dtype`. Backward names its incoming gradient as `after`: no number depends on it, but
    to the compiler, which makes equal operations one and keeps what that gives from forward to backward, this is
    another operation than forward's, and one of backward alone."""
    found: Tensor = torch.ops.spectune.nf4_decode(weight, *parts, shape, dtype, after)
    return found


def _decode(
    weight: Tensor, absmax: Tensor, nested_absmax: Tensor, offset: Tensor, nested_code: Tensor,
    shape: list[int], dtype: torch.dtype, after: Tensor | None = None,
) -> Tensor:  # fmt: skip
    functions = bitsandbytes_functions()
    nested = functions.QuantState(absmax=nested_absmax, blocksize=SCALES_BLOCK, code=nested_code, dtype=torch.float32)
    state = functions.QuantState(
        absmax=absmax, shape=torch.Size((1, shape[0] * shape[1])), dtype=dtype, blocksize=BLOCK, quant_type="nf4",
        offset=offset, state2=nested,
    )  # fmt: skip
    found: Tensor = functions.dequantize_4bit(weight, state)
    return found.reshape(shape)


def _decode_meta(
    weight: Tensor, absmax: Tensor, nested_absmax: Tensor, offset: Tensor, nested_code: Tensor,
    shape: list[int], dtype: torch.dtype, after: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return weight.new_empty(shape, dtype=dtype)


# one operation to the compiler, which would otherwise see those of bitsandbytes
_LIBRARY: Any = torch.library.Library("spectune", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "nf4_decode(Tensor weight, Tensor absmax, Tensor nested_absmax, Tensor offset, Tensor nested_code, SymInt[] shape, "
    "ScalarType dtype, Tensor? after=None) -> Tensor"
)
_LIBRARY.impl("nf4_decode", _decode, "CompositeExplicitAutograd")
_LIBRARY.impl("nf4_decode", _decode_meta, "Meta")


class FrozenNf4Linear(FrozenLinear):
    """`weight` uint8, two weights a byte, `[in_features * out_features / 2, 1]`; the rest of the code in buffers."""

    precision = "nf4"

    def store(self, weight: Tensor) -> Tensor:
        stored: Tensor
        if weight.is_meta:
            scales = -(-weight.numel() // BLOCK)
            stored = weight.new_empty((weight.numel() + 1) // 2, 1, dtype=torch.uint8)
            floats = ((-(-scales // SCALES_BLOCK),), (), (256,))
            found = [stored.new_empty(scales), *(stored.new_empty(shape, dtype=torch.float32) for shape in floats)]
        else:
            stored, state = bitsandbytes_functions().quantize_4bit(
                weight.reshape(1, -1), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
            )
            found = [state.absmax, state.state2.absmax, state.offset, state.state2.code]
        for name, tensor in zip(_PARTS, found, strict=True):
            self.register_buffer(name, tensor.detach().clone())
        return stored

    def product(self, x: Tensor) -> Tensor:
        shape = (self.out_features, self.in_features)
        found: Tensor = _Product.apply(x, shape, self.weight, *self._parts())  # type: ignore[no-untyped-call]
        return found

    def dequantised(self) -> Tensor:
        return _decoded(self.weight, self._parts(), (self.out_features, self.in_features), torch.float32)

    def _parts(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in _PARTS)
