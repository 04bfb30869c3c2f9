"""What a head is given: the states of a text's tokens, each of which has seen those before it and no other."""

from typing import Any

import torch
from torch import Tensor

from spectune.deltas.attachment import Attachment
from spectune.deltas.probes.agreement import TOLERANCE, TOLERANCE_16_BITS
from spectune.deltas.probes.base_runs import can_run, run
from spectune.errors import ConfigError


def prove_head_follows_decoder(attachment: Attachment) -> None:
    """Run two texts that differ in their last token through the bare base and look at what its trained head is given.
    What was proved of a base is not proved again.

    Raises:
        ConfigError: the head is given one state for a whole text (which is then made of tokens that a delta may put
            before it), or tokens see those after them: the model is no decoder.
    """
    family, key = attachment.family, "head follows the decoder"
    if not family.trained_head or key in attachment.proved or not can_run(attachment.model):
        return
    path = family.trained_head[0].path
    with attachment.state.routed(None):
        first, second = (_given(attachment, path, [1, 2, 3, last]) for last in (4, 5))
    kind = type(attachment.model).__name__
    if first is None or second is None or first.dim() != 3 or first.shape[1] != 4:
        raise ConfigError(
            f"{kind} is refused: its head ({path}) is not given the states of all tokens, so what it "
            "makes of a text is not known here. Heads are for decoder-only models that look at the last token, or at "
            "each token."
        )
    apart, size = float((first - second)[:, :3].abs().max()), float(first.abs().max())
    if apart > size * TOLERANCE.get(attachment.model.dtype, TOLERANCE_16_BITS):
        raise ConfigError(
            f"{kind} is refused: its tokens see those after them (it is an encoder). Heads are for decoder-only models."
        )
    attachment.proved[key] = True


def _given(attachment: Attachment, path: str, ids: list[int]) -> Tensor | None:
    seen: list[Tensor] = []

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.extend(value.detach().float() for value in (*args, *kwargs.values()) if isinstance(value, Tensor))

    handle = attachment.model.get_submodule(path).register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.no_grad():
            run(attachment.model, ids)
    finally:
        handle.remove()
    return seen[0] if seen else None
