"""Writes down every tensor that a step makes and when it is freed: a dispatch mode over meta tensors.

Nothing is computed. Where a model asks for a value (are there any padded rows? how many targets has the longest?), the
answer is that of the batch that is described.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spectune.compute.memory import added_in_place
from spectune.planning.shape import Shape

aten = torch.ops.aten
_BY_INDEX = (
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
)


@dataclass
class Record:
    """Tensors in the order of their making, and events.

    An event is `number` for a tensor made and `~number` for one freed. `marks` are names of places among the events.
    """

    sizes: list[int] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    marks: list[tuple[str, int]] = field(default_factory=list)
    #: what recordings of the blocks keep, where they are recorded (`planning.recordings.Static`)
    static: Any = None

    def signed(self, event: int) -> int:
        """Bytes made (above 0) or freed."""
        return self.sizes[event] if event >= 0 else -self.sizes[~event]


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records inside its `with`. `label` names what is made from now on; `outside` are tensors that were there."""

    def __init__(self, shape: Shape, outside: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shape = shape
        self.record = Record()
        self.label = "activations"
        self.backward = False
        self.in_layers = False
        self._numbers: dict[int, int] = {}
        self._watched: dict[int, weakref.ref[Any]] = {}
        self._outside = {t.untyped_storage()._cdata for t in outside}
        self._true: dict[int, bool] = {}

    def mark(self, name: str) -> None:
        """A place among the events."""
        self.record.marks.append((name, len(self.record.events)))

    def number_of(self, tensor: Tensor) -> int | None:
        """The number of the tensor whose memory this one shares, None where it was there before."""
        return self._numbers.get(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        meta = isinstance(args[0], Tensor) and args[0].device.type == "meta" if args else False
        if func is aten._local_scalar_dense.default and meta:
            return self._value(args[0])
        if func is aten.nonzero.default and meta:
            result = args[0].new_empty(self._chosen(args[0]), args[0].dim(), dtype=torch.int64)
        elif func is aten._grouped_mm.default:  # experts; its meta kernel refuses float32, which CPU and CUDA take
            result = _grouped(*args[:3])
        elif added_in_place(func):
            result = args[0]
        else:
            if func in _BY_INDEX:
                args = (args[0], self._indices(args[1]), *args[2:])
            result = func(*args, **(kwargs or {}))
        if func is aten.all.default or (func is aten.eq.Scalar and args[0].dim() == 0):
            # mask.all(), mask.sum() == mask.numel(): is nothing padded? Any other question is taken to be answered no
            self._true[result.untyped_storage()._cdata] = not self.shape.padded
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        return result

    def see(self, tensor: Tensor, label: str | None = None) -> None:
        """Note a tensor's memory, if it is not known yet, under that label or the one of the moment."""
        if tensor.device.type != "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._numbers or key in self._outside:
            return
        number = len(self.record.sizes)
        self.record.sizes.append(storage.nbytes())
        self.record.labels.append(label or self._label_now())
        self.record.events.append(number)
        self._numbers[key] = number
        self._watched[key] = weakref.ref(storage, self._when_freed(key))

    def _label_now(self) -> str:
        if not self.backward:
            return self.label
        if not self.in_layers:
            return "logits"
        # recomputed activations are made with gradients on; backward itself runs without
        return "activations" if torch.is_grad_enabled() else "workspace"

    def _when_freed(self, key: int) -> Callable[[Any], None]:
        def freed(_: Any) -> None:
            self._watched.pop(key, None)
            self.record.events.append(~self._numbers.pop(key))

        return freed

    def _value(self, tensor: Tensor) -> Any:
        if tensor.dtype == torch.bool:
            return self._true.get(tensor.untyped_storage()._cdata, False)
        return 1.0 if tensor.is_floating_point() else self.shape.targets

    def _chosen(self, tensor: Tensor) -> int:
        """How many entries of a mask are on: the targets of a mask of tokens, the columns with one of a mask of
        columns."""
        if tensor.dim() > 1:
            return self.shape.all_targets
        return tensor.numel() if self.shape.columns is None else min(tensor.numel(), self.shape.columns)

    def _indices(self, indices: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Boolean indices as the numbers that the kernel makes of them."""
        found: list[Tensor | None] = []
        for index in indices:
            if index is None or index.dtype != torch.bool:
                found.append(index)
            else:
                found += index.new_empty(index.dim(), self._chosen(index), dtype=torch.int64).unbind()
        return found


def _grouped(a: Tensor, b: Tensor, ends: Tensor | None = None) -> Tensor:
    """What a product of groups gives: rows of `a` in groups that end at `ends`, each with its own matrix of `b`; or,
    for the gradient of those matrices, columns of `a` with rows of `b`."""
    if a.dim() == 2 and b.dim() == 2:
        assert ends is not None, "a product of two matrices is in groups only where they are told"
        return a.new_empty(ends.shape[0], a.shape[0], b.shape[1])
    return a.new_empty(*a.shape[:-1], b.shape[-1]) if b.dim() == 3 else a.new_empty(a.shape[1], b.shape[1])
