"""The chunked loss against the plain one in float64: all logits, torch's cross entropy, autograd's gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spectune.compute.linear_cross_entropy import linear_cross_entropy_sum, rows_of_a_chunk
from spectune.compute.memory import AllocationTracker

ROWS, WIDTH, VOCABULARY = 37, 16, 53
WAYS = [(1.0, None), (0.3, None), (1.0, 5.0), (0.5, 3.0), (-2.0, 4.0)]


def tensors(dtype: torch.dtype, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((rows, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,))
    hidden, weight, bias = (torch.randn(*size, generator=generator).to(dtype).requires_grad_() for size in sizes)
    return hidden, weight, bias, torch.randint(0, VOCABULARY, (rows,), generator=generator)


def plain(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float, cap: float | None
) -> Tensor:
    logits = F.linear(hidden, weight, bias) * scale
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return F.cross_entropy(logits, targets, reduction="sum")


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


@pytest.mark.parametrize("chunk_rows", [None, 1, 5, 36, 37, 100])
@pytest.mark.parametrize(("scale", "softcap"), WAYS)
@pytest.mark.parametrize(
    ("dtype", "of_loss", "of_gradients"),
    # half precision: products and gradients are rounded to it, which is 2^-9 and 2^-11 an element
    [
        (torch.float64, 1e-13, 1e-13),
        (torch.float32, 5e-7, 1e-6),
        (torch.bfloat16, 1e-3, 1e-2),
        (torch.float16, 1e-4, 1e-3),
    ],
)
def test_loss_and_gradients_equal_those_of_all_logits_in_float64(
    dtype: torch.dtype, of_loss: float, of_gradients: float, scale: float, softcap: float | None, chunk_rows: int | None
) -> None:
    hidden, weight, bias, targets = tensors(dtype)
    loss = linear_cross_entropy_sum(hidden, weight, targets, bias, scale=scale, softcap=softcap, chunk_rows=chunk_rows)
    found = torch.autograd.grad(loss / 7, (hidden, weight, bias))
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight, bias)]
    expected = plain(*exact, targets, scale, softcap)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.item() == pytest.approx(expected.item(), rel=of_loss)
    for ours, theirs in zip(found, torch.autograd.grad(expected / 7, exact), strict=True):
        assert ours.dtype == dtype
        assert error(ours, theirs) <= of_gradients


@pytest.mark.parametrize("rows", [0, 1, 2, 7])
@pytest.mark.parametrize("chunk_rows", [None, 3, 6])
def test_gradcheck(rows: int, chunk_rows: int | None) -> None:
    hidden, weight, bias, targets = tensors(torch.float64, rows)

    def loss(*inputs: Tensor) -> Tensor:
        hidden, weight, bias = inputs
        return linear_cross_entropy_sum(hidden, weight, targets, bias, scale=0.7, softcap=2.5, chunk_rows=chunk_rows)

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)])
def test_gradients_are_made_for_what_is_trained(wanted: tuple[int, ...]) -> None:
    hidden, weight, bias, targets = tensors(torch.float32)
    parts = [
        tensor.detach().requires_grad_(bool(on)) for tensor, on in zip((hidden, weight, bias), wanted, strict=True)
    ]
    linear_cross_entropy_sum(parts[0], parts[1], targets, parts[2], chunk_rows=8).backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight, bias)]
    plain(*exact, targets, 1.0, None).backward()
    for part, theirs, on in zip(parts, exact, wanted, strict=True):
        assert (part.grad is not None) == bool(on)
        assert part.grad is None or error(part.grad, theirs.grad) <= 1e-6


def test_a_tied_head_gets_the_gradients_of_both_its_uses() -> None:
    table = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(3))
    ids = torch.arange(20) % VOCABULARY
    ours, theirs = table.clone().requires_grad_(), table.double().requires_grad_()
    linear_cross_entropy_sum(torch.tanh(F.embedding(ids, ours)), ours, ids.flip(0), chunk_rows=7).backward()
    plain(torch.tanh(F.embedding(ids, theirs)), theirs, None, ids.flip(0), 1.0, None).backward()
    assert ours.grad is not None
    assert error(ours.grad, theirs.grad) <= 1e-6


def test_losses_close_to_nothing_and_far_off_keep_their_digits() -> None:
    """A target that is all but certain: `softmax - 1` there is no difference of rounded numbers. One that is all but
    impossible: its probability underflows, its loss does not."""
    weight = torch.eye(3)
    for height in (12.0, 300.0):
        hidden = torch.tensor([[height, 0.0, -height]], requires_grad=True)
        for target in (0, 2):
            loss = linear_cross_entropy_sum(hidden, weight, torch.tensor([target]))
            found = torch.autograd.grad(loss, hidden)[0]
            exact = hidden.detach().double().requires_grad_()
            expected = plain(exact, weight.double(), None, torch.tensor([target]), 1.0, None)
            gradient = torch.autograd.grad(expected, exact)[0]
            assert loss.item() == pytest.approx(expected.item(), abs=1.2e-7, rel=1e-6)  # a float32 beside 1
            torch.testing.assert_close(found.double(), gradient, atol=1.2e-7, rtol=1e-6)


def test_backward_a_second_time_gives_the_same() -> None:
    hidden, weight, _, targets = tensors(torch.bfloat16)
    loss = linear_cross_entropy_sum(hidden, weight, targets)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(2 * loss, (hidden, weight))
    for one, two in zip(first, second, strict=True):
        assert torch.equal(2 * one, two)


def test_the_factor_of_the_loss_is_not_rounded() -> None:
    """In bfloat16 1/187 would be 0.13% off, and every gradient with it, all the same way."""
    hidden, weight, _, targets = tensors(torch.bfloat16)
    loss = linear_cross_entropy_sum(hidden, weight, targets)
    whole = torch.autograd.grad(loss, hidden, retain_graph=True)[0].double()
    part = torch.autograd.grad(loss / 187, hidden)[0].double()
    off = (part * 187 / whole - 1)[whole != 0]
    assert abs(float(off.mean())) < 4e-4


def test_no_gradient_wanted_makes_none() -> None:
    hidden, weight, _, targets = tensors(torch.float32)
    with torch.no_grad():
        loss = linear_cross_entropy_sum(hidden, weight, targets, chunk_rows=8)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(plain(hidden, weight, None, targets, 1.0, None).item(), rel=1e-6)
    assert not linear_cross_entropy_sum(hidden.detach(), weight.detach(), targets).requires_grad


def peak(*, frozen: bool, grad: bool = True) -> int:
    """Bytes of what the loss of 600 rows over 3,000 words makes at its peak, in chunks of 64."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(600, 8, generator=generator).requires_grad_()
    weight = torch.randn(3000, 8, generator=generator).requires_grad_(not frozen)
    targets = torch.randint(0, 3000, (600,), generator=generator)
    with torch.set_grad_enabled(grad), AllocationTracker((hidden, weight, targets)) as tracker:
        before = tracker.live_bytes
        loss = linear_cross_entropy_sum(hidden, weight, targets, chunk_rows=64)
        if grad:
            loss.backward()
    return tracker.peak_bytes - before


def test_memory_is_that_of_a_chunk_and_the_gradients() -> None:
    logits, chunk = 4 * 600 * 3000, 2 * 4 * 64 * 3008  # logits, and probabilities beside them
    gradient, head = 4 * 600 * 8, 4 * 3000 * 8
    small = 20_000
    assert peak(frozen=True, grad=False) <= chunk + small
    assert peak(frozen=True) <= chunk + 2 * gradient + small
    assert peak(frozen=False) <= chunk + 2 * gradient + 2 * head + small
    assert chunk + 2 * gradient + 2 * head + small < logits / 3


def test_chunks_are_of_one_size_and_as_few_as_memory_allows() -> None:
    narrow, wide = torch.empty(1000, 8, device="meta"), torch.empty(128256, 4096, device="meta")
    assert rows_of_a_chunk(0, narrow, "cuda") == 1
    assert rows_of_a_chunk(5000, narrow, "cuda") == 5000
    assert rows_of_a_chunk(8188, wide, "cuda") == 1024  # eight of them
    assert rows_of_a_chunk(8188, torch.empty(262144, 4096, device="meta"), "cuda") == 1024
    assert rows_of_a_chunk(8188, wide, "cpu") == 256
    assert rows_of_a_chunk(8188, wide.requires_grad_(), "cuda") == 4094  # as many as its gradient has columns


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, 3.0)])
def test_compiled_chunks_give_the_same_without_compiling_again(
    dtype: torch.dtype, scale: float, softcap: float | None
) -> None:
    hidden, weight, bias, targets = tensors(dtype)
    compiled = 0
    for rows, chunk_rows in ((37, 9), (30, 30), (5, 4), (17, 16), (11, 3)):  # a chunk of one row among them
        found = []
        for fuse in (True, False):
            loss = linear_cross_entropy_sum(
                hidden[:rows],
                weight,
                targets[:rows],
                bias,
                scale=scale,
                softcap=softcap,
                chunk_rows=chunk_rows,
                fuse=fuse,
            )
            found.append((loss, *torch.autograd.grad(loss, (hidden, weight, bias))))
        for ours, theirs in zip(*found, strict=True):
            assert error(ours, theirs.double()) <= (1e-6 if dtype == torch.float32 else 5e-3)
        counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert compiled in (0, counted)
        compiled = counted
    assert compiled > 0
    with torch.no_grad():
        loss = linear_cross_entropy_sum(hidden, weight, targets, bias, scale=scale, softcap=softcap, fuse=True)
    assert loss.item() == pytest.approx(plain(hidden, weight, bias, targets, scale, softcap).item(), rel=5e-3)


def test_what_does_not_belong_together_is_named() -> None:
    hidden, weight, bias, targets = tensors(torch.float32)
    with pytest.raises(ValueError, match=r"hidden is \[37, 16\], weight \[53, 16\], targets \[36\]"):
        linear_cross_entropy_sum(hidden, weight, targets[1:])
    with pytest.raises(ValueError, match=r"bias \[52\]; expected"):
        linear_cross_entropy_sum(hidden, weight, targets, bias[1:])
    with pytest.raises(ValueError, match=r"hidden is torch.float32, weight torch.bfloat16; expected one dtype"):
        linear_cross_entropy_sum(hidden, weight.bfloat16(), targets)
