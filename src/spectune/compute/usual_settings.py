"""torch as it is by itself, whatever the caller's surroundings ask for."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def usual_settings(device: torch.device) -> Iterator[None]:
    """Inside, tensors are made on the CPU, in float32 where no dtype is given, are no inference tensors, and nothing is
    computed under autocast on `device`: weights that are made here are the same everywhere, and can be trained.

    The default dtype is the process's: other threads see float32 as well."""
    dtype = torch.get_default_dtype()
    kinds = [kind for kind in {device.type, "cpu"} if torch.amp.is_autocast_available(kind)]
    autocast = [torch.autocast(kind, enabled=False) for kind in kinds]
    # a default device looks at every call of torch's, and takes a fourth of the time of attaching
    elsewhere = torch.get_default_device().type != "cpu"
    with contextlib.ExitStack() as stack, torch.inference_mode(False):
        if elsewhere:
            stack.enter_context(torch.device("cpu"))
        for context in autocast:
            stack.enter_context(context)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
