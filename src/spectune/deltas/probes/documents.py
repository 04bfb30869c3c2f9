"""Whether a model keeps the documents of packed batches apart, proved by running it."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectune.compute.evaluating import evaluating, rehearsing
from spectune.compute.pack_layout import Kernel
from spectune.deltas.attachment import Attachment
from spectune.deltas.packed_batches import packed, packing
from spectune.deltas.probes.agreement import agree, apart, logits_of
from spectune.deltas.probes.base_runs import proved_as_routed
from spectune.errors import first_line
from spectune.families import token_embedding

#: tokens of the documents of the probe; the first two change places with the last two
_PROBE = (5, 4)


def why_not_packed(model: PreTrainedModel, kernel: Kernel | None = None) -> str | None:
    """Why the model, as it is routed now, cannot be given packed batches; None where it can.

    Two packs of two documents are run, and the same documents apart: their logits have to agree. So types that ignore
    the attention interface, that count distances over the whole sequence, or that carry a state over positions are
    found out whatever they are called. What has been proved is not proved again for another delta of the method."""
    proved, key = proved_as_routed(model, "keeps documents apart", kernel)
    if key not in proved and (reason := _why_not_packed(model, kernel)) is not None:
        return reason
    proved[key] = True
    return None


def _why_not_packed(model: PreTrainedModel, kernel: Kernel | None) -> str | None:
    embedding = token_embedding(model).weight
    device, generator = embedding.device, torch.Generator().manual_seed(0)
    texts = [torch.randint(1, embedding.shape[0], (size,), generator=generator) for size in (*_PROBE, *_PROBE)]
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
    off, leak = apart(pairs), apart([(leaking, alone[1])])
    if agree(model, off, size, leak):
        return None
    return (
        f"a document's logits in a pack differ from its own by {off / size:.2g} of the largest: this "
        f"{model.config.model_type} model does not keep documents apart (seeing the document before it makes "
        f"{leak / size:.2g})"
    )


def kernel_serves(model: PreTrainedModel, kernel: Kernel) -> bool:
    """Whether the kernel attends in every layer, as the model is trained. Where dropout, eager attention or windows
    beside a prefix have masks made after all, long packs cost more than they save. Found out once for all deltas of a
    method."""
    proved, key = proved_as_routed(model, "kernel attends", kernel)
    if key not in proved:
        proved[key] = _kernel_serves(model, kernel)
    return bool(proved[key])


def _kernel_serves(model: PreTrainedModel, kernel: Kernel) -> bool:
    attachment = Attachment.of(model)
    device = token_embedding(model).weight.device
    with rehearsing(model, device), packing(model, kernel):
        assert attachment is not None, "packing refuses a model without"
        thread = attachment.state.thread
        thread.kernel_calls = set()
        try:
            _logits(model, [[torch.tensor([0, 1]), torch.tensor([1])]], device, as_documents=True)
            return len(thread.kernel_calls) == len(attachment.family.attentions)
        finally:
            thread.kernel_calls = None


def _logits(
    model: PreTrainedModel, packs: list[list[Tensor]], device: torch.device, *, as_documents: bool = False
) -> Tensor:
    """`[packs, length, vocabulary]` float32 of texts one after the other, as documents of their own or as one text."""
    longest = max(sum(map(len, pack)) for pack in packs)
    ids = torch.stack([_filled(torch.cat(pack), longest, 0) for pack in packs]).to(device)
    if not as_documents:
        return logits_of(model, ids, torch.ones_like(ids))
    numbers = [torch.cat([torch.full_like(text, n) for n, text in enumerate(pack)]) for pack in packs]
    documents = torch.stack([_filled(row, longest, -1) for row in numbers])
    places = torch.stack([_filled(_places(pack), longest, 0) for pack in packs]).to(device)
    with packed(model, documents):
        return logits_of(model, ids, position_ids=places)


def _places(pack: list[Tensor]) -> Tensor:
    return torch.cat([torch.arange(len(text)) for text in pack])


def _filled(row: Tensor, length: int, value: int) -> Tensor:
    return torch.cat([row, row.new_full((length - len(row),), value)])
