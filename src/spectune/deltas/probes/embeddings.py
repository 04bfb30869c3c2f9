"""Whether a decoder reads its text from embeddings alone: virtual tokens have no ids."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from spectune.compute.evaluating import evaluating
from spectune.deltas.attachment import Attachment
from spectune.deltas.hooks.caches import carries_other_state
from spectune.deltas.method import plain_tokens
from spectune.deltas.probes.agreement import apart, states_of
from spectune.errors import ConfigError, first_line
from spectune.families import token_embedding

_TOLERANCE = 1e-4
_TOLERANCE_16_BITS = 2e-2


def prove_reads_embeddings(model: PreTrainedModel) -> None:
    """Run a text as token ids and as the embeddings of these, which must give the same logits, and as embeddings of no
    token, which must run. Raises ConfigError: the decoder uses ids some other way too (hashes of them, tables of its
    own)."""
    attachment = Attachment.of(model)
    assert attachment is not None, "asked while a delta is attached"
    state = carries_other_state(attachment.decoder.signature.parameters)
    if state is not None:
        raise ConfigError(
            f"prompt tuning is refused: this {attachment.family.model_type} model carries its state in `{state}`, "
            "which does not tell whether virtual tokens went through it. Use LoRA."
        )
    device = token_embedding(model).weight.device
    # no special ones: some types number positions by which tokens are padding, as ids say, where no positions come
    a, b, c = plain_tokens(model.config.get_text_config(), attachment.family.vocab_size)[:3]
    ids = torch.tensor([[a, c, b, c]], device=device)
    mask = torch.ones_like(ids)
    kind = attachment.family.model_type
    with attachment.state.routed(None), evaluating(model):
        expected = states_of(model, ids, mask)
        try:
            with _as_embeddings(attachment, noise=0.0):
                got = states_of(model, ids, mask)
            with _as_embeddings(attachment, noise=0.1):
                states_of(model, ids, mask)
        except Exception as error:
            raise ConfigError(
                f"prompt tuning is refused: this {kind} model's own code needs token ids, which virtual tokens do not "
                f"have ({type(error).__name__}: {first_line(error)}). Use prefix tuning or LoRA."
            ) from error
    off, size = apart([(got, expected)]), float(expected.abs().max())
    allowed = size * (_TOLERANCE if expected.dtype is torch.float32 and model.dtype is torch.float32
                      else _TOLERANCE_16_BITS)  # fmt: skip
    if not off <= allowed:
        raise ConfigError(
            f"prompt tuning is refused: this {kind} model reads more from token ids than their embeddings (without ids "
            f"its logits move by {off / max(size, 1e-30):.2g} of the largest), and virtual tokens have none. Use "
            "prefix tuning or LoRA."
        )


@contextlib.contextmanager
def _as_embeddings(attachment: Attachment, noise: float) -> Iterator[None]:
    """The decoder is given the embeddings of its text, moved by `noise` of their spread, in place of ids, and a plain
    2-D mask in place of one made of it on the way: as it is given virtual tokens."""
    decoder, names = attachment.decoder.decoder, attachment.decoder.signature.parameters

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = {**dict(zip(names, args, strict=False)), **kwargs}
        attachment.decoder.outer_call.text_only(call, prompt=True)
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        if embeds is None:
            embeds = token_embedding(attachment.model)(ids)
        call["input_ids"] = None
        call["inputs_embeds"] = embeds + noise * embeds.float().std().to(embeds.dtype)
        return (), call

    handle = decoder.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
