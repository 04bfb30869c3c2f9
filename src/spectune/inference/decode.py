"""How fast a model writes: new tokens a second, one after the other, with the KV cache."""

import contextlib
import functools
import statistics
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from spectune.compute.evaluating import evaluating
from spectune.deltas import Attachment
from spectune.errors import ConfigError
from spectune.inference.engine import Engine
from spectune.inference.engine_bases import why_not_engine
from spectune.inference.generate import context_length, generate_batch, plain_config, stop_ids
from spectune.inference.modes import wait_for
from spectune.inference.request import Request, Written


def decode_tokens_per_second(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch: int = 1, new_tokens: int = 64,
    repeats: int = 3, prompt_tokens: int = 16, warm_up: int = 1
) -> float:  # fmt: skip
    """Decoded tokens a second over all rows: the median of `repeats`, after `warm_up` runs that do not count.

    The prefill is left out: the clock starts when the first new token is there and stops at the last, so a run times
    `new_tokens - 1` steps of one token a row. Greedy, with EOS forbidden, so that every run is of the same length.
    The prompt is a fixed draw of token ids: time does not depend on what the text says.

    Raises:
        ConfigError: fewer than 2 new tokens, no repeat, or more tokens than the base's context has.
    """
    if new_tokens < 2 or repeats < 1 or batch < 1 or prompt_tokens < 1:
        raise ConfigError(
            f"new_tokens = {new_tokens}, repeats = {repeats}, batch = {batch}, prompt_tokens = {prompt_tokens}; "
            "expected at least 2 new tokens and at least 1 of the others"
        )
    limit = context_length(model)
    if limit is not None and prompt_tokens + new_tokens > limit:
        raise ConfigError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new ones; this base takes {limit} together. Use fewer."
        )
    stops = stop_ids(model, tokenizer)
    vocabulary = int(model.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, vocabulary, (batch, prompt_tokens), generator=generator).tolist()
    if model.device.type == "cuda" and new_tokens > 2:
        warm_up = max(warm_up, 1)  # steps are recorded in the first run
    rates = []
    with evaluating(model), contextlib.ExitStack() as stack:
        names = _routed(model, batch)
        if why_not_engine(model, names) is None:
            engine = Engine(model, rows=batch, expected_steps=new_tokens * (warm_up + repeats))
            stack.enter_context(contextlib.closing(engine))
            requests = [Request(prompt, new_tokens, name) for prompt, name in zip(prompts, names, strict=True)]
            timed = functools.partial(_by_engine, engine, requests)
        else:
            timed = functools.partial(_by_generate, model, prompts, new_tokens, stops)
        for run in range(warm_up + repeats):
            seconds = timed()
            if run >= warm_up:
                rates.append(batch * (new_tokens - 1) / seconds)
    return statistics.median(rates)


def _routed(model: PreTrainedModel, batch: int) -> tuple[str | None, ...]:
    """The delta of each row under the current route."""
    attachment = Attachment.of(model)
    return (None,) * batch if attachment is None else attachment.state.current.over(batch)


def _by_engine(engine: Engine, requests: Iterable[Request]) -> float:
    """Seconds from the first token to the last; no token stops a row."""
    for request in requests:
        engine.submit(request)
    _raise_failed(engine.enter())
    wait_for(engine.model.device)
    start = time.perf_counter()
    while not engine.idle:
        _raise_failed(engine.advance())
    wait_for(engine.model.device)
    return time.perf_counter() - start


def _raise_failed(written: Iterable[Written]) -> None:
    for one in written:
        if one.error is not None:
            raise one.error


def _by_generate(model: PreTrainedModel, prompts: list[list[int]], new_tokens: int, stops: list[int]) -> float:
    """The same by transformers, which has to be told that stop tokens stop nothing."""
    config = plain_config(new_tokens, stops, stops[0] if stops else 0, min_new_tokens=new_tokens if stops else None)
    clock = _Clock(model.device, new_tokens)
    generate_batch(model, prompts, config, stopping_criteria=StoppingCriteriaList([clock]))
    return clock.times[1] - clock.times[0]


class _Clock(StoppingCriteria):
    """A stopping criterion that never stops: `generate` calls it after each token, and it records the times of the
    first and the last."""

    def __init__(self, device: torch.device, tokens: int) -> None:
        self.device = device
        self.tokens = tokens
        self.count = 0
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.count += 1
        if self.count in (1, self.tokens):
            wait_for(self.device)
            self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
