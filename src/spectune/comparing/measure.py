"""What is measured of a trained delta beyond its losses: forgetting, decoding speed, time to swap."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectune import embedded
from spectune.deltas import Delta, detach, merge
from spectune.errors import ConfigError, DataError
from spectune.evaluation import forgetting_kl, sample_passages
from spectune.inference import context_length, decode_tokens_per_second
from spectune.storage import TINY, base_name, load_delta

PASSAGES = 64
PASSAGE_TOKENS = 128
DECODE_TOKENS = 48
#: of measuring speed; the first ones do not count
WARM_UPS, ROUNDS = 1, 5


def retained_passages(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, retain: str | Path | None, seed: int
) -> list[list[int]]:
    """Token ids of the text on which forgetting is measured.

    The user's own file (blank lines part its passages), the ones that ship with spectune-tiny, or 64 passages of 128
    tokens sampled from the base at temperature 1.

    Raises:
        DataError: the user's file is missing or empty.
    """
    if retain is not None:
        path = Path(retain)
        if not path.is_file():
            raise DataError(f"--retain {path}: no such file; expected plain text, passages parted by blank lines")
        try:
            content = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"--retain {path} is not UTF-8 text: {error}") from error
        texts = [text.strip() for text in content.split("\n\n") if text.strip()]
        longest = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 1024) // 2
        passages = [list(tokenizer(text)["input_ids"])[:longest] for text in texts]
        passages = [ids for ids in passages if len(ids) > 1]
        if not passages:
            raise DataError(f"--retain {path} holds no text")
        return passages
    if base_name(model) == TINY:
        lines = embedded.RETAINED.read_text(encoding="utf-8").splitlines()
        return [list(json.loads(line)["ids"]) for line in lines]
    length = min(PASSAGE_TOKENS, context_length(model) or PASSAGE_TOKENS)
    return sample_passages(model, tokenizer, count=PASSAGES, length=length, seed=seed)


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    delta: Delta,
    folder: Path,
    passages: list[list[int]],
) -> dict[str, Any]:
    """Fields of a `RunResult` for a trained delta that is attached and lies in `folder`. Detaches it.

    Speeds are taken in rounds: tuned, merged, bare base, tuned again ... A machine changes its pace within seconds, so
    overhead is a ratio of neighbours, and how it differs between rounds is its noise.
    """
    found: dict[str, Any] = {"forgetting_kl_nats_per_token": forgetting_kl(model, passages)}
    name, merged = delta.name, _merged(model, delta)
    detach(model, name)
    rates: dict[str, list[float]] = {"": [], "_merged": [], "_base": []}
    swaps = []
    for number in range(WARM_UPS + ROUNDS):
        begin = time.perf_counter()
        load_delta(model, folder, name)
        swap = time.perf_counter() - begin
        tuned = _rate(model, tokenizer)
        detach(model, name)
        whole = None if merged is None else _rate(merged, tokenizer)
        base = _rate(model, tokenizer)
        if number >= WARM_UPS:
            swaps.append(swap)
            rates[""].append(tuned)
            rates["_base"].append(base)
            rates["_merged"] += [] if whole is None else [whole]
    for kind, values in rates.items():
        found[f"decode_tokens_per_second{kind}"] = statistics.median(values) if values else None
        found[f"decode_tokens_per_second{kind}_spread"] = None
        if values:
            low, high = _middle(values)
            found[f"decode_tokens_per_second{kind}_spread"] = (high - low) / 2
    found["inference_overhead_range"] = _overhead_range(rates["_base"], rates[""])
    found["inference_overhead_merged_range"] = _overhead_range(rates["_base"], rates["_merged"])
    found["swap_seconds"] = statistics.median(swaps)
    return found


def _rate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Decoded tokens a second of the model as it is, at batch 1, once."""
    return decode_tokens_per_second(model, tokenizer, batch=1, new_tokens=DECODE_TOKENS, repeats=1, warm_up=0)


def _overhead_range(base: list[float], rates: list[float]) -> tuple[float, float] | None:
    """Where the middle half of the rounds' overheads lies, as shares of the bare base's time."""
    return _middle([bare / rate - 1 for bare, rate in zip(base, rates, strict=True)]) if rates else None


def _middle(values: list[float]) -> tuple[float, float]:
    """The first and the third quartile: a round in which the machine did something else does not count."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _merged(model: PreTrainedModel, delta: Delta) -> PreTrainedModel | None:
    """The merged model; None where the method or this base cannot merge."""
    if not delta.method.can_merge:
        return None
    try:
        # speed does not depend on how the weights were rounded, so low precision is not refused here
        return merge(model, delta.name, check=False)
    except ConfigError:
        return None
