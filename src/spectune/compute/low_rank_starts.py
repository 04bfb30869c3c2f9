"""Low-rank factors of a weight for LoRA to start at, computed as PEFT does, so that both find the same numbers."""

import torch
from torch import Tensor


def principal(weight: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """`A` `[r, in]` and `B` `[out, r]` with `scale B A` the best approximation of rank `r` to `weight` `[out, in]`,
    float32 (Meng et al. 2024, PiSSA, arXiv 2404.02948, equations 2 and 3)."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    roots = torch.diag(torch.sqrt(values[:r] / scale))
    return roots @ right[:r], left[:, :r] @ roots


def orthonormal(weight: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """`B` `[out, r]`, the first columns of `Q` of `weight = Q R`, and `A` `[r, in]`, the first rows of `R`; `scale` has
    no part in them (Büyükakyüz 2024, OLoRA, arXiv 2406.01775, algorithm 1)."""
    q, upper = torch.linalg.qr(weight)
    return upper[:r].contiguous(), q[:, :r].contiguous()
