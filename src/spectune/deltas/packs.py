"""Packed batches: several documents in one sequence, none of which sees another.

The model's attention is told of the documents through the attention and mask functions that `attention.py` registers.
Whether a model listens is proved by running it, not known by its type: see `why_not_packed`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectune.compute.evaluating import evaluating, rehearsing
from spectune.compute.pack_layout import Kernel, Pack
from spectune.deltas.registry import Registry
from spectune.errors import ConfigError, first_line
from spectune.families import token_embedding

#: how far logits of a document in a pack may be from its own, as a share of the largest
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
TOLERANCE_16_BITS = 6e-2
#: and of what it would be if it saw the documents before it
_SHARE_OF_LEAK = 0.2
#: tokens of the documents of the probe; the first two change places with the last two
_PROBE = (5, 4)


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
    registry = Registry.of(model)
    if registry is None:
        raise ConfigError("packing needs an attached delta: it acts through spectune's attention functions")
    registry.open_packing(kernel, longest)
    try:
        yield
    finally:
        registry.close_packing()


@contextlib.contextmanager
def packed(model: PreTrainedModel, documents: Tensor | None) -> Iterator[None]:
    """The forward passes inside are of one packed batch. Call the model with its `input_ids` and `position_ids`, which
    begin at 0 in each document, and no attention mask. Backward may be called outside.

    Args:
        documents: the number of each token's document, `[packs, length]` int64, -1 on padding; None changes nothing.

    Raises:
        ConfigError: outside of `packing`. ValueError: documents in pieces, or padding before the end.
    """
    registry = Registry.of(model)
    if documents is None:
        yield
        return
    if registry is None or not registry.packs:
        raise ConfigError("a packed batch needs `with packing(model)` around it")
    registry.pack_ahead = Pack.of(documents, model.device, registry.kernel, registry.longest)
    try:
        yield
    finally:
        registry.pack_ahead = None


def why_not_packed(model: PreTrainedModel, kernel: Kernel | None = None) -> str | None:
    """Why the model, as it is routed now, cannot be given packed batches; None where it can.

    Two packs of two documents are run, and the same documents apart: their logits have to agree. So types that ignore
    the attention interface, that count distances over the whole sequence, or that carry a state over positions are
    found out whatever they are called.
    """
    device = token_embedding(model).weight.device
    vocabulary = token_embedding(model).weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(1, vocabulary, (size,), generator=generator) for size in (*_PROBE, *_PROBE)]
    # the second document follows another one in the second pack; the third place is padding
    packs = [[texts[0], texts[1]], [texts[2], texts[1]], [texts[3]]]
    try:
        with evaluating(model), packing(model, kernel):
            alone = [_logits(model, [[text]], device)[0] for text in texts]
            together = _logits(model, packs, device, as_documents=True)
            leaking = _logits(model, [[texts[0], texts[1]]], device)[0, _PROBE[0] :]
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    first, second = _PROBE
    pairs = [
        (together[0, :first], alone[0]),
        (together[0, first : first + second], alone[1]),
        (together[1, :first], alone[2]),
        (together[1, first : first + second], alone[1]),
        (together[2, :second], alone[3]),
    ]
    size = max(float(logits.abs().max()) for logits in alone)
    off = max(float((a - b).abs().max()) for a, b in pairs)
    leak = float((leaking - alone[1]).abs().max())
    allowed = min(size * TOLERANCE.get(model.dtype, TOLERANCE_16_BITS), leak * _SHARE_OF_LEAK)
    if off <= allowed:
        return None
    return (
        f"a document's logits in a pack differ from its own by {off / size:.2g} of the largest: this "
        f"{model.config.model_type} model does not keep documents apart (seeing the document before it makes "
        f"{leak / size:.2g})"
    )


def kernel_serves(model: PreTrainedModel, kernel: Kernel) -> bool:
    """Whether the kernel attends in every layer, as the model is trained. Where dropout, eager attention or windows
    beside a prefix have masks made after all, long packs cost more than they save."""
    registry = Registry.of(model)
    device = token_embedding(model).weight.device
    with rehearsing(model, device), packing(model, kernel):
        assert registry is not None, "packing refuses a model without"
        registry.kernel_calls = set()
        try:
            _logits(model, [[torch.tensor([0, 1]), torch.tensor([1])]], device, as_documents=True)
            return len(registry.kernel_calls) == len(registry.family.attentions)
        finally:
            registry.kernel_calls = None


def _logits(
    model: PreTrainedModel, packs: list[list[Tensor]], device: torch.device, *, as_documents: bool = False
) -> Tensor:
    """`[packs, length, vocabulary]` float32 of texts one after the other, as documents of their own or as one text."""
    longest = max(sum(map(len, pack)) for pack in packs)
    ids = torch.stack([_filled(torch.cat(pack), longest, 0) for pack in packs]).to(device)
    if not as_documents:
        found: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
        return found
    numbers = [torch.cat([torch.full_like(text, n) for n, text in enumerate(pack)]) for pack in packs]
    documents = torch.stack([_filled(row, longest, -1) for row in numbers])
    places = torch.stack([_filled(_places(pack), longest, 0) for pack in packs]).to(device)
    with packed(model, documents):
        found = model(input_ids=ids, position_ids=places, use_cache=False).logits.float()
    return found


def _places(pack: list[Tensor]) -> Tensor:
    return torch.cat([torch.arange(len(text)) for text in pack])


def _filled(row: Tensor, length: int, value: int) -> Tensor:
    return torch.cat([row, row.new_full((length - len(row),), value)])
