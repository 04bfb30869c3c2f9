"""Scaling the features of a linear map's output: against plain autograd in float64, and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spectune.compute.magnitude import scale_features

TOKENS, FEATURES = 6, 5


def plain(y: Tensor, change: Tensor, ratio: Tensor, bias: Tensor | None) -> Tensor:
    shift = 0 if bias is None else bias
    return shift + ratio * (y - shift + change)


def tensors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    y, change = (torch.randn(2, TOKENS, FEATURES, generator=generator, dtype=torch.float64) for _ in range(2))
    ratio, bias = (torch.randn(FEATURES, generator=generator, dtype=torch.float64) for _ in range(2))
    return y.to(dtype), change.to(dtype), ratio, bias.to(dtype)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("wanted", [(True, True, True), (False, True, True), (False, False, True), (True, True, False)])
def test_output_and_gradients(biased: bool, wanted: tuple[bool, ...]) -> None:
    y, change, ratio, bias = tensors()
    given = [t.requires_grad_(need) for t, need in zip((y, change, ratio), wanted, strict=True)]
    last = bias if biased else None
    torch.testing.assert_close(scale_features(y, change, ratio, last), plain(y, change, ratio, last))
    ours, theirs = (
        torch.autograd.grad(f(*given, last).sin().sum(), [t for t in given if t.requires_grad])  # type: ignore[operator]
        for f in (scale_features, plain)
    )
    # the gradient of `ratio` is summed in float32
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("size", [1.0, 1.003, 1e-3, -0.5, 30.0])
def test_in_16_bits_it_is_as_good_as_plain_autograd(size: float, biased: bool) -> None:
    """Ratios near 0 and 1, and a bias far larger than what is scaled."""
    generator = torch.Generator().manual_seed(0)
    y, change, weights = (torch.randn(1000, 200, generator=generator, dtype=torch.float64) for _ in range(3))
    bias = 50 * torch.randn(200, generator=generator, dtype=torch.float64) if biased else None
    y = y if bias is None else y + bias
    ratio = torch.full((200,), size, dtype=torch.float64)

    def found(function: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = ratio.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        seen = leaf if function is scale_features else leaf.to(dtype)
        out = function(y.to(dtype), change.to(dtype), seen, None if bias is None else bias.to(dtype))
        [gradient] = torch.autograd.grad((out * weights.to(dtype)).sum(), [leaf])
        return out.detach().double(), gradient.double()

    exact = found(plain, torch.float64)
    for ours, usual, wanted in zip(
        found(scale_features, torch.bfloat16), found(plain, torch.bfloat16), exact, strict=True
    ):
        # one rounding more or less
        assert float((ours - wanted).norm()) <= 1.3 * float((usual - wanted).norm())


@pytest.mark.parametrize("biased", [False, True])
def test_ones_and_zeros(biased: bool) -> None:
    y, change, ratio, bias = tensors(torch.float32)
    last = bias if biased else None
    same = scale_features(y, torch.zeros_like(y), torch.ones(FEATURES), last)
    assert torch.equal(same, y)
    ratio = ratio.float()
    ratio[2] = 0
    ratio.requires_grad_()
    out = scale_features(y, change, ratio, last)
    [gradient] = torch.autograd.grad(out.sum(), [ratio])
    assert torch.isfinite(gradient).all()
    if not biased:
        assert gradient[2] == 0


@pytest.mark.parametrize("biased", [False, True])
def test_one_wide_tensor_is_kept(biased: bool) -> None:
    y, change, ratio, bias = tensors(torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        out = scale_features(y, change.requires_grad_(), ratio.float().requires_grad_(), bias if biased else None)
    wide = [t for t in kept if t.numel() == y.numel()]
    assert len(wide) == 1
    # without a bias it is the output itself: shared with whatever keeps that
    assert (wide[0].data_ptr() == out.data_ptr()) == (not biased)


def test_compiled_it_is_one_graph() -> None:
    torch._dynamo.reset()
    for last in (None, tensors(torch.float32)[3]):
        y, change, ratio, _ = tensors(torch.float32)
        given = [y, change.requires_grad_(), ratio.float().requires_grad_()]
        compiled = torch.compile(scale_features, fullgraph=True, backend="aot_eager")
        ours, theirs = (torch.autograd.grad(f(*given, last).sin().sum(), given[1:]) for f in (compiled, scale_features))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)
