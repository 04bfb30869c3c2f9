"""Gradient (activation) checkpointing for as long as a run takes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel


@contextlib.contextmanager
def recomputing(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Switch recomputation of activations on inside the `with`, and leave the model as it was before.

    Newer transformers call it `activation_checkpointing_*` and warn of the old names.
    """
    if not wanted or _is_on(model):
        yield
        return
    listens = getattr(model, "_require_grads_hook", None) is not None
    _method(model, "enable")({"use_reentrant": False})
    if not listens and getattr(model, "_require_grads_hook", None) is not None:
        # reentrant checkpoints need embeddings with gradients, these do not; and "disable" would leave the hook behind,
        # so that every later run on this model kept more of its first layer
        model.disable_input_require_grads()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        _method(model, "disable")()


def _is_on(model: PreTrainedModel) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _method(model: PreTrainedModel, verb: str) -> Any:
    new: Any = getattr(model, f"activation_checkpointing_{verb}", None)
    return new if new is not None else getattr(model, f"gradient_checkpointing_{verb}")
