"""cuDNN's attention, which torch takes first on Hopper and Blackwell (its sdp_utils), and where it may be taken.

On long rows it is up to twice as fast as flash attention. But it makes an execution plan for each shape that it has not
met, 40 to 80 ms in forward and as much in backward (H200, torch 2.11), where attention itself takes a fraction of one.
Batches of unlike rows are such shapes, and so is each token that is generated: it adds a key. And with a mask that
leaves a query nothing to see, its gradients were not finite there (docs/results/kernels.md).

So it is off wherever the library runs a model, but for training steps of which a run has decided, and proved, that they
call attention as cuDNN is known to be right for (`why_not`).
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def cudnn_allowed() -> bool:
    """Whether torch may take cuDNN's attention now, where there is a device for it."""
    return bool(torch.backends.cuda.cudnn_sdp_enabled())  # type: ignore[no-untyped-call]


class _Off:
    """Torch's switch is the whole process's, and threads may evaluate side by side: the first that wants it off
    switches it off, and the last one that is done puts back what the first one found."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._before = False

    def hold(self) -> None:
        with self._lock:
            if not self._holders:
                self._before = cudnn_allowed()
                torch.backends.cuda.enable_cudnn_sdp(False)
            self._holders += 1

    def release(self) -> None:
        with self._lock:
            self._holders -= 1
            if not self._holders:
                torch.backends.cuda.enable_cudnn_sdp(self._before)


_off = _Off()


@contextlib.contextmanager
def cudnn_attention(allowed: bool) -> Iterator[None]:
    """Whether torch may take it inside. Where the user has switched it off, or it is off around this, it stays off;
    another thread that has it off has it off for this one too, as torch has one switch."""
    if allowed:
        yield
        return
    _off.hold()
    try:
        yield
    finally:
        _off.release()


def why_not(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, **_: Any,
) -> str | None:  # fmt: skip
    """Why a call of `scaled_dot_product_attention` is not one that cuDNN may be given; None where it is, or where torch
    gives it to another kernel anyway."""
    if attn_mask is not None:
        return "attention has a mask"
    if dropout_p:
        return "attention has dropout"
    if not is_causal and query.shape[-2] > 1:
        return "attention is not causal"
    if query.shape[-2] != key.shape[-2]:
        return "there are more keys than queries"
    if query.shape[-1] != value.shape[-1]:
        return "keys and values are of unlike sizes"
    return None


@contextlib.contextmanager
def calls_seen(see: Callable[..., None]) -> Iterator[None]:
    """Inside, `see` is given what each call of `scaled_dot_product_attention` in this process is."""
    attend = F.scaled_dot_product_attention

    def seen(*args: Any, **kwargs: Any) -> Tensor:
        see(*args, **kwargs)
        return attend(*args, **kwargs)

    F.scaled_dot_product_attention = seen
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attend
