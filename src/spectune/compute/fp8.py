"""A frozen linear in fp8: both operands in float8 e4m3, one float32 scale for each row, products by the tensor cores.

Micikevicius et al. 2022, "FP8 Formats for Deep Learning", arXiv 2209.05433, has the format: e4m3 holds 1 sign, 4
exponent and 3 fraction bits, up to 448; rounding a normal number is off by at most 2^-4 of it. Scales are dynamic,
each row's largest magnitude becomes 448.

Forward, with `x = s_x x_q` by token and `W = s_w W_q` by output:  `y = (x_q W_qᵀ) s_x s_wᵀ`.
Backward sums over the outputs, where `s_w` is no common factor: it is folded into the gradient before that is
quantised by token,  `dx = (dy s_wᵀ)_q W_q · s_dy`.  The gradient is e4m3 too: its rows have scales of their own, so
that e5m2's wider range is not needed and its coarser rounding (2^-3) would only cost. There is no gradient of `W`, so
nothing of the input is kept for backward.

Quantisation is plain torch, so that a compiled block fuses it with what makes the rows; only the product is opaque.
"""

import torch
from torch import Tensor

from spectune.compute.frozen import Context, FrozenLinear, Gradients, like, rows_of
from spectune.errors import ConfigError

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
#: rows of smaller numbers than this are stored as zeros: its scale, 2^-109, can still be divided by
_TINY = 2.0**-100
#: sizes of both operands have to be multiples of this (torch._scaled_mm)
MULTIPLE = 16
#: sum products in the tensor cores' own registers: less exact than float32 sums, far below e4m3's rounding
_FAST_ACCUMULATION = True
#: the first CUDA devices with fp8 tensor cores (Ada)
_CAPABILITY = (8, 9)
#: for traces without data: which device's product a meta tensor goes through
meta_runs_as = "cuda"


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`(q, scale)` with `x = q * scale`, rounded: `q` float8 e4m3 `[..., n]`, `scale` float32 `[..., 1]`.

    NaN and infinity stay visible: the whole row becomes NaN.
    """
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=_TINY) / LARGEST
    # no clamp: rounding of the quotient passes 448 by far less than the 464 that the cast still rounds down
    return (x.float() / scale).to(FLOAT8), scale


def scaled_product(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor) -> Tensor:
    """`(a * scale_a) @ (b * scale_b)ᵀ`.

    Args:
        a, b: float8 e4m3, `[n, k]` and `[m, k]`, both row-major.
        scale_a, scale_b: float32, `[n, 1]` and `[m, 1]`.

    Returns:
        `[n, m]`: bfloat16 on CUDA; elsewhere float32, from float32 copies of both operands, which is exact but for
        the order of the sums, and slow.
    """
    device = meta_runs_as if a.device.type == "meta" else a.device.type
    return _kernel(a, scale_a, b, scale_b) if device == "cuda" else _reference(a, scale_a, b, scale_b)


def _kernel(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor) -> Tensor:
    # b column-major, as the kernels want it
    found: Tensor = torch._scaled_mm(
        a, b.t(), scale_a=scale_a, scale_b=scale_b.t(), out_dtype=torch.bfloat16, use_fast_accum=_FAST_ACCUMULATION
    )
    return found


def _reference(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor) -> Tensor:
    return (a.float() @ b.float().t()) * scale_a * scale_b.t()


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return like(scaled_product(*quantise_rows(rows_of(x)), weight, scale), x)

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> Gradients:
        [grad] = gradients
        weight, scale = ctx.saved_tensors
        folded = rows_of(grad).float() * scale.t()
        # a second copy of the weight for the time of this product: two kept ones would be as large as bfloat16
        turned = weight.t().contiguous()
        ones = torch.ones_like(turned[:, :1], dtype=torch.float32)
        return like(scaled_product(*quantise_rows(folded), turned, ones), grad), None, None


class FrozenFp8Linear(FrozenLinear):
    """`weight` float8 e4m3 `[out_features, in_features]`, `weight_scale` float32 `[out_features, 1]`."""

    precision = "fp8"
    weight_scale: Tensor

    def store(self, weight: Tensor) -> Tensor:
        stored, scale = quantise_rows(weight)
        self.register_buffer("weight_scale", scale)
        return stored.contiguous()

    def product(self, x: Tensor) -> Tensor:
        found: Tensor = _Product.apply(x, self.weight, self.weight_scale)  # type: ignore[no-untyped-call]
        return found

    def dequantised(self) -> Tensor:
        return self.weight.float() * self.weight_scale


def check_device(device: torch.device, dtype: torch.dtype) -> None:
    """Whether products in fp8 run on this device, for a base that otherwise computes in `dtype`. Raises ConfigError: it
    has no fp8 tensor cores, or the base is not in bfloat16, which is what they give out."""
    if device.type in ("cpu", "meta"):
        return
    if device.type != "cuda":
        raise ConfigError(
            f"base_precision = fp8: there are no fp8 products on {device.type}; use base_precision = int8, or cuda"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        have, need = (".".join(map(str, pair)) for pair in (capability, _CAPABILITY))
        raise ConfigError(
            f"base_precision = fp8 needs a CUDA device of compute capability {need} or newer (Ada, Hopper, Blackwell); "
            f"{torch.cuda.get_device_name(device)} has {have}. Use base_precision = nf4 or int8 there."
        )
    if dtype != torch.bfloat16:
        raise ConfigError(
            f"base_precision = fp8 gives out bfloat16 on CUDA, and this base computes in {dtype}: load it with dtype "
            "bfloat16 (or auto, which takes that)"
        )
