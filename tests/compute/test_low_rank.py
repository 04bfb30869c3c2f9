"""A weight and its low-rank change, kept apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spectune.compute.low_rank import LowRankSum, low_rank_sum

EXPERTS, ROWS, COLUMNS, RANK = 4, 16, 24, 3


def factors(*, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((EXPERTS, ROWS, COLUMNS), (EXPERTS, ROWS, RANK), (EXPERTS, RANK, COLUMNS))
    base, left, right = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return base, left.requires_grad_(), right.requires_grad_()


X = torch.randn(10, COLUMNS, generator=torch.Generator().manual_seed(1))
Y = torch.randn(10, ROWS, generator=torch.Generator().manual_seed(2))
ENDS = torch.tensor([2, 5, 5, 10], dtype=torch.int32)
CHOSEN = torch.tensor([0, 1, 2, 3, 3, 3, 2, 1, 1, 0])

#: products that mixtures' own code has
KNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda w: F.linear(X, w[1], torch.ones(ROWS)),
    "matmul": lambda w: Y @ w[torch.tensor(2)],
    "transposed": lambda w: X @ w[0].T,
    "batched": lambda w: torch.bmm(w[CHOSEN], X.unsqueeze(-1)).squeeze(-1),
    "batched-transposed": lambda w: torch.bmm(Y.unsqueeze(1), w[CHOSEN]).squeeze(1),
    "whole": lambda w: torch.bmm(Y.expand(EXPERTS, -1, -1), w),
    "grouped": lambda w: F.grouped_mm(Y, w, offs=ENDS),
    "grouped-transposed": lambda w: F.grouped_mm(X, w.transpose(-2, -1), offs=ENDS),
}
#: what it does not know: answered by the sum itself
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "viewed": lambda w: X @ w.view(-1, COLUMNS).T,
    "einsum": lambda w: torch.einsum("bi,eoi->beo", X, w),
    "double": lambda w: F.linear(X.double(), w[0].double()),
    "sum": lambda w: w + 1,
    "cat": lambda w: torch.cat([w, w]),
}


@pytest.mark.parametrize("name", [*KNOWN, *OTHERS])
def test_it_answers_as_the_sum_does_gradients_too(name: str) -> None:
    """Against the sum, in float64 where there is a kernel for it."""
    product = {**KNOWN, **OTHERS}[name]
    base, left, right = factors()
    got = product(low_rank_sum(base, left, right))
    assert type(got) is Tensor
    expected = product(base + left @ right)
    assert torch.allclose(got, expected, atol=1e-4)
    mine = torch.autograd.grad(got.sin().sum(), (left, right))
    wanted = torch.autograd.grad(expected.sin().sum(), (left, right))
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(mine, wanted, strict=True))


@pytest.mark.parametrize("name", KNOWN)
def test_known_products_never_make_the_sum(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: LowRankSum) -> Tensor:
        raise AssertionError("the sum was made")

    weight = low_rank_sum(*factors())
    monkeypatch.setattr(LowRankSum, "summed", fail)
    KNOWN[name](weight)


def test_it_has_the_sum_s_form() -> None:
    weight = low_rank_sum(*factors(dtype=torch.bfloat16))
    assert (weight.shape, weight.dtype, weight.dim()) == ((EXPERTS, ROWS, COLUMNS), torch.bfloat16, 3)
    assert weight.requires_grad


def test_a_change_below_the_last_bit_of_a_bfloat16_weight_counts() -> None:
    base = torch.tensor([1.0, -1.0]).repeat(2, 8, 4)  # alone it gives zero for equal inputs
    left, right = torch.full((2, 8, 1), 2.0**-12), torch.ones(2, 1, 8)
    weight = low_rank_sum(*(part.bfloat16() for part in (base, left, right)))
    x = torch.ones(1, 8).bfloat16()
    assert torch.equal(weight.summed(), weight.base)
    assert torch.equal(F.linear(x, weight[0]), torch.full((1, 8), 8 * 2.0**-12).bfloat16())


def test_a_kernel_that_asks_for_its_memory_is_refused() -> None:
    with pytest.raises(RuntimeError, match="would not see the change"):
        low_rank_sum(*factors()).data_ptr()
