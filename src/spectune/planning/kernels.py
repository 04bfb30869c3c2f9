"""What the fused kernels of a device keep and take, for a trace on the meta device, where none of them runs.

A meta tensor goes through the plain path of `scaled_dot_product_attention` and `dropout`, which keeps other tensors
than the kernels that CUDA and the CPU choose. Inside `kernels_of(device)` these two functions do to meta tensors what
those kernels do to memory. Read from torch's sources: in aten/src/ATen/native, transformers/attention.cpp,
transformers/cuda/{sdp_utils.cpp,attention.cu,attention_backward.cu}, cudnn/MHA.cpp, Dropout.cpp.
"""

import contextlib
import functools
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from spectune.compute import fp8
from spectune.compute.cudnn import cudnn_allowed, why_not

HALF = (torch.float16, torch.bfloat16)


@contextlib.contextmanager
def kernels_of(device_type: str, *, cudnn: bool = True) -> Iterator[None]:
    """Inside, attention, dropout and fp8 products on meta tensors keep what the kernels of "cuda" or "cpu" would,
    cuDNN's for attention among them if `cudnn`. Tensors of any other device go where they always go."""
    attention, dropout = F.scaled_dot_product_attention, F.dropout

    def attend(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if query.device.type != "meta":
            return attention(query, *args, **kwargs)
        return attend_as(device_type, cudnn, query, *args, **kwargs)

    def drop(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        fused = device_type == "cuda" and training and 0 < p < 1 and input.device.type == "meta"
        if fused and not inplace:  # CUDA keeps one byte an element, the plain path a number
            kept: Tensor = torch.native_dropout(input, p, True)[0]
            return kept
        return dropout(input, p, training, inplace)

    products = fp8.meta_runs_as
    F.scaled_dot_product_attention, F.dropout, fp8.meta_runs_as = attend, drop, device_type
    try:
        yield
    finally:
        fp8.meta_runs_as = products
        F.scaled_dot_product_attention, F.dropout = attention, dropout


def attend_as(
    device_type: str, cudnn: bool, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, *args: Any, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """`scaled_dot_product_attention` of meta tensors: it keeps what the kernel keeps that the device takes, which may
    be cuDNN's if `cudnn` and the call is one that cuDNN may be given."""
    cudnn = cudnn and why_not(query, key, value, attn_mask, dropout_p, *args, **kwargs) is None
    kernel = kernel_for(device_type, query, key, value, attn_mask, dropout_p, cudnn=cudnn)
    out: Tensor
    if kernel == "math":
        plain = torch.ops.aten._scaled_dot_product_attention_math
        out = plain(query, key, value, attn_mask, dropout_p, *args, **kwargs)[0]
        return out
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:  # each call makes an additive mask of its own
            attn_mask = torch.where(attn_mask, 0.0, torch.full((), -math.inf, dtype=query.dtype, device="meta"))
        if kernel == "efficient" and attn_mask.shape[-1] % 16:
            attn_mask = F.pad(attn_mask, (0, -attn_mask.shape[-1] % 16))
    out = _Fused.apply(query, key, value, attn_mask, kernel, dropout_p)  # type: ignore[no-untyped-call]
    return out


def _outputs(query: Tensor, key: Tensor, value: Tensor, kernel: str, dropout_p: float) -> tuple[Tensor, Tensor]:
    """Output and sums of exponentials. One operation, as the kernels are, for what decides by operations what to keep
    (selective recomputation)."""
    batch, heads, length, _ = query.shape
    if kernel == "efficient" or value.shape[-1] != query.shape[-1]:
        out = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
    else:
        out = torch.empty_like(query)
    rows = -(-length // 32) * 32 if kernel == "efficient" else length
    return out, query.new_empty(batch, heads, rows, dtype=torch.float32)


_LIBRARY: Any = torch.library.Library("spectune", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "planned_attention(Tensor query, Tensor key, Tensor value, str kernel, float dropout_p) -> (Tensor, Tensor)",
    tags=(torch.Tag.nondeterministic_seeded,),  # as torch's own have
)
_LIBRARY.define(
    "planned_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor sums, "
    "str kernel) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("planned_attention", _outputs, "Meta")
_LIBRARY.impl("planned_attention_backward", lambda _, *given: tuple(map(torch.empty_like, given[:3])), "Meta")


@register_flop_formula(torch.ops.spectune.planned_attention)
def _operations(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """Of attention's two products, as torch counts them: by it the compiler decides what to keep within its budget."""
    batch, heads, length, dim = query
    return 2 * batch * heads * length * value[-2] * (dim + value[-1])


def scratch_of(query: Tensor, key: Tensor, value: Tensor, kernel: str) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the scratch space of a kernel's backward."""
    if kernel == "cpu-flash":
        return []
    shape = (*query.shape[:2], -(-query.shape[2] // 128) * 128)
    found = [((*shape, query.shape[3]), torch.float32), (shape, torch.float32)]
    if kernel == "flash" and key.shape[1] != query.shape[1]:  # gradients of each query's head, summed after
        found += [((t.shape[0], query.shape[1], *t.shape[2:]), t.dtype) for t in (key, value)]
    return found


def kernel_for(
    device_type: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float = 0.0, *,
    cudnn: bool = True,
) -> str:  # fmt: skip
    """The kernel that torch takes: "cudnn" (only if `cudnn`, and never where the user has switched it off), "flash",
    "efficient", "cpu-flash" or "math"."""
    dims = {query.shape[-1], value.shape[-1]}
    if device_type == "cpu":
        return "cpu-flash" if dropout == 0 and len(dims) == 1 else "math"
    if device_type != "cuda":
        return "math"
    half = query.dtype in HALF
    cudnn = cudnn and cudnn_allowed() and max(dims) <= cudnn_head_limit()
    if half and cudnn and all(dim % 8 == 0 for dim in dims):
        return "cudnn"
    if half and mask is None and len(dims) == 1 and max(dims) <= 256:
        return "flash"
    same_heads = query.shape[1] == key.shape[1]
    return "efficient" if same_heads and query.dtype in (*HALF, torch.float32) else "math"


@functools.cache
def cudnn_head_limit() -> int:
    """The widest head that goes to cuDNN, which torch tries first on Hopper and Blackwell; 0 where it does not. Of this
    machine's CUDA device, or of a Hopper where there is none."""
    if os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED"):
        return 0
    if not torch.cuda.is_available():
        return 256
    major, minor = torch.cuda.get_device_capability()
    if minor or (torch.backends.cudnn.version() or 0) <= 91500:  # type: ignore[no-untyped-call]
        return 0
    return {9: 256, 10: 128}.get(major, 0)


class _Fused(torch.autograd.Function):
    """The memory of a fused kernel: output and the sums of exponentials (float32, one a row and head) are kept beside
    the inputs; backward takes float32 room for the gradient of the queries, as its blocks are added up there. Output
    and gradients lie in memory as the inputs do (efficient attention's tokens first), which decides whether they are
    copied afterwards."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kernel: str, dropout_p: float
    ) -> Tensor:
        out: Tensor
        out, sums = torch.ops.spectune.planned_attention(query, key, value, kernel, dropout_p)
        ctx.save_for_backward(query, key, value, mask, out, sums)
        ctx.kernel = kernel
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, _, out, sums = ctx.saved_tensors
        room = scratch_of(query, key, value, ctx.kernel)
        scratch = [query.new_empty(shape, dtype=dtype) for shape, dtype in room]
        grads = torch.ops.spectune.planned_attention_backward(grad, query, key, value, out, sums, ctx.kernel)
        del scratch
        return (*grads, None, None, None)
