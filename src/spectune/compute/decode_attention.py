"""Attention of one new token a row over what the row has in a cache: rows of unlike lengths in one launch, without a
mask where a kernel takes lengths, and without a copy of keys for each of the heads that share them.

SDPA with a mask has no shared heads on CUDA but by its slowest kernel: transformers therefore repeats keys and values
for every head that shares them, the whole cache once a layer and token. Here it is the queries that are laid together:
heads that share keys are as many queries of one head, and nothing is copied. Flash attention (Dao 2023, arXiv
2307.08691), where it takes the tensors, does the same, reads each row up to its own length alone, and splits the keys
of few rows over the whole device ("flash decoding").
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from spectune.compute.varlen import flash_takes


def attend_by_length(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, begins: Tensor, most: int, *,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Attention of each row's one query to the row's first keys, by flash attention.

    Args:
        query: `[rows, heads, 1, dim]`; key, value: `[rows, kv_heads, places, dim]`, in memory `[rows, places, kv_heads,
            dim]`; what `flash_takes`.
        lengths: int32 `[rows]`, how many keys each row has: from 1 to `most`.
        begins: int32 `[2, rows + 1]`, the numbers of rows, and the same times `places`.
        scale: of the scores; None is `dim ** -0.5`.

    Returns:
        `[rows, 1, heads, dim]`.
    """
    found: Tensor = torch.ops.aten._flash_attention_forward(
        query[:, :, 0], *(t.transpose(1, 2).flatten(0, 1) for t in (key, value)), begins[0], begins[1], 1, most,
        0.0, False, False, scale=scale, seqused_k=lengths,
    )[0]  # fmt: skip
    return found[:, None]


def attend_by_mask(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float | None = None
) -> Tensor:
    """The same on any device and in any dtype, where a mask says which keys are seen.

    Args:
        query, key, value: as `attend_by_length` has them, however they lie in memory.
        mask: boolean or added to the scores, `[rows or 1, 1, 1, places]`; None sees all.

    Returns:
        `[rows, 1, heads, dim]`.
    """
    rows, heads, _, dim = query.shape
    shared = query.reshape(rows, key.shape[1], heads // key.shape[1], dim)
    found = F.scaled_dot_product_attention(shared, key, value, mask, scale=scale)
    return found.reshape(rows, 1, heads, found.shape[-1])


def takes_lengths(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attend_by_length` serves these tensors."""
    return flash_takes(query, key, value) and all(t.transpose(1, 2).is_contiguous() for t in (key, value))
