"""Which bases the decode engine writes with: those whose pass over one token a row, with our cache, masks and
positions, gives what their plain pass over the whole text gives."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectune.compute.evaluating import evaluating
from spectune.deltas import Attachment, AttentionModule, Route, agree, apart
from spectune.errors import first_line, is_out_of_memory
from spectune.families import Family, describe, vocabulary_rows
from spectune.inference.decode_batch import Caller, DecodeBatch
from spectune.objectives import CAUSAL_LM, objective_of

#: tokens of the two texts of the probe that go through the first pass, and those that follow one by one
_READ, _FOLLOWING = (6, 3), 2
_QUESTION = "written by the engine"


def windows_of(model: PreTrainedModel) -> dict[str, int | None]:
    """How far layers see, by the kind of layer as the base's masks are named; one entry where all are alike."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["full_attention" if window is None else "sliding_attention"]
    return {kind: window if kind == "sliding_attention" else None for kind in dict.fromkeys(kinds)}


def why_not_engine(model: PreTrainedModel, names: Iterable[str | None] = ()) -> str | None:
    """Why the engine does not write with a base, or under one of these deltas; None where it does. Found out by running
    the base, once while deltas are on it."""
    attachment = Attachment.of(model)
    proved: dict[Any, Any] = {} if attachment is None else attachment.proved
    key = (_QUESTION, str(model.config.get_text_config()._attn_implementation), model.dtype)
    if key not in proved:
        proved[key] = _unfit(model) or _differs(model)
    found: str | None = proved[key]
    if found is None and attachment is not None:
        reasons = (why_not_delta(attachment, name) for name in dict.fromkeys(names) if name is not None)
        found = next((reason for reason in reasons if reason is not None), None)
    return found


def _unfit(model: PreTrainedModel) -> str | None:
    """What can be told of a base without running it."""
    if objective_of(model).task_type != CAUSAL_LM.task_type:
        return "it has a head in place of a vocabulary's"
    if getattr(model.config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    call = Caller(model)
    missing = [name for name in ("attention_mask", "position_ids", call.cache_name) if name not in call.parameters]
    if missing:
        return f"it does not take {', '.join(missing)}"
    attention = str(model.config.get_text_config()._attn_implementation).removeprefix("spectune_")
    if attention not in ("eager", "sdpa"):
        return f"its attention is {attention!r}, and masks for rows of unlike lengths go with eager and SDPA"
    strange = [kind for kind in windows_of(model) if kind not in ("full_attention", "sliding_attention")]
    if strange:
        return f"it has layers of the kind {strange[0]}"
    if getattr(model.config.get_text_config(), "attention_chunk_size", None) is not None and strange:
        return "its attention goes by chunks"
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        return "some of its weights are loaded for each call"
    return None


def _differs(model: PreTrainedModel) -> str | None:
    """How what the engine computes differs from the base's plain pass; None where it does not."""
    call = Caller(model, probing=True)
    texts = _texts(vocabulary_rows(model))
    try:
        with evaluating(model), _bare(model):
            expected = [_alone(call, text, end) for text, read in zip(texts, _READ, strict=True)
                        for end in range(read, read + _FOLLOWING + 1)]  # fmt: skip
            without_first = _alone(call, texts[0][1:], _READ[0] - 1)
            found = _by_engine(call, texts)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {first_line(error)}"
    size = max(float(logits.abs().max()) for logits in expected)
    off, effect = apart(zip(found, expected, strict=True)), apart([(without_first, expected[0])])
    if agree(model, off, size, effect):
        return None
    return f"logits differ by {off / max(size, 1e-30):.2g} of the largest from those of its plain pass"


def _texts(vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, vocabulary, (read + _FOLLOWING,), generator=generator).tolist() for read in _READ]


def _alone(call: Caller, text: Sequence[int], end: int) -> Tensor:
    """Logits of the last of a text's first tokens: one row, no cache, no padding."""
    ids = torch.tensor([text[:end]], device=call.model.device)
    return call(ids, torch.ones_like(ids), torch.arange(end, device=ids.device)[None], None)[0]


def _by_engine(call: Caller, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """The same, text by text, in a batch and a token at a time."""
    first, layers = call.read([text[:read] for text, read in zip(texts, _READ, strict=True)], 0)
    batch = DecodeBatch(call, windows_of(call.model), contextlib.nullcontext)
    batch.resize(len(texts), max(_READ) + _FOLLOWING)
    batch.cache.enter(range(len(texts)), layers, [max(_READ) - read for read in _READ], [0] * len(texts))
    found = [first]
    for step in range(_FOLLOWING):
        newest = [text[read + step] for text, read in zip(texts, _READ, strict=True)]
        batch.write(newest, [read + step for read in _READ])
        found.append(batch.run(len(texts), max(_READ) + step + 1))
    return [logits[row] for row in range(len(texts)) for logits in found]


@contextlib.contextmanager
def _bare(model: PreTrainedModel) -> Iterator[None]:
    attachment = Attachment.of(model)
    if attachment is None:
        yield
        return
    with attachment.state.routed(Route.of(None)):
        yield


def why_not_delta(attachment: Attachment, name: str) -> str | None:
    """Why the engine's cache does not go with a delta; None where it does."""
    if not any(isinstance(module, AttentionModule) for _, module in attachment.deltas[name].sites):
        return None
    paths = [attention.path for attention in attachment.family.attentions]
    numbers = [getattr(attachment.model.get_submodule(path), "layer_idx", None) for path in paths]
    if None in numbers or len(set(numbers)) < len(numbers):
        return "which layer of the cache each prefix belongs to cannot be told"
    return None


def family_of(model: PreTrainedModel) -> Family:
    """How a model is built."""
    attachment = Attachment.of(model)
    return describe(model) if attachment is None else attachment.family


def cache_bytes(model: PreTrainedModel) -> int:
    """Memory of one token's keys and values in all layers."""
    numbers = sum(found.kv_heads * (found.key_dim + found.value_dim) for found in family_of(model).attentions)
    return numbers * model.dtype.itemsize


def text_limit(model: PreTrainedModel) -> float:
    """The most tokens that the model takes, virtual ones included; infinite where nothing limits it."""
    limit = family_of(model).position_table or getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else math.inf


def virtual_tokens(model: PreTrainedModel, names: Iterable[str | None]) -> int:
    """The most that one of these deltas, attached, has."""
    attachment = Attachment.of(model)
    return 0 if attachment is None else max(map(attachment.state.count_of, names), default=0)
