"""A weight and its low-rank change, kept apart: `W + L R` is multiplied as `W x + L (R x)`, and never made where the
product is one that is known here.

For weights that a base's own code multiplies with, out of reach of a hook on an output (experts in one parameter). The
sum in the weight's place would take the memory of all experts once more for each layer, and that of the whole weight's
gradient in backward, and in bfloat16 it would round a small change away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

Function = Callable[..., Any]


class LowRankSum(Tensor):
    """`base + left @ right`, `[..., m, n]`: a tensor that answers as the sum does. Made by `low_rank_sum`.

    Products with it, its transposes and choices among its matrices keep the terms apart; whatever else is asked is
    asked of the sum itself.

    Attributes:
        base: `[..., m, n]`.
        left, right: `[..., m, r]` and `[..., r, n]`, in the base's dtype.
    """

    base: Tensor
    left: Tensor
    right: Tensor

    def summed(self) -> Tensor:
        """The sum as a plain tensor."""
        return self.base + self.left @ self.right

    @classmethod
    def __torch_function__(
        cls, func: Function, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func in _QUESTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **named)
        if func is Tensor.data_ptr:
            raise RuntimeError(
                "a kernel asks for the memory of a weight that a delta changes, and would not see the change: use "
                "experts_implementation 'grouped_mm', 'batched_mm' or 'eager'"
            )
        known = _KNOWN.get(func)
        found = NotImplemented if known is None else known(func, *args, **named)
        if found is not NotImplemented:
            return found
        return func(*tree_map_only(cls, cls.summed, tuple(args)), **tree_map_only(cls, cls.summed, named))


def low_rank_sum(base: Tensor, left: Tensor, right: Tensor) -> LowRankSum:
    """`base + left @ right` of plain tensors, `[..., m, n]`, `[..., m, r]` and `[..., r, n]` of one dtype."""
    made = base.detach().as_subclass(LowRankSum)
    made.base, made.left, made.right = base, left, right
    return made


def _transposed(func: Function, weight: Any, *dims: Any) -> Any:
    if dims and {int(dim) % weight.base.dim() for dim in dims} != {weight.base.dim() - 2, weight.base.dim() - 1}:
        return NotImplemented
    return low_rank_sum(weight.base.mT, weight.right.mT, weight.left.mT)


def _chosen(func: Function, weight: Any, index: Any) -> Any:
    """One of its matrices, or several."""
    if weight.base.dim() != 3 or not isinstance(index, int | Tensor) or not isinstance(weight, LowRankSum):
        return NotImplemented
    return low_rank_sum(weight.base[index], weight.left[index], weight.right[index])


def _product(func: Function, first: Any, second: Any) -> Any:
    """`first @ second`, of which one is a sum."""
    if not isinstance(second, LowRankSum):
        return func(first.base, second) + func(first.left, func(first.right, second))
    if isinstance(first, LowRankSum):
        return NotImplemented
    return func(first, second.base) + func(func(first, second.left), second.right)


def _grouped(func: Function, x: Any, weight: Any, **kwargs: Any) -> Any:
    """`x[rows of an expert] @ weight[expert]`. These kernels want rows of whole 16 bytes: ranks are filled up."""
    if not isinstance(weight, LowRankSum) or isinstance(x, LowRankSum):
        return NotImplemented
    missing = -weight.left.shape[-1] % (16 // weight.left.element_size())
    left, right = F.pad(weight.left, (0, missing)), F.pad(weight.right, (0, 0, 0, missing))
    return func(x, weight.base, **kwargs) + func(func(x, left, **kwargs), right, **kwargs)


def _linear(func: Function, x: Any, weight: Any, bias: Tensor | None = None) -> Any:
    if isinstance(x, LowRankSum):
        return NotImplemented
    return F.linear(x, weight.base, bias) + F.linear(F.linear(x, weight.right), weight.left)


#: answered by the base, which has the sum's form
_QUESTIONS: frozenset[Any] = frozenset({
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_meta")),
    Tensor.dim, Tensor.size, Tensor.numel, Tensor.is_floating_point, Tensor.is_contiguous, Tensor.stride,
})  # fmt: skip
_KNOWN: dict[Any, Function] = {
    F.linear: _linear,
    Tensor.__getitem__: _chosen,
    **dict.fromkeys((Tensor.mT.__get__, Tensor.T.__get__, Tensor.t, Tensor.transpose, torch.transpose), _transposed),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _product),
    **dict.fromkeys((torch.bmm, Tensor.bmm, torch.mm, Tensor.mm), _product),
    **dict.fromkeys((F.grouped_mm, torch._grouped_mm), _grouped),
}  # fmt: skip
