"""Numbers in eight bits, by blocks: codes of a dynamic tree and the largest magnitude of each block.

Source: Dettmers and others, "8-bit optimizers via block-wise quantization" (2022, arXiv 2110.02861), section 2; the
tree is that of bitsandbytes' `create_dynamic_map` (MIT): seven decades, the higher ones in finer steps.
"""

import functools

import torch
from torch import Tensor

#: numbers that share a scale
BLOCK = 256
#: shorter tensors are not worth it, and are kept as they are
LEAST = 4096
_DECADES = 7


def codes_of(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Encode.

    Args:
        values: float32, of any shape.
        signed: False where none is negative, whose steps are half as wide.

    Returns:
        codes `[blocks, BLOCK]` uint8 (the last block filled up with zeros), and scales `[blocks, 1]` float32.
    """
    flat = values.flatten()
    if rest := -flat.numel() % BLOCK:
        flat = torch.nn.functional.pad(flat, (0, rest))
    blocks = flat.view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    levels = _levels(signed, values.device)
    middles = (levels[1:] + levels[:-1]) / 2
    shares = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.bucketize(shares, middles, out_int32=True).to(torch.uint8), scales


def values_of(codes: Tensor, scales: Tensor, shape: torch.Size, *, signed: bool) -> Tensor:
    """The inverse, float32."""
    levels = _levels(signed, codes.device)
    # not by indexing, which would make int64 of the codes within: 8 more bytes for each number
    found = levels.index_select(0, codes.int().flatten()).view(codes.shape).mul_(scales)
    return found.flatten()[: shape.numel()].view(shape)


@functools.cache
def _levels(signed: bool, device: torch.device) -> Tensor:
    """The 256 values of the tree, rising, from -1 (signed) or 0 to 1."""
    found = [0.0, 1.0]
    for decade in range(_DECADES):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (0 if signed else 1)) + 1, dtype=torch.float64)
        middles = 10.0 ** (decade - _DECADES + 1) * (edges[:-1] + edges[1:]) / 2
        found += middles.tolist() + ((-middles).tolist() if signed else [])
    return torch.tensor(sorted(found), dtype=torch.float32, device=device)
