"""The call of the model around the decoder: one that takes pictures or sound beside the text makes masks and positions
itself.
"""

import inspect
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from spectune.deltas.forward_state import ThreadState
from spectune.deltas.hooks.virtual_tokens import is_2d

#: arguments that a text alone has
_OF_TEXT = frozenset({"input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", "logits_to_keep"})


class OuterCall:
    """Arguments of the wrapper's forward that contains the decoder, while it runs: the 2-D mask, and whether positions
    were given. Nothing where the decoder stands in the model itself."""

    def __init__(self, model: PreTrainedModel, decoder: str, thread: ThreadState) -> None:
        self._thread = thread
        self._handles = []
        path = decoder.split(".")[0]
        if path != decoder:
            module = model.get_submodule(path)
            self._names = list(inspect.signature(module.forward).parameters)
            self._handles = [
                module.register_forward_pre_hook(self._enter, with_kwargs=True),
                module.register_forward_hook(self._leave, always_call=True),
            ]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def text_only(self, call: dict[str, Any], *, prompt: bool, first: bool = True) -> Any:
        """The mask that the text of a decoder's call has: the 2-D one that came from outside (or None), where a
        ready-made one was made of it on the way. Positions made on the way are taken out: they count as not given.

        Args:
            call: of the decoder, by argument name; changed in place.
            prompt: virtual tokens go into the sequence: then the 2-D mask takes the ready-made one's place, which has
                none for them. Not where something beside text came along, which has a say in the mask of a pass of
                several tokens.
            first: the cache is empty.
        """
        mask = call.get("attention_mask")
        outside = self._thread.outer_call
        if outside is None:
            return mask
        outer, made = outside.get("attention_mask"), call.get("position_ids")
        if outside.get("position_ids") is None and isinstance(made, Tensor) and made.dim() == 2:
            call["position_ids"] = None
        if is_2d(mask) or not (outer is None or is_2d(outer)):
            return mask
        if prompt and mask is not None:
            one = any(isinstance(call.get(n), Tensor) and call[n].shape[1] == 1 for n in ("input_ids", "inputs_embeds"))
            beside = [n for n, v in outside.items() if isinstance(v, Tensor) and n not in _OF_TEXT]
            if not beside or (one and not first):
                call["attention_mask"] = outer
        return outer

    @property
    def mask_from_caller(self) -> bool:
        """Whether a ready-made mask that the decoder is given came from outside."""
        outside = self._thread.outer_call
        return outside is None or not (outside.get("attention_mask") is None or is_2d(outside["attention_mask"]))

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._thread.outer_call = {**dict(zip(self._names, args, strict=False)), **kwargs}

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._thread.outer_call = None
