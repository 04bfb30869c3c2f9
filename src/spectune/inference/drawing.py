"""Drawing tokens: one uniform number a token from the request's own stream, through the inverse of the distribution's
cumulative sum. So what a row draws depends on no neighbour, no batch and no device.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: from the model's own distribution unless something is set."""

    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


def uniform_stream(seed: int, stream: int) -> random.Random:
    """The uniform numbers of one row. `stream`: which of several rows with one seed."""
    return random.Random(f"{seed}-{stream}")


def draw(logits: Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float]) -> Tensor:
    """A token for each row, int64 `[rows]`.

    Args:
        logits: `[rows, vocabulary]`, float32.
        samplings: of each row; the temperature is above 0.
        uniforms: a number in [0, 1) for each row.
    """
    # a sum over a vocabulary in float32 is off by more than a rare token's share of it
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    settings = torch.tensor(
        [[s.temperature, u] for s, u in zip(samplings, uniforms, strict=True)], dtype=exact
    ).to(logits.device, non_blocking=True)  # fmt: skip
    scaled = logits.to(exact) / settings[:, :1]
    limited = [row for row, sampling in enumerate(samplings) if sampling.top_k > 0 or sampling.top_p < 1]
    if limited:
        picked = torch.tensor(limited).to(logits.device, non_blocking=True)
        scaled = scaled.index_copy(0, picked, _limited(scaled[picked], [samplings[row] for row in limited]))
    cumulative = scaled.softmax(-1).cumsum(-1)
    total = cumulative[:, -1:]
    # below the whole sum, however the product is rounded: behind it are tokens of no probability
    wanted = torch.minimum(settings[:, 1:] * total, torch.nextafter(total, torch.zeros_like(total)))
    # the last one where a model gives what is no number: any token is an id that the model has
    return torch.searchsorted(cumulative, wanted, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def _limited(scaled: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Scaled logits with those of tokens that are not drawn at minus infinity: first beyond the `top_k` likeliest, then
    of what is left beyond the likeliest that together have `top_p`. Tokens as likely as the last one stay, too."""
    vocabulary = scaled.shape[-1]
    kept = [min(sampling.top_k, vocabulary) if sampling.top_k > 0 else vocabulary for sampling in samplings]
    if min(kept) < vocabulary:
        counts = torch.tensor(kept).to(scaled.device, non_blocking=True)[:, None]
        largest = max(count for count in kept if count < vocabulary)
        least = scaled.topk(largest, dim=-1).values.gather(-1, counts.clamp(max=largest) - 1)
        scaled = scaled.masked_fill((scaled < least) & (counts < vocabulary), -torch.inf)
    if min(sampling.top_p for sampling in samplings) < 1:
        shares = torch.tensor([sampling.top_p for sampling in samplings], dtype=scaled.dtype)
        shares = shares.to(scaled.device, non_blocking=True)[:, None]
        probabilities = scaled.softmax(-1)
        ordered = probabilities.sort(dim=-1, descending=True).values
        before = ordered.cumsum(-1) - ordered
        # the likeliest one always stays
        within = (before < shares).sum(-1, keepdim=True).clamp(min=1)
        least = ordered.gather(-1, within - 1)
        scaled = scaled.masked_fill((probabilities < least) & (shares < 1), -torch.inf)
    return scaled


def likelihoods(
    logits: Tensor, tokens: Tensor, asked: Mapping[int, int]
) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
    """Log p of rows' tokens, and the likeliest tokens with theirs, the likeliest first; by row.

    Args:
        logits: `[rows, vocabulary]`, float32.
        tokens: int64 `[rows]`.
        asked: by row, how many of the likeliest.
    """
    if not asked:
        return {}
    numbers = torch.tensor(list(asked)).to(logits.device, non_blocking=True)
    logs = logits[numbers].log_softmax(-1)
    own = logs.gather(-1, tokens[numbers, None])[:, 0].tolist()
    most = logs.topk(min(max(asked.values()), logs.shape[-1]), dim=-1)
    rows = zip(asked.items(), own, most.indices.tolist(), most.values.tolist(), strict=True)
    return {
        number: (logprob, tuple(zip(ids, values, strict=True))[:count])
        for (number, count), logprob, ids, values in rows
    }
