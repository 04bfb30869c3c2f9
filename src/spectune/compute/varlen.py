"""Causal attention over documents of various lengths that stand one after the other, without a mask.

On CUDA it is PyTorch's `torch.nn.attention.varlen.varlen_attn`, which calls flash attention (Dao 2023, arXiv
2307.08691). Where a document has more keys than queries, the last query sees the last key (flash attention 2.1 and
later align causal masks to the bottom right; so does PyTorch's copy: see `check_flash_causal_non_square_seqlens` in its
sdp_utils and `CausalBias._dispatch` in torch/nn/attention/bias.py).
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spectune.compute.pack_layout import Spans

FLASH_DTYPES = (torch.float16, torch.bfloat16)


def flash_takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether flash attention takes these `[..., dim]`: on CUDA from Ampere on, in 16 bits, one head size for keys and
    values, a multiple of 8, at most 256 (192 with gradients where shared memory is small: PyTorch's sdp_utils)."""
    dim, kind = query.shape[-1], query.device.type
    if query.dtype not in FLASH_DTYPES or not key.dtype == value.dtype == query.dtype:
        return False
    if dim % 8 or dim > 256 or value.shape[-1] != dim or kind not in ("cuda", "meta"):
        return False
    if kind == "meta":  # a plan; the run itself checks the CUDA device
        return True
    capability = torch.cuda.get_device_capability(query.device)
    roomy = capability in ((8, 0), (9, 0), (10, 0), (10, 3))
    return capability >= (8, 0) and (dim <= 192 or roomy)


def flash_by_document(
    query: Tensor, key: Tensor, value: Tensor, queries: Spans, keys: Spans, *, scale: float | None = None,
    window: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention of each document to itself, causal, `[tokens, heads, dim]`.

    Args:
        query: `[tokens, heads, dim]`; key, value: `[keys, kv_heads, dim]`; what `flash_takes`.
        queries, keys: of each document, in the same order.
        scale: of the scores; None is `dim ** -0.5`.
        window: how many keys a query sees, its own counted; None is all before it.
    """
    from torch.nn.attention.varlen import varlen_attn

    settings: dict[str, Any] = {}
    if key.shape[1] != query.shape[1]:
        if _groups_heads():  # torch 2.11 does not
            settings["enable_gqa"] = True
        else:
            key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for t in (key, value))
    # flash counts the tokens before the query's own
    settings["window_size"] = (-1 if window is None else window - 1, 0)
    ends = queries.bounds, keys.bounds, queries.most, keys.most
    found = varlen_attn(query, key, value, *ends, scale=scale, **settings)
    return found if isinstance(found, Tensor) else found[0]


# a signature is nothing that a compiled block could look at
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _groups_heads() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def loop_by_document(
    query: Tensor, key: Tensor, value: Tensor, queries: Spans, keys: Spans, *, scale: float | None = None,
    window: int | None = None,
) -> Tensor:  # fmt: skip
    """What `flash_by_document` computes, on any device and in any dtype: SDPA on one document after the other."""
    found = []
    sizes = (queries.lengths, keys.lengths, keys.lengths)
    parts = (torch.split(t, list(size)) for t, size in zip((query, key, value), sizes, strict=True))
    for part in zip(*parts, strict=True):
        q, k, v = (t.transpose(0, 1)[None] for t in part)
        count, seen = q.shape[2], k.shape[2]
        square = count == seen and (window is None or count <= window)
        mask = None if square else _bottom_right(count, seen, window, query.device)
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=square, scale=scale, enable_gqa=grouped)
        found.append(out[0].transpose(0, 1))
    return torch.cat(found)


def _bottom_right(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    here = torch.arange(queries, device=device)[:, None] + keys - queries
    back = here - torch.arange(keys, device=device)
    return (back >= 0) & (back < (keys + 1 if window is None else window))
