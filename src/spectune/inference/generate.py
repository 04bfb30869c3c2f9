"""Text from a model: so many rows at once, each under its own delta and up to its own end."""

import contextlib
import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from spectune.compute.evaluating import evaluating
from spectune.data import by_length, pad_token_id, padded
from spectune.deltas import Attachment, route
from spectune.errors import ConfigError
from spectune.families import vocabulary_rows
from spectune.inference.answers import decoded, up_to_stop
from spectune.inference.drawing import Sampling
from spectune.inference.engine import Engine
from spectune.inference.engine_bases import text_limit, why_not_engine
from spectune.inference.modes import generation_defaults, seeded
from spectune.inference.request import Request

log = logging.getLogger("spectune")


def generate_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts_ids: Sequence[Sequence[int]], *,
    max_new_tokens: int, batch_size: int = 16, sampling: Sampling | None = None
) -> list[str]:  # fmt: skip
    """The continuation of each prompt as text, in the order given, without the prompt, EOS, BOS and padding.

    Other special tokens are in it: an answer may be one.

    Rows run under the model's current route; one that names a delta for each of as many rows as there are prompts gives
    each prompt its own. A row ends at the first stop token (see `stop_ids`), after
    `max_new_tokens`, or where the base's context ends, whichever comes first. The checkpoint's own generation
    defaults (temperature, penalties) are not used. Output does not depend on `batch_size` but by rounding; sampled
    output is a function of the seed and of a prompt's place among the prompts.

    Args:
        prompts_ids: token ids, exactly the prefix of training (`spectune.data.prompt_ids`); none may be empty.
        sampling: draw tokens; None: take the likeliest.

    Raises:
        ConfigError: an empty prompt, or one that leaves no room in the base's context.
    """
    found = generate_ids(
        model, prompts_ids, max_new_tokens=max_new_tokens, stops=stop_ids(model, tokenizer),
        pad_token_id=pad_token_id(tokenizer, vocabulary_rows(model)), batch_size=batch_size, sampling=sampling,
    )  # fmt: skip
    return [decoded(tokenizer, ids) for ids in found]


def generate_ids(
    model: PreTrainedModel, prompts_ids: Sequence[Sequence[int]], *, max_new_tokens: int, stops: Sequence[int] = (),
    pad_token_id: int = 0, batch_size: int = 16, sampling: Sampling | None = None
) -> list[list[int]]:  # fmt: skip
    """The new token ids of each prompt, in the order given; the stop token is not among them.

    Args:
        stops: ids that end a row; with none, every row has `max_new_tokens`.
        pad_token_id: fills places without a token; it is masked, so any id will do, a stop token's too.
        sampling: as in `generate_texts`.

    Raises:
        ConfigError: see `generate_texts`; an id beyond the model's embedding.
    """
    _check_ids(model, prompts_ids)
    rooms = _rooms(model, prompts_ids, max_new_tokens)
    if not rooms:
        return []
    names = _names(model, len(rooms))
    with evaluating(model):
        reason = why_not_engine(model, names)
        if reason is None:
            requests = [
                Request(prompt, room, name, stops, sampling, stream)
                for stream, (prompt, room, name) in enumerate(zip(prompts_ids, rooms, names, strict=True))
            ]
            return _by_engine(model, requests, pad_token_id, batch_size)
        log.debug("transformers' own generate writes: %s", reason)
        return _by_generate(model, prompts_ids, rooms, stops, pad_token_id, batch_size, sampling)


def _names(model: PreTrainedModel, prompts: int) -> tuple[str | None, ...]:
    """The delta of each prompt under the current route. Raises ConfigError: it is of another number of rows."""
    attachment = Attachment.of(model)
    return (None,) * prompts if attachment is None else attachment.state.current.over(prompts)


def _by_engine(
    model: PreTrainedModel, requests: Sequence[Request], pad_token_id: int, batch_size: int
) -> list[list[int]]:
    """What the engine writes, in the order of the requests. Raises what went wrong with one of them."""
    steps = sum(request.max_new_tokens for request in requests) / batch_size
    engine = Engine(model, rows=batch_size, pad_token_id=pad_token_id, expected_steps=steps)
    with contextlib.closing(engine):
        # the longest first: memory that does not suffice shows at once
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index].ids))
        tickets = {index: engine.submit(requests[index]) for index in order}
        while not engine.idle:
            for written in engine.step():
                if written.error is not None:
                    raise written.error
        return [tickets[index].ids for index in range(len(requests))]


def _by_generate(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], rooms: Sequence[int], stops: Sequence[int],
    pad_token_id: int, batch_size: int, sampling: Sampling | None,
) -> list[list[int]]:  # fmt: skip
    """The same by transformers, in batches."""
    results: list[list[int]] = [[] for _ in prompts]
    drawn = {} if sampling is None else {"do_sample": True, **asdict(sampling)}
    names = _names(model, len(prompts))
    with seeded(drawn.pop("seed", 0), model.device):
        for batch in _batches([len(prompt) for prompt in prompts], rooms, batch_size):
            config = plain_config(rooms[batch[0]], stops, pad_token_id, **drawn)
            of_rows = [names[index] for index in batch]
            routed = contextlib.nullcontext() if len(set(names)) == 1 else route(model, of_rows)
            with routed:
                new = generate_batch(model, [prompts[index] for index in batch], config)
            for index, ids in zip(batch, new, strict=True):
                # cut by position: padding may be the stop token itself
                results[index] = up_to_stop(ids, stops)
    return results


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a text: the tokenizer's EOS, which training teaches, and those of the checkpoint's generation
    config (chat models end a turn with one of their own)."""
    of_config = model.generation_config.eos_token_id if model.generation_config is not None else None
    given = [tokenizer.eos_token_id, *(of_config if isinstance(of_config, list) else [of_config])]
    return list(dict.fromkeys(stop for stop in given if isinstance(stop, int)))


def context_length(model: PreTrainedModel) -> int | None:
    """The most text tokens that the model takes now: its table of positions, or what its config says it was made
    for, less the virtual tokens of the current delta. None where nothing limits it."""
    limit, attachment = text_limit(model), Attachment.of(model)
    virtual = 0 if attachment is None else attachment.state.most_virtual_tokens
    return None if math.isinf(limit) else int(limit) - virtual


def _check_ids(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None:
    """Raises ConfigError: an id that the model's embedding does not have."""
    rows = vocabulary_rows(model)
    for number, prompt in enumerate(prompts, start=1):
        if prompt and max(prompt) >= rows:
            raise ConfigError(
                f"prompt {number} holds the token id {max(prompt)}, and the base's embedding has {rows} rows: make it "
                "larger with model.resize_token_embeddings(len(tokenizer)), or use the base's own tokenizer"
            )


def _rooms(model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[int]:
    """How many new tokens each prompt may have."""
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens = {max_new_tokens}; expected at least 1")
    limit = context_length(model)
    rooms = []
    for number, prompt in enumerate(prompts, start=1):
        if len(prompt) == 0:
            raise ConfigError(f"prompt {number} is empty; a model needs at least one token to go on from")
        room = max_new_tokens if limit is None else min(max_new_tokens, limit - len(prompt))
        if room < 1:
            raise ConfigError(
                f"prompt {number} has {len(prompt)} tokens; this base takes {limit} and there must be room for one "
                "more. Shorten the prompt."
            )
        rooms.append(room)
    return rooms


def _batches(lengths: Sequence[int], rooms: Sequence[int], batch_size: int) -> list[list[int]]:
    """Rows of like length together, the longest first; only rows with the same room share a batch, so that what a row
    may write does not depend on its neighbours."""
    alike = itertools.groupby(sorted(range(len(lengths)), key=rooms.__getitem__), rooms.__getitem__)
    return [batch for _, members in alike for batch in by_length(list(members), lengths, batch_size)]


def plain_config(new_tokens: int, stops: Sequence[int], pad_token_id: int, **more: Any) -> GenerationConfig:
    """A generation config: greedy with the KV cache unless `more` overrides it, without a checkpoint's defaults."""
    fields: dict[str, Any] = {"do_sample": False, "num_beams": 1, "use_cache": True, **more}
    fields.update(max_new_tokens=new_tokens, eos_token_id=list(stops) or None, pad_token_id=pad_token_id)
    make: Any = GenerationConfig  # untyped in transformers
    config: GenerationConfig = make(**fields)
    return config


def generate_batch(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], config: GenerationConfig, **more: Any
) -> list[list[int]]:
    """New ids of one batch, what stands after a stop token included."""
    batch = padded(prompts, int(config.pad_token_id or 0), padding_side="left")
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    generate: Any = model.generate
    with generation_defaults(model):
        out: Tensor = generate(**inputs, generation_config=config, **more)
    new: list[list[int]] = out[:, inputs["input_ids"].shape[1] :].tolist()
    return new
