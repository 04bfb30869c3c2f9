"""What is measured of a trained delta beyond its losses: forgetting, decoding speed, time to swap."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectune import embedded
from spectune.deltas import Delta, detach, merge
from spectune.errors import ConfigError, DataError
from spectune.evaluation import forgetting_kl, sample_passages
from spectune.inference import context_length, decode_tokens_per_second
from spectune.storage import TINY, load_delta

PASSAGES = 64
PASSAGE_TOKENS = 128
DECODE_TOKENS = 48


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
    if is_tiny(model):
        lines = embedded.RETAINED.read_text(encoding="utf-8").splitlines()
        return [list(json.loads(line)["ids"]) for line in lines]
    length = min(PASSAGE_TOKENS, context_length(model) or PASSAGE_TOKENS)
    return sample_passages(model, tokenizer, count=PASSAGES, length=length, seed=seed)


def is_tiny(model: PreTrainedModel) -> bool:
    """Whether a model was loaded as the embedded base, by its name or by its folder."""
    return str(model.config._name_or_path) in (TINY, str(embedded.MODEL_FOLDER))


def decode_rate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Decoded tokens a second of the model as it is, at batch 1."""
    return decode_tokens_per_second(model, tokenizer, batch=1, new_tokens=DECODE_TOKENS, repeats=5)


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    delta: Delta,
    folder: Path,
    passages: list[list[int]],
) -> dict[str, Any]:
    """Fields of a `RunResult` for a trained delta that is attached and lies in `folder`. Detaches it."""
    found: dict[str, Any] = {
        "forgetting_kl_nats_per_token": forgetting_kl(model, passages),
        "decode_tokens_per_second": decode_rate(model, tokenizer),
        "decode_tokens_per_second_merged": _merged_rate(model, tokenizer, delta),
    }
    name = delta.name
    detach(model, name)
    # right after the others, as machines change their pace within minutes: overhead is a ratio of neighbours
    found["decode_tokens_per_second_base"] = decode_rate(model, tokenizer)
    begin = time.perf_counter()
    load_delta(model, folder, name)
    found["swap_seconds"] = time.perf_counter() - begin
    detach(model, name)
    return found


def _merged_rate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, delta: Delta) -> float | None:
    """Decoding speed after merging; None where the method or this base cannot merge."""
    if not delta.method.can_merge:
        return None
    try:
        # speed does not depend on how the weights were rounded, so low precision is not refused here
        merged = merge(model, delta.name, check=False)
    except ConfigError:
        return None
    return decode_rate(merged, tokenizer)
