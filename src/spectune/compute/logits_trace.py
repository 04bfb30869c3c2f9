"""What one forward pass of a model does between its decoder's output and its logits, operation by operation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn, ops
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = ops.aten
#: leave every number what and where it is, as long as the shape stays (casts round)
_HARMLESS = (
    aten.alias.default, aten.clone.default, aten.detach.default, aten.slice.Tensor, aten.view.default,
    aten._unsafe_view.default, aten._to_copy.default,
)  # fmt: skip
_TIMES = (aten.mul.Tensor, aten.mul.Scalar, aten.mul_.Tensor, aten.mul_.Scalar)
_OVER = (aten.div.Tensor, aten.div.Scalar, aten.div_.Tensor, aten.div_.Scalar)
_TANH = (aten.tanh.default, aten.tanh_.default)


class NotPlainError(Exception):
    """The logits are not a linear map of the decoder's output with scaling or soft caps; the message is the reason."""


@dataclass
class Scaling:
    """What the head's output `z` is turned into: `outer * tanh(inner * z)`, or `inner * z` without `outer`."""

    inner: float = 1.0
    outer: float | None = None

    @property
    def scale(self) -> float:
        """The `scale` of `linear_cross_entropy_sum`, whose `softcap` is `outer`."""
        return self.inner if self.outer is None else self.inner * self.outer

    def multiply(self, number: float) -> None:
        if self.outer is None:
            self.inner *= number
        else:
            self.outer *= number


class LogitsTrace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the forward pass that runs inside its `with`: `args` and `kwargs` are what the decoder was called with;
    after `finish`, `scaling` is what the head's output goes through.

    Operations are looked at from the decoder's exit on; hooks that change the decoder's call or output count as part
    of it.

    Raises:
        NotPlainError: in the forward pass or in `finish`.
    """

    def __init__(self, decoder: nn.Module, head: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.args: tuple[Any, ...] = ()
        self.kwargs: Mapping[str, Any] = {}
        self._modules = decoder, head
        self._calls = 0  # of the decoder that are under way: a hook of its own may run the model once more
        self._looking = False
        self._in_head = False
        self._headed = False
        self._positions: Sequence[int] = ()
        #: what the decoder's output, or the head's, has become so far
        self._now: Tensor | None = None
        self._before: list[Tensor] = []
        self.scaling = Scaling()

    def finish(self, logits: Tensor) -> None:
        """Check that `logits`, the model's answer, are what the head's output has become."""
        if not self._headed or self._now is not logits or logits.shape[:-1] != self._positions:
            raise NotPlainError("its logits are not the head's output")

    def __enter__(self) -> Self:
        decoder, head = self._modules
        self._handles = [
            decoder.register_forward_pre_hook(self._decoder_begins, prepend=True, with_kwargs=True),
            decoder.register_forward_hook(self._decoder_ends),
            head.register_forward_pre_hook(self._head_begins),
            head.register_forward_hook(self._head_ends),
        ]
        return self

    def __exit__(self, *raised: object) -> None:
        for handle in self._handles:
            handle.remove()
        if self._looking:
            self._looking = False
            super().__exit__(*raised)  # type: ignore[no-untyped-call]

    def _decoder_begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls += 1
        if self._calls == 1:
            if self._looking:
                raise NotPlainError("it calls its decoder more than once")
            self.args, self.kwargs = args, dict(kwargs)

    def _decoder_ends(self, module: nn.Module, args: Any, output: Any) -> None:
        self._calls -= 1
        if not self._calls:
            self._now = last_hidden(output)
            self._positions = self._now.shape[:-1]
            self._looking = True
            super().__enter__()  # type: ignore[no-untyped-call]

    def _head_begins(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._calls:
            return
        if self._headed or not args or args[0] is not self._now:
            raise NotPlainError("its head is not called with the decoder's output")
        self._in_head = True

    def _head_ends(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if not self._calls:
            self._in_head = False
            self._now, self._before, self._headed = output, [], True

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._in_head or self._now is None:
            return result
        leaves = tree_leaves((args, kwargs))
        if any(old is leaf for old in self._before for leaf in leaves):
            raise NotPlainError(f"{func} takes what has been worked on already")
        if not any(leaf is self._now for leaf in leaves):
            return result
        self._follow(func, args, result)
        if result is not self._now:
            self._before.append(self._now)
            self._now = result
        return result

    def _follow(self, func: Any, args: Sequence[Any], result: Any) -> None:
        assert self._now is not None
        if func in _HARMLESS and result.numel() == self._now.numel():
            return
        where = "after its head" if self._headed else "between decoder and head"
        number = _number(args, self._now)
        if self._headed and func in _TIMES and number is not None:
            self.scaling.multiply(number)
        elif self._headed and func in _OVER and number is not None and args[0] is self._now:
            self.scaling.multiply(1.0 / number)
        elif self._headed and func in _TANH and self.scaling.outer is None:
            self.scaling.outer = 1.0
        else:
            raise NotPlainError(f"{func} stands {where}")


def last_hidden(output: Any) -> Tensor:
    """The hidden states among what a decoder gives."""
    found: Tensor = output[0] if isinstance(output, tuple) else output.last_hidden_state
    return found


def _number(args: Sequence[Any], tensor: Tensor) -> float | None:
    """The number that a tensor is multiplied with or divided by, None where it is none."""
    others = [arg for arg in args[:2] if arg is not tensor]
    if len(others) != 1 or isinstance(others[0], bool) or not isinstance(others[0], int | float):
        return None
    return float(others[0])
