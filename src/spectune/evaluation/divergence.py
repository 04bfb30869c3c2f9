"""Forgetting: how far a tuned model has moved from its base on text that the base itself would write.

    KL(base || tuned) = mean over positions of  sum_v p_base(v) (log p_base(v) - log p_tuned(v))      [nats per token]

on passages sampled from the base at temperature 1 (or on the user's own text). This needs no benchmark that knows
what the base could do, and so holds for every base.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectune.compute.evaluating import evaluating
from spectune.data import padded
from spectune.deltas import Attachment, route
from spectune.errors import ConfigError, DataError
from spectune.inference import Sampling, context_length, generate_ids


def sample_passages(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, count: int = 64, length: int = 128, seed: int = 0,
    batch_size: int = 64,
) -> list[list[int]]:  # fmt: skip
    """`count` passages of exactly `length` token ids, drawn from the bare base at temperature 1, deltas or not.

    Each begins with the BOS token (EOS where there is none), which counts as one of `length`. A passage goes on past
    an EOS that is drawn, as the packed text did that the base was trained on.

    Raises:
        ConfigError: no BOS or EOS to begin with, or `length` is below 2 or beyond the base's context.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if not isinstance(start, int):
        raise ConfigError(
            "the tokenizer has neither a BOS nor an EOS token, so no passage can begin; give text instead"
        )
    with route(model, None):
        limit = context_length(model)
        if length < 2 or (limit is not None and length > limit):
            raise ConfigError(f"passages of {length} tokens; this base takes from 2 to {limit or 'any number'}")
        drawn = generate_ids(
            model, [[start]] * count, max_new_tokens=length - 1, batch_size=batch_size, sampling=Sampling(seed=seed)
        )
    return [[start, *ids] for ids in drawn]


class KeptLogits:
    """The bare base's logits on the passages, batch by batch, in host memory: for many deltas of one base. Nothing is
    kept where all of them would be more than `most` bytes, or where the device makes them faster than they are copied
    to it."""

    def __init__(self, most: int = 0) -> None:
        self.most = most
        self._known: dict[int, Tensor] = {}

    def of(self, start: int, batches: int, make: Callable[[], Tensor]) -> Tensor:
        """Of the batch that begins with passage `start`, one of so many; from `make` where it is not known."""
        if (known := self._known.get(start)) is not None:
            return known
        logits = make()
        if logits.device.type == "cpu" and logits.nbytes * batches <= self.most:
            self._known[start] = logits
        return logits


def passage_kls(
    model: PreTrainedModel, passages: Sequence[Sequence[int]], batch_size: int = 8, kept: KeptLogits | None = None
) -> list[float]:
    """KL(base || current delta) of each passage, summed over its positions (nats, in float32), in the order given.

    Exactly 0 for a method that starts at its base, until its first step. The bare base is reached by
    `route(model, None)`; a fully tuned model must have been attached with `keep_base=True`.

    Args:
        kept: the base's logits on these very passages in batches of this size, from earlier calls.

    Raises:
        ConfigError: nothing is attached, or no copy of the base was kept.
        DataError: no passage, or an empty one.
    """
    if Attachment.of(model) is None:
        raise ConfigError("forgetting compares a delta with its base, and nothing is attached to this model")
    if not passages or any(len(passage) == 0 for passage in passages):
        raise DataError(f"{len(passages)} passages, of which some or all are empty; expected token ids in each")
    sums: list[float] = []
    kept, starts = kept or KeptLogits(), range(0, len(passages), batch_size)

    def bare(inputs: Mapping[str, Tensor]) -> Tensor:
        with route(model, None):
            logits: Tensor = model(**inputs, use_cache=False).logits
            return logits

    with evaluating(model):
        for start in starts:
            batch = passages[start : start + batch_size]
            inputs = {name: tensor.to(model.device) for name, tensor in padded(batch, 0).items()}
            base = kept.of(start, len(starts), functools.partial(bare, inputs))
            tuned = model(**inputs, use_cache=False).logits
            # row by row: in float32 the logits of a whole batch would be the largest tensors of the run
            sums += [_kl_sum(base[row, : len(ids)], tuned[row, : len(ids)]) for row, ids in enumerate(batch)]
    return sums


def _kl_sum(base: Tensor, tuned: Tensor) -> float:
    """KL of two `[positions, vocabulary]` logits, summed over positions."""
    log_p = base.float().log_softmax(-1)
    log_q = tuned.float().log_softmax(-1)
    p = log_p.exp()
    terms = (p * (log_p - log_q)).masked_fill(p == 0, 0.0)  # 0 log 0 = 0, for vocabularies that mask entries
    # KL is never negative; what rounding leaves below zero is none
    return max(float(terms.sum(-1).cpu().double().sum()), 0.0)
