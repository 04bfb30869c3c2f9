"""What is measured of a trained delta beyond its losses: forgetting, decoding speed, memory, time to swap."""

import gc
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectune import embedded
from spectune.compute.memory import PeakMemory
from spectune.deltas import Delta, base_name, detach, merge
from spectune.errors import ConfigError, DataError
from spectune.evaluation import passage_kls, sample_passages
from spectune.inference import context_length, decode_tokens_per_second, wait_for
from spectune.storage import TINY, load_delta

PASSAGES = 64
PASSAGE_TOKENS = 128
#: of a row in one measurement of speed at batch 1; half as many in larger batches
DECODE_TOKENS = 24
#: of measuring speed; the first ones do not count
WARM_UPS, ROUNDS = 1, 5


def retained_passages(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, retain: str | Path | None, seed: int, *,
    virtual_tokens: int = 0,
) -> list[list[int]]:  # fmt: skip
    """Token ids of the text on which forgetting is measured.

    The user's own file (blank lines part its passages), the ones that ship with spectune-tiny, or 64 passages of 128
    tokens sampled from the base at temperature 1. On a base of few positions they are shorter, so that there is room
    for the `virtual_tokens` of every method.

    Raises:
        DataError: the user's file is missing or empty.
    """
    context = context_length(model)
    room = None if context is None else context - virtual_tokens
    if retain is not None:
        path = Path(retain)
        if not path.is_file():
            raise DataError(f"--retain {path}: no such file; expected plain text, passages parted by blank lines")
        try:
            content = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"--retain {path} is not UTF-8 text: {error}") from error
        texts = [text.strip() for text in content.split("\n\n") if text.strip()]
        longest = min((context or 1024) // 2, room or 1024)
        passages = [list(tokenizer(text)["input_ids"])[:longest] for text in texts]
        if not (passages := [ids for ids in passages if len(ids) > 1]):
            raise DataError(f"--retain {path} holds no text")
        return passages
    if base_name(model) == TINY:
        lines = embedded.RETAINED.read_text(encoding="utf-8").splitlines()
        return [list(json.loads(line)["ids"]) for line in lines]
    length = min(PASSAGE_TOKENS, room or PASSAGE_TOKENS)
    return sample_passages(model, tokenizer, count=PASSAGES, length=length, seed=seed)


def forgetting(model: PreTrainedModel, passages: list[list[int]]) -> dict[str, Any]:
    """Fields of a `RunResult`: what the attached delta moved of its base, by passage, and the mean over tokens."""
    sums = passage_kls(model, passages)
    return {"forgetting_kl_nats_per_token": math.fsum(sums) / sum(map(len, passages)), "forgetting_by_passage": sums}


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, delta: Delta, folder: Path,
    passages: list[list[int]], batches: Sequence[int] = (1, 16),
) -> dict[str, Any]:  # fmt: skip
    """Fields of a `RunResult` for a trained delta that is attached and lies in `folder`. Detaches it.

    `forgetting_by_passage` and their mean over tokens; `swap_seconds`; speeds, of batch 1 as fields of their own and of
    all `batches` in `decode`: `{"16": {"tuned", "merged", "base" (tokens a second over all rows, medians over rounds),
    "overhead", "overhead_range", "overhead_merged", "overhead_merged_range" (of the bare base's time, median and
    quartiles)}}`, None where there is no merged model; and of `peak_memory_bytes` the phases `load` (the delta from
    its folder onto the base) and `generate` (decoding in the largest of the batches), which `RunResult.with_measured`
    puts beside those of training.

    Speeds are taken in rounds: tuned, merged, bare base, tuned again ... A machine changes its pace within seconds, so
    overhead is a ratio of neighbours, and how it differs between rounds is its noise.
    """
    found = forgetting(model, passages)
    name = delta.name
    detach(model, name)
    # before there is a merged copy, which is not the method's
    found["peak_memory_bytes"] = _peaks(model, tokenizer, folder, name, max(batches))
    merged = _merged(model, load_delta(model, folder, name))
    detach(model, name)
    rounds, swaps = [], []
    for number in range(WARM_UPS + ROUNDS):
        begin = time.perf_counter()
        load_delta(model, folder, name)
        wait_for(model.device)
        swap = time.perf_counter() - begin
        counts = number >= WARM_UPS
        tuned = {batch: _rate(model, tokenizer, batch, counts) for batch in batches}
        detach(model, name)
        whole = {} if merged is None else {batch: _rate(merged, tokenizer, batch, counts) for batch in batches}
        base = {batch: _rate(model, tokenizer, batch, counts) for batch in batches}
        if counts:
            swaps.append(swap)
            rounds.append((tuned, whole, base))
    del merged
    gc.collect()  # a model's modules hold each other: it would lie there while the next method's memory is measured
    by_kind = list(zip(*rounds, strict=True))
    rates = {batch: _Rates(*([rate[batch] for rate in kind if rate] for kind in by_kind)) for batch in batches}
    found["decode"] = {str(batch): kept.to_dict() for batch, kept in rates.items()}
    found["swap_seconds"] = statistics.median(swaps)
    return found | (_of_batch_1(rates[1]) if 1 in rates else {})


@dataclass
class _Rates:
    """Decoded tokens a second, round by round."""

    tuned: list[float]
    merged: list[float]
    base: list[float]

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {kind: _median(getattr(self, kind)) for kind in ("tuned", "merged", "base")}
        for suffix, rates in (("", self.tuned), ("_merged", self.merged)):
            # what each round took longer than the bare base in it, as a share of the latter's time
            overheads = [bare / rate - 1 for bare, rate in zip(self.base, rates, strict=True)] if rates else []
            found[f"overhead{suffix}"], found[f"overhead{suffix}_range"] = _median(overheads), _middle(overheads)
        return found


def _of_batch_1(rates: _Rates) -> dict[str, Any]:
    """The fields that a result has for single rows."""
    of_all, found = rates.to_dict(), dict[str, Any]()
    for suffix, kind in (("", "tuned"), ("_merged", "merged"), ("_base", "base")):
        quartiles = _middle(getattr(rates, kind))
        found[f"decode_tokens_per_second{suffix}"] = of_all[kind]
        found[f"decode_tokens_per_second{suffix}_spread"] = (quartiles[1] - quartiles[0]) / 2 if quartiles else None
    for suffix in ("", "_merged"):
        quartiles = of_all[f"overhead{suffix}_range"]
        found[f"inference_overhead{suffix}_range"] = tuple(quartiles) if quartiles else None
    return found


def _peaks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, name: str, batch: int
) -> dict[str, int]:
    """Peak memory of loading the delta onto the base and of decoding with it, for a few tokens: the prefill of all
    rows and the cache are there by then. Leaves the bare base."""
    with PeakMemory(model.device, baseline=model.parameters()) as load_peak:
        load_delta(model, folder, name)
    with PeakMemory(model.device, baseline=model.parameters()) as generate_peak:
        decode_tokens_per_second(model, tokenizer, batch=batch, new_tokens=2, repeats=1, warm_up=0)
    detach(model, name)
    phases = {"load": load_peak.result, "generate": generate_peak.result}
    return {f"{phase}_{kind}": size for phase, peak in phases.items() for kind, size in peak.items()}


def _rate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: int, counts: bool) -> float:
    """Decoded tokens a second of the model as it is, once; where it does not count, of the fewest tokens there may be.
    A batch gives a steadier figure, so fewer steps do."""
    steps = DECODE_TOKENS if batch == 1 else DECODE_TOKENS // 2
    steps = max(2, steps) if counts else 2
    return decode_tokens_per_second(model, tokenizer, batch=batch, new_tokens=steps, repeats=1, warm_up=0)


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _middle(values: list[float]) -> list[float] | None:
    """The first and the third quartile: a round in which the machine did something else does not count."""
    if len(values) < 2:
        return 2 * values or None
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def _merged(model: PreTrainedModel, delta: Delta) -> PreTrainedModel | None:
    """The merged model; None where the method or this base cannot merge."""
    if not delta.method.can_merge:
        return None
    try:
        # speed does not depend on how the weights were rounded, so low precision is not refused here
        return merge(model, delta.name, check=False)
    except ConfigError:
        return None
