"""Traces every tensor that a step makes and when it is freed: a dispatch mode over meta tensors.

Nothing is computed. Where a model reads a value (are there any padded rows? how many targets has the longest?), it gets
that of the batch that is planned.
"""

import gc
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spectune.compute.memory import added_in_place
from spectune.planning.shape import Shape
from spectune.planning.trace import Trace

aten = torch.ops.aten
_BY_INDEX = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Traces inside its `with`.

    Attributes:
        shape: of the batch.
        trace: grows with each tensor that is made or freed.
        label: of what is made from now on.
        backward, in_layers: the step is in backward; and there, it has come to the layers.
    """

    def __init__(self, shape: Shape, outside: Iterable[Tensor]) -> None:
        """`outside`: tensors that were there before, whose memory is no part of the trace."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.shape, self.trace, self.label = shape, Trace(), "activations"
        self.backward = self.in_layers = False
        self._numbers: dict[int, int] = {}
        self._watched: dict[int, weakref.ref[Any]] = {}
        self._outside = {t.untyped_storage()._cdata for t in outside}
        self._true: dict[int, bool] = {}
        self._known = _Known()
        self._collects = False

    def __enter__(self) -> Self:
        """Python's collector does not come by inside: what it would free, and when, depends on the whole process."""
        self._collects = gc.isenabled()
        gc.disable()
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        if self._collects:
            gc.enable()

    def mark(self, name: str) -> None:
        """Name the place among the events that the step has come to."""
        self.trace.marks.append((name, len(self.trace.events)))

    def number_of(self, tensor: Tensor) -> int | None:
        """The number of the tensor whose memory this one shares, None where it was there before."""
        return self._numbers.get(tensor.untyped_storage()._cdata)

    def relabel(self, tensor: Tensor, label: str) -> None:
        """Another label for a tensor's memory, if it was made here."""
        if (number := self.number_of(tensor)) is not None:
            self.trace.labels[number] = label

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        meta = isinstance(args[0], Tensor) and args[0].device.type == "meta" if args else False
        if func is aten._local_scalar_dense.default and meta:
            if args[0].dtype == torch.bool:
                return self._true.get(args[0].untyped_storage()._cdata, False)
            return 1.0 if args[0].is_floating_point() else self.shape.targets
        if func is aten.nonzero.default and meta:
            result = args[0].new_empty(self._chosen(args[0]), args[0].dim(), dtype=torch.int64)
        elif func is aten._grouped_mm.default:  # experts; its meta kernel refuses float32, which CPU and CUDA take
            result = _grouped(*args[:3])
        elif added_in_place(func):
            result = args[0]
        else:
            if func in _BY_INDEX:
                args = (args[0], self._indices(args[1]), *args[2:])
            result = self._known.call(func, args, kwargs or {})
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
        number = len(self.trace.sizes)
        self.trace.sizes.append(storage.nbytes())
        self.trace.labels.append(label or self._label_now())
        self.trace.events.append(number)
        self._numbers[key] = number

        def freed(_: Any) -> None:
            self._watched.pop(key, None)
            self.trace.events.append(~self._numbers.pop(key))

        self._watched[key] = weakref.ref(storage, freed)

    def _label_now(self) -> str:
        if not self.backward:
            return self.label
        if not self.in_layers:
            return "logits"
        # recomputed activations are made with gradients on; backward itself runs without
        return "activations" if torch.is_grad_enabled() else "workspace"

    def _chosen(self, tensor: Tensor) -> int:
        """How many entries of a mask are on: the targets of a mask of tokens, else the columns that have one."""
        if tensor.dim() > 1:
            return self.shape.all_targets
        return tensor.numel() if self.shape.columns is None else min(tensor.numel(), self.shape.columns)

    def _indices(self, indices: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Boolean indices as the numbers that the kernel makes of them."""
        found: list[Tensor | None] = []
        for index in indices:
            if index is not None and index.dtype == torch.bool:
                found += index.new_empty(index.dim(), self._chosen(index), dtype=torch.int64).unbind()
            else:
                found.append(index)
        return found


class _Known:
    """What operations made of such tensors before: layers are alike, and a meta kernel written in Python takes far
    longer than a tensor of the same shape."""

    def __init__(self) -> None:
        self._made: dict[Any, list[tuple[torch.Size, tuple[int, ...], torch.dtype]]] = {}
        self._plain: dict[Any, bool] = {}

    def call(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The operation's result, on the meta device where its arguments are."""
        if func not in self._plain:
            self._plain[func] = _makes_tensors(func)
        key = _key(func, args, kwargs) if self._plain[func] else None
        if key is None:
            return func(*args, **kwargs)
        if key not in self._made:
            result = func(*args, **kwargs)
            leaves = [result] if isinstance(result, Tensor) else list(result)
            given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            if all(_is_whole(leaf) and leaf.untyped_storage()._cdata not in given for leaf in leaves):
                self._made[key] = [(leaf.shape, leaf.stride(), leaf.dtype) for leaf in leaves]
            return result
        found = [torch.empty_strided(*size, dtype=dtype, device="meta") for *size, dtype in self._made[key]]
        return found[0] if len(func._schema.returns) == 1 else tuple(found)


def _is_whole(made: Any) -> bool:
    """Whether what was made is a meta tensor with memory of its own size; some kernels return a part of a larger one,
    or an argument."""
    if not isinstance(made, Tensor) or made.device.type != "meta":
        return False
    again = torch.empty_strided(made.shape, made.stride(), dtype=made.dtype, device="meta")
    return again.untyped_storage().nbytes() == made.untyped_storage().nbytes()


def _makes_tensors(func: Any) -> bool:
    """Whether an operation returns tensors of its own: it changes no argument, and views none."""
    schema = func._schema
    parts = (*schema.arguments, *schema.returns)
    tensors = bool(schema.returns) and all(str(made.type) == "Tensor" for made in schema.returns)
    return tensors and func.namespace == "aten" and all(part.alias_info is None for part in parts)


def _key(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """All that the shape of the result follows from; None where an argument is a tensor that is not on meta."""
    found: list[Any] = [func]
    for leaf in (*args, *kwargs.values(), *kwargs):
        if isinstance(leaf, Tensor):
            if leaf.device.type != "meta":
                return None
            found.append((leaf.shape, leaf.stride(), leaf.dtype))
        elif isinstance(leaf, bool | int | float | str | torch.dtype | torch.device | None):
            found.append((type(leaf), leaf))
        elif isinstance(leaf, list | tuple) and all(isinstance(part, int) for part in leaf):
            found.append(tuple(leaf))
        else:
            return None
    return tuple(found)


def _grouped(a: Tensor, b: Tensor, ends: Tensor | None = None) -> Tensor:
    """What a product of groups gives: rows of `a` in groups that end at `ends`, each with its own matrix of `b`; or,
    for the gradient of those matrices, columns of `a` with rows of `b`."""
    if a.dim() == 2 and b.dim() == 2:
        assert ends is not None, "a product of two matrices is in groups only where they are told"
        return a.new_empty(ends.shape[0], a.shape[0], b.shape[1])
    return a.new_empty(*a.shape[:-1], b.shape[-1]) if b.dim() == 3 else a.new_empty(a.shape[1], b.shape[1])
