"""When two passes agree: their logits differ by rounding alone, and by little of what the looked-for fault would do."""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectune.deltas.attachment import Attachment

#: how far logits may be apart, as a share of the largest; in precisions that are not named, TOLERANCE_16_BITS
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
TOLERANCE_16_BITS = 6e-2
#: and of what the fault would do to them
SHARE_OF_EFFECT = 0.2


def logits_of(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, **given: Tensor) -> Tensor:
    """Logits `[rows, length, vocabulary]`, float32, of a pass without a cache."""
    found: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False, **given).logits
    return found.float()


def states_of(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, **given: Tensor) -> Tensor:
    """What tells of each token, `[rows, length, features]`, float32: logits; where a model has a trained head, which
    may look at the last token alone, the states that its decoder gives."""
    attachment = Attachment.of(model)
    if attachment is None or not attachment.family.trained_head:
        return logits_of(model, ids, mask, **given)
    found = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False, **given)
    states: Tensor = found.last_hidden_state
    return states.float()


def apart(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The largest absolute difference within any pair of tensors of one shape."""
    return max(float((a - b).abs().max()) for a, b in pairs)


def agree(model: PreTrainedModel, off: float, size: float, effect: float) -> bool:
    """Whether logits that are `off` apart are the same but for rounding. `size`: the largest logit. `effect`: how far
    the fault that is looked for moves them."""
    return off <= min(size * TOLERANCE.get(model.dtype, TOLERANCE_16_BITS), effect * SHARE_OF_EFFECT)
