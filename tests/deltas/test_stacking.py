"""Tensors of unlike sizes in one, as padding and `torch.stack` make it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spectune.deltas import Stacking, stacking
from spectune.deltas.device_numbers import DeviceNumbers

SHAPES = {
    "alike": [(3, 5), (3, 5)],
    "ranks first": [(2, 6), (4, 6), (1, 6)],
    "ranks last": [(6, 2), (6, 4), (6, 1)],
    "both": [(2, 3), (4, 1)],
    "vectors": [(3,), (7,), (5,)],
    "one": [(2, 3)],
}


def padded(tensors: Sequence[Tensor]) -> Tensor:
    most = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    ends = [
        [end for m, n in zip(reversed(most), reversed(t.shape), strict=True) for end in (0, m - n)] for t in tensors
    ]
    return torch.stack([F.pad(tensor, end) for tensor, end in zip(tensors, ends, strict=True)])


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_a_stack_is_what_padding_makes_and_so_are_gradients(shapes: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    stack = Stacking()
    with torch.inference_mode():
        stack(tensors)  # what is kept of it serves passes with gradients too
    expected = padded(tensors)
    weights = torch.randn(expected.shape).mT if expected.dim() > 2 else torch.randn(expected.shape)
    made = stack(tensors)
    assert torch.equal(made, expected)
    wanted = torch.autograd.grad((expected.mT * weights if expected.dim() > 2 else expected * weights).sum(), tensors)
    found = torch.autograd.grad((made.mT * weights if made.dim() > 2 else made * weights).sum(), tensors)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)
        # a weight takes such a gradient as it is
        assert a.is_contiguous() or len(shapes) == 1


def test_what_is_large_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Places of each number would take as much memory as the numbers."""
    monkeypatch.setattr(stacking, "MOST_PLACES", 20)
    monkeypatch.setattr(stacking, "_places", lambda *_: pytest.fail("places are made"))
    tensors = [torch.randn(2, 6), torch.randn(4, 6)]
    assert torch.equal(Stacking()(tensors), padded(tensors))


def test_numbers_of_a_column_are_made_once() -> None:
    stack = Stacking()
    made = stack.column([1, 2.0], torch.device("cpu"))
    assert (made.shape, made.dtype) == ((2, 1, 1), torch.float32)
    assert made.data_ptr() == stack.column((1.0, 2), torch.device("cpu")).data_ptr()
    assert made.data_ptr() != stack.column((1.0, 3.0), torch.device("cpu")).data_ptr()


def test_whole_and_real_numbers_are_apart() -> None:
    numbers, cpu = DeviceNumbers(), torch.device("cpu")
    with torch.inference_mode():
        whole, real = numbers.whole(cpu, [1, 2]), numbers.real(cpu, [1, 2])
    assert (whole.dtype, real.dtype) == (torch.int64, torch.float32)
    assert numbers.whole(cpu, (1, 2)) is whole
    assert not whole.is_inference()
