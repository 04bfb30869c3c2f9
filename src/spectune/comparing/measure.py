"""What is measured of a trained delta beyond its losses: forgetting, decoding speed, memory, time to swap."""

import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectune import embedded
from spectune.compute.memory import PeakMemory
from spectune.deltas import Delta, attached, base_name, detach, merge
from spectune.errors import ConfigError, DataError
from spectune.evaluation import KeptLogits, passage_kls, sample_passages
from spectune.files.regular import read_bounded
from spectune.inference import context_length, decode_tokens_per_second, wait_for
from spectune.storage import TINY, load_delta
from spectune.training.machine import Watch

PASSAGES = 64
#: of the user's own text: each passage is tokenized, and run through every model
MAX_RETAIN_BYTES = 64 * 2**20
PASSAGE_TOKENS = 128
#: what the rounds of measuring speed take about
SECONDS = 1.0
#: of a row in one measurement of speed at batch 1, half as many in larger batches; and the least, on slow bases
DECODE_TOKENS, LEAST_TOKENS = 24, 4
#: of measuring speed, and the least, on slow bases
ROUNDS, LEAST_ROUNDS = 5, 3
#: tokens a second by size of batch, of the tuned model, the merged one (none where there is none) and the bare base
_Round = tuple[dict[int, float], dict[int, float], dict[int, float]]


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
        raw = read_bounded(path, MAX_RETAIN_BYTES, links=True)
        if raw is None:
            raise DataError(f"--retain {path}: no such file; expected plain text, passages parted by blank lines")
        try:
            content = raw.decode("utf-8")
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


def forgetting(model: PreTrainedModel, passages: list[list[int]], kept: KeptLogits | None = None) -> dict[str, Any]:
    """Fields of a `RunResult`: what the attached delta moved of its base, by passage, and the mean over tokens. `kept`:
    the base's part, for many deltas."""
    sums = passage_kls(model, passages, kept=kept)
    return {"forgetting_kl_nats_per_token": math.fsum(sums) / sum(map(len, passages)), "forgetting_by_passage": sums}


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, delta: Delta, folder: Path,
    batches: Sequence[int] = (1, 16), *, watch: Watch | None = None, clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:  # fmt: skip
    """Fields of a `RunResult` for a trained delta that is attached and lies in `folder`. Detaches it.

    `swap_seconds`; speeds, of batch 1 as fields of their own and of all `batches` in `decode`: `{"16": {"tuned",
    "merged", "base" (tokens a second over all rows, medians over rounds), "overhead", "overhead_range",
    "overhead_merged", "overhead_merged_range" (of the bare base's time, the median, the least and the most)}}`, None
    where there is no merged model; of `peak_memory_bytes` the phases `load` (the delta from its folder onto the base)
    and `generate` (decoding in the largest of the batches), which `RunResult.with_measured` puts beside those of
    training; and of `machine_load` what else the machine did meanwhile.

    Speeds are taken in rounds: tuned, merged, bare base, tuned again ... A machine changes its pace within seconds, so
    overhead is a ratio of neighbours, and how it differs between rounds is its noise. However slow the base is, this
    takes about `SECONDS`: fewer tokens are decoded, in fewer rounds.

    Args:
        watch: on the machine; by default a new one.
        clock: seconds from some point on.
    """
    name = delta.name
    detach(model, name)
    found: dict[str, Any] = {}
    # before there is a merged copy, which is not the method's
    found["peak_memory_bytes"] = _peaks(model, tokenizer, folder, name, max(batches))
    merged = _merged(model, attached(model)[name])
    detach(model, name)
    tokens = _tokens(_warmed_up(model, tokenizer, batches), _warmed_up(merged or model, tokenizer, batches))
    watch, rounds, swaps, begun = watch or Watch(model.device.type), list[_Round](), list[float](), clock()
    while len(rounds) < (ROUNDS if clock() - begun < SECONDS else min(ROUNDS, LEAST_ROUNDS)):
        begin = clock()
        load_delta(model, folder, name)
        wait_for(model.device)
        swaps.append(clock() - begin)
        tuned = _rates(model, tokenizer, batches, tokens)
        detach(model, name)
        whole = {} if merged is None else _rates(merged, tokenizer, batches, tokens)
        rounds.append((tuned, whole, _rates(model, tokenizer, batches, tokens)))
    found["machine_load"] = {"decode": watch.seen()}
    del merged
    gc.collect()  # a model's modules hold each other: it would lie there while the next method's memory is measured
    by_kind = list(zip(*rounds, strict=True))
    rates = {batch: _Rates(*([rate[batch] for rate in kind if rate] for kind in by_kind)) for batch in batches}
    found["decode"] = {str(batch): kept.to_dict() for batch, kept in rates.items()}
    found["swap_seconds"] = statistics.median(swaps)
    return found | (_of_batch_1(rates[1]) if 1 in rates else {})


def measure_loading(model: PreTrainedModel, delta: Delta, folder: Path) -> dict[str, Any]:
    """The fields of `measure` that a delta with a head has, which decodes nothing: `swap_seconds`, and of
    `peak_memory_bytes` the phase `load`. Detaches it."""
    name, seconds = delta.name, list[float]()
    detach(model, name)
    with PeakMemory(model.device, baseline=model.parameters()) as peak:
        load_delta(model, folder, name)
    for _ in range(ROUNDS):
        detach(model, name)
        begin = time.perf_counter()
        load_delta(model, folder, name)
        wait_for(model.device)
        seconds.append(time.perf_counter() - begin)
    detach(model, name)
    peaks = {f"load_{kind}": size for kind, size in peak.result.items()}
    return {"swap_seconds": statistics.median(seconds), "peak_memory_bytes": peaks}


def _warmed_up(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batches: Sequence[int]) -> dict[int, float]:
    """Seconds of a step by size of batch, of decoding that does not count: a process does some things once."""
    return {
        batch: batch / decode_tokens_per_second(model, tokenizer, batch=batch, new_tokens=2, repeats=1, warm_up=0)
        for batch in batches
    }


def _tokens(base: Mapping[int, float], merged: Mapping[int, float]) -> int:
    """How many tokens a row has in each measurement, so that the fewest rounds take `SECONDS`. `base`, `merged`: the
    seconds of a step by size of batch; the tuned model's are taken to be the base's."""
    steps = {batch: 2 * base[batch] + merged[batch] for batch in base}
    a_token = sum(seconds * (1 if batch == 1 else 0.5) for batch, seconds in steps.items())
    return max(LEAST_TOKENS, min(DECODE_TOKENS, int(SECONDS / LEAST_ROUNDS / a_token)))


def _rates(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batches: Sequence[int], tokens: int
) -> dict[int, float]:
    """Decoded tokens a second of the model as it is, once for each size of batch. A batch gives a steadier figure, so
    fewer steps do."""
    steps = {batch: tokens if batch == 1 else max(LEAST_TOKENS, tokens // 2) for batch in batches}
    return {
        batch: decode_tokens_per_second(model, tokenizer, batch=batch, new_tokens=new, repeats=1, warm_up=0)
        for batch, new in steps.items()
    }


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
            found[f"overhead{suffix}"], found[f"overhead{suffix}_range"] = _median(overheads), _ends(overheads)
        return found


def _of_batch_1(rates: _Rates) -> dict[str, Any]:
    """The fields that a result has for single rows."""
    of_all, found = rates.to_dict(), dict[str, Any]()
    for suffix, kind in (("", "tuned"), ("_merged", "merged"), ("_base", "base")):
        ends = _ends(getattr(rates, kind))
        found[f"decode_tokens_per_second{suffix}"] = of_all[kind]
        found[f"decode_tokens_per_second{suffix}_spread"] = (ends[1] - ends[0]) / 2 if ends else None
    for suffix in ("", "_merged"):
        ends = of_all[f"overhead{suffix}_range"]
        found[f"inference_overhead{suffix}_range"] = tuple(ends) if ends else None
    return found


def _peaks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, name: str, batch: int
) -> dict[str, int]:
    """Peak memory of loading the delta onto the base and of decoding with it, for a few tokens: the prefill of all
    rows and the cache are there by then. Leaves the delta on."""
    with PeakMemory(model.device, baseline=model.parameters()) as load_peak:
        load_delta(model, folder, name)
    with PeakMemory(model.device, baseline=model.parameters()) as generate_peak:
        decode_tokens_per_second(model, tokenizer, batch=batch, new_tokens=2, repeats=1, warm_up=0)
    phases = {"load": load_peak.result, "generate": generate_peak.result}
    return {f"{phase}_{kind}": size for phase, peak in phases.items() for kind, size in peak.items()}


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _ends(values: list[float]) -> list[float] | None:
    """The least and the most: what was seen is in there, a round in which the machine did something else too."""
    return [min(values), max(values)] if values else None


def _merged(model: PreTrainedModel, delta: Delta) -> PreTrainedModel | None:
    """The merged model; None where the method or this base cannot merge."""
    if not delta.method.can_merge:
        return None
    try:
        # speed does not depend on how the weights were rounded, so low precision is not refused here
        return merge(model, delta.name, check=False)
    except ConfigError:
        return None
