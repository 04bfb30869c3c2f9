"""Methods of the model that stand in for its own, on this instance alone, while deltas are attached."""

from collections.abc import Callable
from typing import Any, NoReturn

from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from spectune.deltas.forward_state import ForwardState


class ModelMethods:
    """`generate` makes copies of rows, and masks for static caches; `save_pretrained` would write deltas into the base.
    `puts_tokens_in`: whether virtual tokens go into the sequence under the current route. `refuse_save`: takes the
    place of `save_pretrained`."""

    def __init__(
        self, model: PreTrainedModel, state: ForwardState, puts_tokens_in: Callable[[], bool],
        refuse_save: Callable[..., NoReturn]
    ) -> None:  # fmt: skip
        self.model, self.state, self.puts_tokens_in = model, state, puts_tokens_in
        self._ours: dict[str, Any] = {
            "generate": self.generate,
            "_expand_inputs_for_generation": self.expand,
            "create_masks_for_generate": self.make_masks,
            "save_pretrained": refuse_save,
        }
        self._own: dict[str, Any] = {name: getattr(model, name, None) for name in self._ours}
        # of the instance itself (a quantised base refuses to save); the class's others come back by themselves
        self._before = {name: model.__dict__[name] for name in self._ours if name in model.__dict__}
        model.__dict__.update(self._ours)

    def close(self) -> None:
        """The model's own methods again; what somebody put in their place since then stays."""
        for name, ours in self._ours.items():
            if self.model.__dict__.get(name) == ours:
                del self.model.__dict__[name]
                self.model.__dict__.update({name: self._before[name]} if name in self._before else {})

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `generate`; how many copies it makes of each row is forgotten when it ends."""
        before = self.state.thread.copies
        try:
            return self._own["generate"](*args, **kwargs)
        finally:
            self.state.thread.copies = before

    def expand(self, *args: Any, **kwargs: Any) -> Any:
        """Note how many copies (beams, return sequences) of each row the next passes have, next to each other."""
        self.state.thread.copies = int(kwargs.get("expand_size", args[0] if args else 1))
        return self._own["_expand_inputs_for_generation"](*args, **kwargs)

    def make_masks(self, *args: Any, **kwargs: Any) -> Any:
        """While a prompt is on, the 2-D mask goes on to the decoder's entry, which knows of the virtual tokens; the
        decoder then makes its mask of full length."""
        if self.puts_tokens_in():
            return kwargs.get("attention_mask")
        return (self._own["create_masks_for_generate"] or create_masks_for_generate)(*args, **kwargs)
