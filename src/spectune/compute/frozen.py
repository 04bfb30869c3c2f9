"""A linear map whose weight is stored in few bits and never trained: what the formats have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

#: what the input of a frozen linear may be; anything else was cast to the weight's type by the model's own code
_COMPUTES_IN = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class FrozenLinear(nn.Module):
    """`y = x Wᵀ + bias` with a quantised `W`, in the input's dtype. Gradients reach `x` and the bias, never `W`.

    `weight` is a parameter (so that it is counted and moved as one) that takes no gradient; its dtype, and those of
    the buffers that decode it, stay whatever the model is cast to (`model.half()` and such).

    Attributes:
        in_features, out_features: of the map, however the weight is packed.
        weight: the stored weight.
        bias: the base's own parameter `[out_features]`, in the base's dtype, or None.
        transposed: the linear that it stands for stores its weight `[in_features, out_features]` (GPT-2's `Conv1D`).
    """

    #: as `base_precision` names it
    precision: ClassVar[str]

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, *, transposed: bool = False) -> None:
        """`weight`: `[out_features, in_features]`, floating point; it is quantised on its device and not kept."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        with torch.no_grad():
            self.weight = nn.Parameter(self.store(weight.detach()), requires_grad=False)
        self.bias = bias
        self.transposed = transposed

    @abstractmethod
    def store(self, weight: Tensor) -> Tensor:
        """The weight as it is kept; registers the buffers that decode it."""

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """`x Wᵀ`: `[..., in_features]` to `[..., out_features]`, in the input's dtype."""

    @abstractmethod
    def dequantised(self) -> Tensor:
        """The weight that the stored one stands for, `[out_features, in_features]`, float32: a new tensor."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype not in _COMPUTES_IN:
            raise TypeError(
                f"a base in {self.precision} computes in floats, and {x.dtype} came to this linear: the model's own "
                "code casts activations to its weights' dtype. Load this base without base_precision."
            )
        y = self.product(x)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.precision}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenLinear:
        bias = self.bias

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype or tensor is bias else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)  # type: ignore[no-any-return,no-untyped-call]


def rows_of(tensor: Tensor) -> Tensor:
    """`[..., n]` as a matrix of rows `[rows, n]`."""
    return tensor.reshape(-1, tensor.shape[-1])


def like(rows: Tensor, tensor: Tensor) -> Tensor:
    """Rows `[rows, m]` in the leading shape and the dtype of `tensor` `[..., n]`."""
    return rows.to(tensor.dtype).reshape(*tensor.shape[:-1], rows.shape[-1])


Gradients = tuple[Tensor | None, ...]
Context = Any
