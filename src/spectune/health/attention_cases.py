"""Calls of attention as runs make them: shapes, masks, types of numbers, and where queries, keys and values lie."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from spectune.compute.pack_layout import Pack, Spans

#: what queries see. "causal": no mask. "right", "left": rows padded there. "prefix": keys before all rows' own, which
#: every query sees. "window": at most so many keys back. "packs": documents beside each other
MASKS = ("causal", "right", "left", "prefix", "window", "packs")
DTYPES = ("bfloat16", "float16", "float32")
DIMS = (32, 64, 80, 96, 128, 256)
LENGTHS = (1, 17, 64, 192, 1000, 2048)
HEADS = 4
#: keys of "prefix"
LEAD = 20


@dataclass(frozen=True)
class AttentionCase:
    """One call of attention.

    Attributes:
        mask: one of `MASKS`.
        dtype: a name of torch's.
        layout: "tokens" has a token's heads together, as transformers makes them; "fused" queries, keys and values of a
            token too, as GPT-2's one projection gives them; "heads" a head's tokens together.
        dropout: of attention's weights.
    """

    mask: str
    length: int
    dim: int = 64
    dtype: str = "bfloat16"
    kv_heads: int = HEADS
    heads: int = HEADS
    rows: int = 2
    layout: str = "tokens"
    dropout: float = 0.0

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}:{self.kv_heads}"
        dropout = f", dropout {self.dropout}" if self.dropout else ""
        size = f"{self.rows} x {self.length}, {heads} heads of {self.dim}"
        return f"{self.mask}, {size}, {self.dtype}, {self.layout}{dropout}"

    @property
    def lead(self) -> int:
        return LEAD if self.mask == "prefix" else 0


def cases() -> Iterator[AttentionCase]:
    """All of the grid, in an order in which the most is known early: what was met first, then calls until every three
    of mask, type, head size, groups and length have met, then the rest."""
    yield from SPECIAL
    grid = list(itertools.product(MASKS, DTYPES, DIMS, (HEADS, HEADS // 2), LENGTHS))
    random.Random(0).shuffle(grid)
    met: set[tuple[object, ...]] = set()
    late = []
    for cell in grid:
        triples = set(itertools.combinations(enumerate(cell), 3))
        if triples <= met:
            late.append(cell)
            continue
        met |= triples
        yield _of_grid(*cell)
    yield from (_of_grid(*cell) for cell in late)


def _of_grid(mask: str, dtype: str, dim: int, kv_heads: int, length: int) -> AttentionCase:
    return AttentionCase(mask, length, dim, dtype, kv_heads)


#: of what runs were seen to make, and what the grid leaves out: the shape of the first NaN that was met, layouts,
#: dropout, heads that are no multiple of 8, lengths about a multiple of 8 and of 64, one row
SPECIAL = (
    AttentionCase("right", 192, heads=7, kv_heads=7, rows=64, layout="fused"),
    AttentionCase("right", 187, heads=7, kv_heads=7, rows=64, layout="fused"),
    AttentionCase("left", 192, heads=7, kv_heads=7, rows=64, layout="fused"),
    AttentionCase("causal", 192, heads=7, kv_heads=7, rows=64, layout="fused"),
    AttentionCase("causal", 187, heads=7, kv_heads=7, rows=64, layout="fused"),
    *(AttentionCase(mask, 130, layout=layout) for mask in ("causal", "right") for layout in ("fused", "heads")),
    *(AttentionCase(mask, 64, dropout=0.1) for mask in ("causal", "right")),
    *(AttentionCase(mask, 64, dropout=0.1, dtype="float16", kv_heads=2) for mask in ("causal", "right")),
    *(AttentionCase("causal", length, 128, kv_heads=2, rows=1) for length in (2, 7, 63, 65, 129, 2047)),
    *(AttentionCase(mask, 100, 36) for mask in ("causal", "right")),
)
#: a few for a look at a machine in seconds
FEW = (
    *(AttentionCase("causal", length, dim) for length, dim in ((17, 64), (192, 64), (192, 128))),
    AttentionCase("causal", 130, 128, kv_heads=2),
    AttentionCase("causal", 64, dtype="float32"),
    *(AttentionCase(mask, 130) for mask in MASKS[1:]),
    AttentionCase("left", 192),
    AttentionCase("right", 64, dtype="float32"),
    AttentionCase("packs", 130, 128, kv_heads=2),
)


class Inputs:
    """Random queries, keys, values and gradients of the output, and what each query sees.

    Attributes:
        tensors: queries, keys, values `[rows, heads or kv_heads, length or keys, dim]`, which want gradients.
        grad: of the output `[rows, heads, length, dim]`; 0 where a run has none: in padding.
        visible: boolean `[rows, 1, length, keys]`.
        scored: boolean `[rows, 1, length, 1]`: queries whose output counts. Those that see nothing do not.
        real: boolean `[rows, length]`: places that hold a token.
    """

    def __init__(self, case: AttentionCase, device: torch.device) -> None:
        self.case, self.device = case, device
        dtype: torch.dtype = getattr(torch, case.dtype)
        generator = torch.Generator(device).manual_seed(case.length * 1000 + case.dim)
        keys = case.lead + case.length

        def random_of(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        sizes = ((case.heads, case.length), (case.kv_heads, keys), (case.kv_heads, keys))
        if case.layout == "fused":
            whole = random_of(case.rows, case.length, 3, case.heads, case.dim)
            found = [part.transpose(1, 2) for part in whole.unbind(2)]
        elif case.layout == "heads":
            found = [random_of(case.rows, heads, length, case.dim) for heads, length in sizes]
        else:
            found = [random_of(case.rows, length, heads, case.dim).transpose(1, 2) for heads, length in sizes]
        self.tensors = [tensor.requires_grad_() for tensor in found]
        self.real = self._real()
        self.visible = self._visible()
        self.scored = self.visible.any(-1, keepdim=True)
        if case.mask == "packs":  # padding sees itself, each kernel in its own way
            self.scored = self.real[:, None, :, None]
        grad = random_of(case.rows, case.length, case.heads, case.dim).transpose(1, 2)
        self.grad = grad.masked_fill(~(self.scored & self.real[:, None, :, None]), 0)

    @cached_property
    def documents(self) -> Pack:
        """Of "packs": three documents, or as many as there are tokens, and padding at the end of all rows but the
        first."""
        length = self.case.length
        first = max(1, length // 2)
        full = [part for part in (first, (length - first) // 3, length - first - (length - first) // 3) if part]
        short = [part for part in (max(1, length // 5), length // 3) if part]
        lengths = [full, *[short if sum(short) <= length else full] * (self.case.rows - 1)]
        return Pack(lengths, length, self.device)

    @cached_property
    def spans(self) -> Spans:
        return self.documents.spans

    def _real(self) -> Tensor:
        """Which places hold a token, `[rows, length]`. The rows are of unlike lengths, the first one has no padding."""
        case = self.case
        place = torch.arange(case.length, device=self.device)
        if case.mask == "packs":
            count = torch.tensor([sum(pack) for pack in self.documents.lengths], device=self.device)
            return place < count[:, None]
        if case.mask not in ("right", "left"):
            return torch.ones(case.rows, case.length, dtype=torch.bool, device=self.device)
        lengths = [max(1, math.ceil(case.length * (1 - row / case.rows))) for row in range(case.rows)]
        count = torch.tensor(lengths, device=self.device)[:, None]
        return place < count if case.mask == "right" else place >= case.length - count

    def _visible(self) -> Tensor:
        case = self.case
        if case.mask == "packs":
            return self.documents.mask()
        query = torch.arange(case.length, device=self.device)[:, None] + case.lead
        key = torch.arange(case.lead + case.length, device=self.device)
        seen = key <= query
        if case.mask == "window":
            seen = seen & (query - key < max(1, case.length // 3))
        seen = seen.expand(case.rows, 1, -1, -1)
        if case.mask in ("right", "left"):
            seen = seen & self.real[:, None, None, :]
        return seen.contiguous()
