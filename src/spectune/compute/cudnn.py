"""cuDNN's attention, which torch takes first on Hopper and Blackwell (its sdp_utils), and where it is left out.

On long rows it is up to twice as fast as flash attention. But it makes an execution plan for each shape that it has not
met, 40 to 80 ms in forward and as much in backward (H200, torch 2.11), where attention itself takes a fraction of one.
Batches of unlike rows are such shapes, and so is each token that is generated: it adds a key.
"""

import contextlib
from collections.abc import Iterator

import torch


def cudnn_allowed() -> bool:
    """Whether torch may take cuDNN's attention now, where there is a device for it."""
    return bool(torch.backends.cuda.cudnn_sdp_enabled())  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def cudnn_attention(allowed: bool) -> Iterator[None]:
    """Whether torch may take it inside. Where the user has switched it off, it stays off."""
    before = cudnn_allowed()
    torch.backends.cuda.enable_cudnn_sdp(before and allowed)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
