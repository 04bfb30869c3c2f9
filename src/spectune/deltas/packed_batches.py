"""Packed batches: several documents in one sequence, none of which sees another.

The model's attention is told of the documents through the attention and mask functions that `hooks` registers. Whether
a model keeps them apart is proved by running it, not known by its type: see `probes.documents`.
"""

import contextlib
from collections.abc import Iterator

from torch import Tensor
from transformers import PreTrainedModel

from spectune.compute.pack_layout import Kernel, Pack
from spectune.deltas.attachment import Attachment
from spectune.errors import ConfigError


@contextlib.contextmanager
def packing(model: PreTrainedModel, kernel: Kernel | None = None, longest: int = 0) -> Iterator[None]:
    """While inside, the model can be given packed batches with `packed`; batches without are as ever.

    Args:
        kernel: attention over documents of various lengths (`compute.varlen`); None uses masks.
        longest: tokens of the longest document of all batches, if it is known: compiled blocks then serve them all,
            and not those alone whose longest document is about as long.

    Raises:
        ConfigError: nothing is attached, no attention was found, or attention cannot be exchanged.
    """
    attachment = Attachment.of(model)
    if attachment is None:
        raise ConfigError("packing needs an attached delta: it acts through spectune's attention functions")
    if attachment.state.packing:
        raise ConfigError("packing is on already for this model")
    family, state = attachment.family, attachment.state
    if not family.attentions:
        raise ConfigError(f"no attention was found in this {family.model_type} model")
    with contextlib.ExitStack() as stack:
        for site in family.attentions:
            attachment.sites.open_attention(site.path, "packing")
            stack.callback(attachment.sites.close_attention, site.path)
        state.packing, state.kernel, state.longest = True, kernel, longest
        try:
            yield
        finally:
            state.packing, state.kernel, state.longest = False, None, 0
            state.begin_pass(None)


@contextlib.contextmanager
def packed(model: PreTrainedModel, documents: Tensor | None) -> Iterator[None]:
    """The forward passes inside, on this thread, are of one packed batch. Call the model with its `input_ids` and
    `position_ids`, which begin at 0 in each document, and no attention mask. Backward may be called outside.

    Args:
        documents: the number of each token's document, `[packs, length]` int64, -1 on padding; None changes nothing.

    Raises:
        ConfigError: outside of `packing`. ValueError: documents in pieces, or padding before the end.
    """
    if documents is None:
        yield
        return
    attachment = Attachment.of(model)
    if attachment is None or not attachment.state.packing:
        raise ConfigError("a packed batch needs `with packing(model)` around it")
    state = attachment.state
    state.thread.pack_ahead = Pack.of(documents, model.device, state.kernel, state.longest)
    try:
        yield
    finally:
        state.thread.pack_ahead = None
