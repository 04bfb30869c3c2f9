"""How a model calls torch's attention in training: whether as cuDNN's kernels are known to be right for."""

from typing import Any

import torch
from transformers import PreTrainedModel

from spectune.compute.cudnn import calls_seen, why_not
from spectune.compute.evaluating import rehearsing
from spectune.errors import first_line
from spectune.families import token_embedding


def why_not_cudnn(model: PreTrainedModel, length: int) -> str | None:
    """Why a model, as it is routed now, is not to train through cuDNN's attention on rows of up to `length` tokens that
    come without a mask; None where it may.

    One row as long is run in training mode, and every call is looked at: so sliding windows, biases by position,
    prefixes that widen a mask and dropout are found whatever makes them. Shorter rows make no mask that this one does
    not. What calls torch's attention past `torch.nn.functional` cannot be looked at, and counts as no call."""
    embedding = token_embedding(model).weight
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, embedding.shape[0], (1, length), generator=generator).to(embedding.device)
    calls: list[str | None] = []

    def see(*args: Any, **kwargs: Any) -> None:
        calls.append(why_not(*args, **kwargs))

    try:
        # without the head: logits of a long row may be the largest tensor of all
        with rehearsing(model, embedding.device), calls_seen(see):
            model.base_model(input_ids=ids, use_cache=False)
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    if not calls:
        return "the model does not call torch's attention"
    return next((reason for reason in calls if reason is not None), None)
