"""The verdict of a comparison: which methods differ, as a partial order with ties, in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spectune.comparing.judging.evidence import Evidence, find_evidence
from spectune.comparing.judging.order import groups, reduction, transitive
from spectune.comparing.judging.statistics import CONFIDENCE, ArmEstimate, PairEstimate, estimate
from spectune.comparing.judging.words import listed, named, number_word, share

FULL = "full"
NO_DIFFERENCE = "no difference"


def verdict(content: Mapping[str, Any], folder: str | Path) -> dict[str, Any]:
    """What the runs of a comparison say about the order of its arms.

    Args:
        content: a `comparison.json`, old or partial ones too.
        folder: the comparison's; runs' `rows_file` and `base/passages.json` are read under it.

    Returns:
        `measure, rows, units, seeds, covers_training_noise, confidence, correction, base, arms, pairs, groups, order,
        versus_full, sentences` on the judged loss (nats per target token), and the same on each metric (`metrics`)
        and on `forgetting` (nats per token), each corrected for its own pairs. `units` are the rows that the bootstrap
        draws: those with the same prompt are one. `base` is the bare base's loss on the same rows. Intervals are None
        where runs left no loss for each row. The first sentence is the headline. Never raises on partial content.
    """
    runs = [run for run in content.get("runs") or [] if isinstance(run, dict) and run.get("name")]
    found = find_evidence(content, Path(folder))
    speech = _Speech(_labels(runs), _methods(runs))
    if found.loss is None:
        answer = _without_rows(runs, speech)
    else:
        answer = _judge(found.loss, "judged_loss", speech, what="of its loss")
    answer["base"] = found.base_loss
    answer["sentences"] += found.problems + _failures(content, runs)
    ways = (content.get("data") or {}).get("higher_is_better") or {}
    answer["metrics"] = {
        name: _judge(rows, name, speech, higher_is_better=ways.get(name, True)) for name, rows in found.metrics.items()
    }
    answer["forgetting"] = (
        None if found.forgetting is None else _judge(found.forgetting, "forgetting", speech, what="of its forgetting")
    )
    return answer


@dataclass(frozen=True)
class _Speech:
    """How arms are called in sentences, and which is full fine-tuning."""

    labels: Mapping[str, str]
    methods: Mapping[str, str]

    def names(self, arms: Iterable[str]) -> str:
        return listed([self.labels[arm] for arm in arms])

    def full(self, arms: Iterable[str]) -> str | None:
        return next((arm for arm in arms if self.methods.get(arm) == FULL), None)


def _judge(
    evidence: Evidence, measure: str, speech: _Speech, what: str | None = None, *, higher_is_better: bool = True
) -> dict[str, Any]:
    """One measure's verdict. `what` names the whole that shares are of, for losses, where less is better."""
    lower_is_better = what is not None or not higher_is_better
    sums = {arm: s for arm, s in evidence.sums.items() if np.isfinite(evidence.score(s.sum(axis=1))).all()}
    if evidence.units < 2 or not sums:
        return _bare(measure, {}, f"No verdict on {measure}: it takes two rows at least.", evidence.rows)
    arms, pairs = estimate(sums, evidence.score, relative_noise=what is not None)
    sign = 1 if lower_is_better else -1
    arms = sorted(arms, key=lambda arm: sign * arm.mean)  # stable: of equal ones the first stays first
    names = [arm.name for arm in arms]
    place = {name: index for index, name in enumerate(names)}
    pairs = sorted((_turned(pair, place) for pair in pairs), key=lambda pair: (place[pair.a], place[pair.b]))
    adjusted = transitive({(pair.a, pair.b): pair.p_adjusted for pair in pairs}, names)
    better = {pair for pair, p in adjusted.items() if p <= 1 - CONFIDENCE}
    means = {arm.name: arm.mean for arm in arms}
    best = [name for name in names if not any(worse == name for _, worse in better)]
    full = speech.full(names)
    seeds = [arm.seeds for arm in arms]
    answer: dict[str, Any] = {
        "measure": measure,
        "higher_is_better": not lower_is_better,
        "rows": evidence.rows,
        "units": evidence.units,
        "seeds": max(seeds),
        "covers_training_noise": min(seeds) > 1,
        "confidence": CONFIDENCE,
        "correction": "holm",
        "arms": [_arm(arm, speech.labels[arm.name], arm.name in best) for arm in arms],
        "pairs": [_pair(pair, adjusted[pair.a, pair.b], (pair.a, pair.b) in better, means) for pair in pairs],
        "groups": groups(names, {frozenset(pair) for pair in better}),
        "order": sorted((list(pair) for pair in reduction(better)), key=lambda pair: (place[pair[0]], place[pair[1]])),
        "versus_full": {} if full is None else {n: _versus(n, full, better) for n in names if n != full},
    }
    answer["sentences"] = _sentences(answer, speech, best, full, what)
    return answer


def _turned(pair: PairEstimate, place: Mapping[str, int]) -> PairEstimate:
    """The pair with the better estimate first."""
    if place[pair.a] < place[pair.b]:
        return pair
    effect = None if pair.effect_size is None else -pair.effect_size
    return PairEstimate(
        pair.b, pair.a, -pair.difference, -pair.high, -pair.low, pair.p, pair.p_adjusted, effect
    )  # fmt: skip


def _arm(arm: ArmEstimate, label: str, best: bool) -> dict[str, Any]:
    return {
        "name": arm.name,
        "label": label,
        "seeds": arm.seeds,
        "mean": arm.mean,
        "low": arm.low,
        "high": arm.high,
        "seed_sd": arm.seed_sd,
        "best": best,
    }


def _pair(pair: PairEstimate, p_adjusted: float, differs: bool, means: Mapping[str, float]) -> dict[str, Any]:
    return {
        "a": pair.a,
        "b": pair.b,
        "difference": pair.difference,
        "low": pair.low,
        "high": pair.high,
        "relative": pair.difference / abs(means[pair.a]) if means[pair.a] else None,
        "p": pair.p,
        "p_adjusted": p_adjusted,
        "differs": differs,
        "effect_size": pair.effect_size,
    }


def _versus(name: str, full: str, better: set[tuple[str, str]]) -> str:
    if (name, full) in better:
        return "better"
    return "worse" if (full, name) in better else NO_DIFFERENCE


def _without_rows(runs: Sequence[Mapping[str, Any]], speech: _Speech) -> dict[str, Any]:
    """Means alone, where no run left a loss for each row."""
    losses: dict[str, list[float]] = {}
    for run in runs:
        loss = run.get("judged_loss") if run.get("judged_loss") is not None else run.get("valid_loss")
        if isinstance(loss, int | float) and math.isfinite(loss):
            losses.setdefault(str(run["name"]), []).append(float(loss))
    if not runs:
        why = "No verdict: no run ended."
    elif not losses:
        why = "No verdict: no run has a finite loss."
    elif any(run.get("rows_file") for run in runs):
        why = "No verdict: what the runs saved of each row cannot be used, so noise cannot be told from differences."
    else:
        why = (
            "No verdict: these runs were saved without a loss for each row, so noise cannot be told from differences. "
            "A new comparison saves them."
        )
    return _bare(
        "judged_loss", {arm: losses[arm] for arm in sorted(losses, key=lambda a: _mean(losses[a]))}, why, None, speech
    )


def _bare(
    measure: str, values: Mapping[str, Sequence[float]], why: str, rows: int | None, speech: _Speech | None = None
) -> dict[str, Any]:
    """A verdict without intervals, and the sentence that says why."""
    return {
        "measure": measure,
        "rows": rows,
        "units": rows,
        "seeds": max(map(len, values.values()), default=0),
        "covers_training_noise": False,
        "confidence": CONFIDENCE,
        "correction": "holm",
        "arms": [
            {
                "name": arm,
                "label": arm if speech is None else speech.labels[arm],
                "seeds": len(found),
                "mean": _mean(found),
                "low": None,
                "high": None,
                "seed_sd": statistics.stdev(found) if len(found) > 1 else None,
                "best": False,
            }
            for arm, found in values.items()
        ],
        "pairs": [],
        "groups": [],
        "order": [],
        "versus_full": {},
        "sentences": [why],
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


# ---------------------------------------------------------------------------------------------------------- in words


def _sentences(
    answer: Mapping[str, Any], speech: _Speech, best: Sequence[str], full: str | None, what: str | None
) -> list[str]:
    names = [arm["name"] for arm in answer["arms"]]
    if len(names) == 1:
        return [f"Only {speech.names(names)} was judged: there is nothing to compare it with.", _covered(answer)]
    means = {arm["name"]: arm["mean"] for arm in answer["arms"]}
    differing = [pair for pair in answer["pairs"] if pair["differs"]]
    sentences = []
    if not differing:
        both = f"{speech.names(names)}" if len(names) == 2 else f"any of the {number_word(len(names))} methods"
        sentences.append(f"No difference between {both} was found.")
    elif full is not None:
        sentences.append(_against_full(answer, speech, names, full, means, what))
    else:
        sentences.append(_best_first(speech, names, best, means, what))
    sentences += _rest_of_order(answer, speech, full if full is not None else (best[0] if len(best) == 1 else None))
    sentences += _left_open(answer, speech, what)
    sentences.append(_covered(answer))
    sentences += _fewer_seeds(answer, speech)
    return sentences


def _against_full(
    answer: Mapping[str, Any],
    speech: _Speech,
    names: Sequence[str],
    full: str,
    means: Mapping[str, float],
    what: str | None,
) -> str:
    """`LoRA and the adapter match full fine-tuning within noise; BitFit is worse (by 12% of its loss).`"""
    kinds = {
        kind: [n for n in names if answer["versus_full"].get(n) == kind] for kind in ("better", NO_DIFFERENCE, "worse")
    }
    parts: list[str] = []
    for kind, arms in kinds.items():
        if not arms:
            continue
        subject, other = speech.names(arms), speech.labels[full] if not parts else ""
        one = len(arms) == 1
        if kind == NO_DIFFERENCE:
            words = f"{'matches' if one else 'match'} {other or 'it'} within noise"
        else:
            than = f" than {other}" if other else ""
            words = f"{'is' if one else 'are'} {kind}{than} (by {_range(arms, full, means, what)})"
        parts.append(f"{subject} {words}")
    return _sentence("; ".join(parts))


def _best_first(
    speech: _Speech,
    names: Sequence[str],
    best: Sequence[str],
    means: Mapping[str, float],
    what: str | None,
) -> str:
    rest = [name for name in names if name not in best]
    are = "is" if len(rest) == 1 else "are"
    if len(best) == 1:
        by = _range(rest, best[0], means, what)
        return _sentence(f"{speech.names(best)} is best; {speech.names(rest)} {are} worse (by {by})")
    return _sentence(
        f"{speech.names(best)} are best, and no difference between them was found; "
        f"{speech.names(rest)} {are} worse than at least one of them"
    )


def _range(arms: Sequence[str], other: str, means: Mapping[str, float], what: str | None) -> str:
    """How far arms lie from another one: `4% to 12% of its loss`, or in a metric's own unit."""
    sizes = sorted(abs(means[arm] - means[other]) for arm in arms)
    as_share = what is not None and means[other] != 0
    texts = list(dict.fromkeys(share(size / abs(means[other])) if as_share else f"{size:.3g}" for size in sizes))
    words = texts[0] if len(texts) == 1 else f"{texts[0]} to {texts[-1]}"
    return f"{words} {what}" if as_share else words


def _rest_of_order(answer: Mapping[str, Any], speech: _Speech, told: str | None) -> list[str]:
    """The pairs of the order that the headline has not told; arms that are better than the same ones stand together."""
    worse: dict[str, list[str]] = {}
    for a, b in answer["order"]:
        if told not in (a, b):
            worse.setdefault(a, []).append(b)
    better: dict[tuple[str, ...], list[str]] = {}
    for a, below in worse.items():
        better.setdefault(tuple(below), []).append(a)
    parts = [
        f"{speech.names(above)} {'is' if len(above) == 1 else 'are'} better than {speech.names(below)}"
        for below, above in better.items()
    ]
    return [_sentence("; ".join(parts))] if parts else []


def _left_open(answer: Mapping[str, Any], speech: _Speech, what: str | None) -> list[str]:
    """The largest difference that an interval leaves open: none found is not none there."""
    means = {arm["name"]: arm["mean"] for arm in answer["arms"]}
    open_pairs = [pair for pair in answer["pairs"] if not pair["differs"]]
    if not open_pairs:
        return []

    def reach(pair: Mapping[str, Any]) -> float:
        size: float = max(abs(pair["low"]), abs(pair["high"]))
        return size / abs(means[pair["a"]]) if what is not None and means[pair["a"]] else size

    widest = max(open_pairs, key=reach)
    amount = (
        f"{share(reach(widest))} of the {'loss' if what == 'of its loss' else 'forgetting'}"
        if what
        else f"{reach(widest):.3g}"
    )
    between = (
        "" if len(answer["arms"]) == 2 else f" ({speech.labels[widest['a']]} against {speech.labels[widest['b']]})"
    )
    return [f"No difference found does not mean that there is none: up to {amount} is not excluded{between}."]


def _covered(answer: Mapping[str, Any]) -> str:
    rows = f"{answer['rows']:,} rows"
    if answer["measure"] == "forgetting":
        rows = f"{answer['rows']:,} passages"
    elif answer["units"] != answer["rows"]:
        rows += f" with {answer['units']:,} different prompts"
    confidence = f"Holm-corrected {100 * answer['confidence']:.0f}%"
    if answer["seeds"] == 1:
        return (
            f"One seed each, {rows}, {confidence}: training noise is not covered, so that other seeds may give another "
            "order."
        )
    return f"{answer['seeds']} seeds, {rows}, {confidence}."


def _fewer_seeds(answer: Mapping[str, Any], speech: _Speech) -> list[str]:
    fewer = [arm for arm in answer["arms"] if arm["seeds"] < answer["seeds"]]
    if not fewer:
        return []
    counts = listed([f"{arm['seeds']} of {speech.labels[arm['name']]}" for arm in fewer])
    borrowed = [arm["name"] for arm in fewer if arm["seeds"] == 1]
    note = f"; the training noise of {speech.names(borrowed)} is taken to be that of the others" if borrowed else ""
    return [f"Fewer seeds: {counts}{note}."]


def _failures(content: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence on what failed: it is in no order."""
    ended = {str(run["name"]) for run in runs}
    failed: dict[str, tuple[str, int]] = {}
    for run in content.get("failed") or []:
        if isinstance(run, dict):
            name = str(run.get("name") or run.get("method"))
            failed[name] = (
                named(str(run.get("label") or name), str(run.get("method"))),
                failed.get(name, ("", 0))[1] + 1,
            )
    whole = [label for name, (label, _) in failed.items() if name not in ended]
    partly = [f"{count} of {label}" for name, (label, count) in failed.items() if name in ended]
    sentences = (
        [_sentence(f"{listed(whole)} failed and {'is' if len(whole) == 1 else 'are'} not judged")] if whole else []
    )
    return sentences + ([f"Failed runs, left out: {listed(partly)}."] if partly else [])


def _sentence(text: str) -> str:
    """Capital letter first, a full stop last. Names such as "LoRA" stay."""
    return f"{text[:1].upper()}{text[1:]}."


def _labels(runs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Each arm as a sentence calls it; two arms with one label get their names too."""
    labels = {str(r["name"]): named(str(r.get("label") or r["name"]), str(r.get("method"))) for r in runs}
    return {
        arm: f"{label} ({arm})" if list(labels.values()).count(label) > 1 else label for arm, label in labels.items()
    }


def _methods(runs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    return {str(run["name"]): str(run.get("method")) for run in runs}
