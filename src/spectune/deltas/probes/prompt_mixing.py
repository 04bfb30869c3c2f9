"""Whether rows with prompts of unlike lengths can share a batch: the shorter ones are padded on the left."""

import inspect
from collections.abc import Sequence

import torch

from spectune.compute.evaluating import evaluating
from spectune.deltas.attachment import Attachment
from spectune.deltas.layout import Route
from spectune.deltas.method import plain_tokens
from spectune.deltas.modules import InputModule
from spectune.deltas.probes.agreement import apart, states_of
from spectune.deltas.probes.base_runs import can_run
from spectune.deltas.slots import get
from spectune.errors import ConfigError
from spectune.families import token_embedding

_TOLERANCE = 1e-3
_TOLERANCE_16_BITS = 4e-2


def prove_prompts_mix(attachment: Attachment, names: Sequence[str | None]) -> None:
    """Where a route has prompts of unlike lengths for the rows of one batch, run a few tokens once for the model: left
    padding must change nothing, nor must a neighbour's prompt. Raises ConfigError: the base's answers depend on what
    stands before a row (absolute positions that cannot be given, a state that runs over padding)."""
    host = attachment.model.get_submodule(attachment.family.decoder)
    lengths = {
        name: attachment.state.count_of(name) if isinstance(get(host, name), InputModule) else 0
        for name in dict.fromkeys(names)
    }
    if len(set(lengths.values())) < 2 or not can_run(attachment.model):
        return
    if "prompts mix" not in attachment.proved:
        longest = max(lengths, key=lambda name: lengths[name])
        attachment.proved["prompts mix"] = _measure(attachment, longest)
    moved = attachment.proved["prompts mix"]
    allowed = _TOLERANCE if attachment.model.dtype in (torch.float32, torch.float64) else _TOLERANCE_16_BITS
    if not moved <= allowed:
        raise ConfigError(
            "the route gives rows of one batch prompts of unlike lengths, so that some are padded on the left, and "
            f"this {attachment.family.model_type} model's answers are not the same then (its logits move by "
            f"{moved:.2g} of the largest). Route each prompt's rows in a batch of their own."
        )


def _measure(attachment: Attachment, longest: str | None) -> float:
    """How far the bare base's logits of a row move, as a share of the largest: with padding on its left, and beside a
    row with a prompt."""
    model = attachment.model
    a, b, c = plain_tokens(model.config.get_text_config(), attachment.family.vocab_size)[:3]
    text = torch.tensor([[a, c, b]], device=token_embedding(model).weight.device)
    padded = torch.cat([torch.full_like(text[:, :2], b), text], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :2] = 0
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    given = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if takes_positions else {}
    whole = torch.ones_like(text)
    # these are no passes of a packed batch that may be at hand
    state = attachment.state
    pack, state.thread.pack_ahead = state.thread.pack_ahead, None
    try:
        with evaluating(model):
            with state.routed(None):
                alone = states_of(model, text, whole)[0]
                behind_padding = states_of(model, padded, mask, **given)[0, 2:]
            with state.routed(Route([None, longest], per_row=True)):
                beside = states_of(model, text.repeat(2, 1), whole.repeat(2, 1))[0]
    finally:
        state.thread.pack_ahead = pack
    return apart([(behind_padding, alone), (beside, alone)]) / max(float(alone.abs().max()), 1e-30)
