"""What `generate` does beside forward passes: it makes copies of rows, and masks for static caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from spectune.deltas.forward_state import ForwardState

_SHADOWED = ("generate", "_expand_inputs_for_generation", "create_masks_for_generate")


class GenerationHook:
    """Stands in for three methods of the model, on this instance alone, while deltas are attached.

    Args:
        puts_tokens_in: whether virtual tokens go into the sequence under the current route.
    """

    def __init__(self, model: PreTrainedModel, state: ForwardState, puts_tokens_in: Callable[[], bool]) -> None:
        self.model, self.state, self.puts_tokens_in = model, state, puts_tokens_in
        self._before = {name: model.__dict__[name] for name in _SHADOWED if name in model.__dict__}
        self._originals: dict[str, Any] = {name: getattr(model, name, None) for name in _SHADOWED}
        self._ours: dict[str, Any] = dict(zip(_SHADOWED, (self.generate, self.expand, self.make_masks), strict=True))
        model.__dict__.update(self._ours)

    def close(self) -> None:
        """The model's own methods again; what somebody put in their place since then stays."""
        for name in _SHADOWED:
            if self.model.__dict__.get(name) == self._ours[name]:
                del self.model.__dict__[name]
                self.model.__dict__.update({name: self._before[name]} if name in self._before else {})

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `generate`; how many copies it makes of each row is forgotten when it ends."""
        before = self.state.thread.copies
        try:
            return self._originals["generate"](*args, **kwargs)
        finally:
            self.state.thread.copies = before

    def expand(self, *args: Any, **kwargs: Any) -> Any:
        """Note how many copies (beams, return sequences) of each row the next passes have, next to each other."""
        self.state.thread.copies = int(kwargs.get("expand_size", args[0] if args else 1))
        return self._originals["_expand_inputs_for_generation"](*args, **kwargs)

    def make_masks(self, *args: Any, **kwargs: Any) -> Any:
        """While a prompt is on, the 2-D mask goes on to the decoder's entry, which knows of the virtual tokens; the
        decoder then makes its mask of full length."""
        if self.puts_tokens_in():
            return kwargs.get("attention_mask")
        if self._originals["create_masks_for_generate"] is not None:
            return self._originals["create_masks_for_generate"](*args, **kwargs)
        from transformers.masking_utils import create_masks_for_generate

        return create_masks_for_generate(*args, **kwargs)
