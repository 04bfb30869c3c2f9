"""Which runs may have their rows in one pass, proved by running the base on a few tokens."""

import torch
from torch import Tensor

from spectune.compute.evaluating import rehearsing
from spectune.deltas import Attachment, Delta, Method, plain_tokens, route
from spectune.errors import ConfigError, first_line
from spectune.families import token_embedding
from spectune.objectives import objective_of


def why_never_shared(method: Method) -> str | None:
    """Why no run of a method can share a pass, whatever the base; None where some can."""
    return f"{method.label} trains the base itself" if method.trains_base else None


def why_not_shared(delta: Delta) -> str | None:
    """Why rows of an attached delta cannot be in one pass with rows of others in training; None where they can."""
    if (reason := why_never_shared(delta.method)) is not None:
        return reason
    model, attachment = delta.model, Attachment.of(delta.model)
    assert attachment is not None
    a, b, c = plain_tokens(model.config.get_text_config(), attachment.family.vocab_size)[:3]
    ids = torch.tensor([[a, b, c], [b, c, a]], device=token_embedding(model).weight.device)
    with rehearsing(model, model.device):
        before = _random_state(model.device)
        try:
            with route(model, [delta.name, None]):
                model(**objective_of(model).inputs(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}))
        except ConfigError as error:
            return first_line(error)
        after = _random_state(model.device)
    if any(not torch.equal(one, other) for one, other in zip(before, after, strict=True)):
        return "random numbers are drawn in a pass (dropout), and each run has its own"
    return None


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
