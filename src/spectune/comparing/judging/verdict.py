"""The verdict of a comparison: which methods differ, as a partial order with ties."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spectune.comparing.judging.evidence import Evidence, find_evidence
from spectune.comparing.judging.partial_order import groups, reduction, transitive
from spectune.comparing.judging.sentences import NO_DIFFERENCE, Naming, edge_sentences, failure_sentences, sentences_of
from spectune.comparing.judging.statistics import CONFIDENCE, PairEstimate, estimate
from spectune.results import ComparedRun, ComparisonResult, Judgement, Verdict
from spectune.results.arm_result import is_finite
from spectune.results.verdict_record import JudgedArm, JudgedPair


def verdict(comparison: ComparisonResult, folder: str | Path) -> Verdict:
    """What the runs of a comparison say about the order of its arms.

    The judged loss (or what decides in its place), each metric and forgetting (nats per token) are corrected for their
    own pairs each. Intervals are None where runs left no loss for each row. Never raises on partial content.

    Args:
        folder: the comparison's; runs' `rows_file` and `base/passages.json` are read under it.
    """
    findings = find_evidence(comparison, Path(folder))
    names = Naming.of(comparison)
    ways, forgetting = comparison.data.higher_is_better, findings.forgetting
    by, runs = comparison.data.decided_by, [run for run in comparison.runs if run.name]
    if comparison.decided_by_loss:
        judged = _without_rows(runs, names)
        if findings.loss is not None:
            judged = _judge(findings.loss, "judged_loss", names, what="of its loss")
    else:
        judged = _bare(by, f"No verdict on {by}: no run left it for each row.", None)
        if (decisive := findings.metrics.pop(by, None)) is not None:
            judged = _judge(decisive, by, names, higher_is_better=ways.get(by, True))
        judged.sentences.append(
            f"Decided by {by}: the losses of label words and of a head are of different things, and do not compare."
        )
    judged.sentences[1:1] = edge_sentences(comparison, names)  # beside the headline, which ranks these arms
    judged.sentences += findings.problems + failure_sentences(comparison)
    metrics = {n: _judge(e, n, names, higher_is_better=ways.get(n, True)) for n, e in findings.metrics.items()}
    return Verdict(
        **judged.to_dict(),
        base=findings.base_loss if comparison.decided_by_loss else None,
        metrics=metrics,
        forgetting=None if forgetting is None else _judge(forgetting, "forgetting", names, what="of its forgetting"),
    )


def _judge(
    evidence: Evidence, measure: str, names_of: Naming, what: str | None = None, *, higher_is_better: bool = True
) -> Judgement:
    """One measure's judgement. `what` names the whole that shares are of, for losses, where less is better."""
    lower_is_better = what is not None or not higher_is_better
    sums = {arm: s for arm, s in evidence.sums.items() if np.isfinite(evidence.score(s.sum(axis=1))).all()}
    if evidence.units < 2 or not sums:
        return _bare(measure, f"No verdict on {measure}: it takes two rows at least.", evidence.rows)
    arms, pairs = estimate(sums, evidence.score, relative_noise=what is not None)
    sign = 1 if lower_is_better else -1
    arms = sorted(arms, key=lambda arm: sign * arm.mean)  # stable: of equal ones the first stays first
    names = [arm.name for arm in arms]
    place = {name: index for index, name in enumerate(names)}
    pairs = sorted((_turned(pair, place) for pair in pairs), key=lambda pair: (place[pair.a], place[pair.b]))
    adjusted = transitive({(pair.a, pair.b): pair.p_adjusted for pair in pairs}, names)
    better = {pair for pair, p in adjusted.items() if p <= 1 - CONFIDENCE}
    means, worse = {arm.name: arm.mean for arm in arms}, {name for _, name in better}
    full, seeds = names_of.full(names), [arm.seeds for arm in arms]
    versus = {a: "better" for a, b in better if b == full} | {b: "worse" for a, b in better if a == full}
    judged = Judgement(
        measure=measure, higher_is_better=not lower_is_better, rows=evidence.rows, units=evidence.units,
        seeds=max(seeds), covers_training_noise=min(seeds) > 1, confidence=CONFIDENCE, correction="holm",
        arms=[JudgedArm(**vars(arm), label=names_of.labels[arm.name], best=arm.name not in worse) for arm in arms],
        pairs=[_pair(pair, adjusted[pair.a, pair.b], (pair.a, pair.b) in better, means) for pair in pairs],
        groups=groups(names, {frozenset(pair) for pair in better}),
        order=sorted((list(pair) for pair in reduction(better)), key=lambda pair: (place[pair[0]], place[pair[1]])),
        versus_full={} if full is None else {n: versus.get(n, NO_DIFFERENCE) for n in names if n != full},
    )  # fmt: skip
    judged.sentences = sentences_of(judged, names_of, what)
    return judged


def _turned(pair: PairEstimate, place: Mapping[str, int]) -> PairEstimate:
    """The pair with the better estimate first."""
    if place[pair.a] < place[pair.b]:
        return pair
    effect = None if pair.effect_size is None else -pair.effect_size
    turned = -pair.difference, -pair.high, -pair.low
    return PairEstimate(pair.b, pair.a, *turned, pair.p, pair.p_adjusted, effect)


def _pair(pair: PairEstimate, p_adjusted: float, differs: bool, means: Mapping[str, float]) -> JudgedPair:
    relative = pair.difference / abs(means[pair.a]) if means[pair.a] else None
    return JudgedPair(**{**vars(pair), "p_adjusted": p_adjusted}, relative=relative, differs=differs)


def _without_rows(runs: Sequence[ComparedRun], names_of: Naming) -> Judgement:
    """Means alone, where no run left a loss for each row."""
    losses: dict[str, list[float]] = {}
    for run in runs:
        if is_finite(run.loss):
            losses.setdefault(run.name, []).append(run.loss)
    if not runs:
        why = "No verdict: no run ended."
    elif not losses:
        why = "No verdict: no run has a finite loss."
    elif any(run.rows_file for run in runs):
        why = "No verdict: what the runs saved of each row cannot be used, so noise cannot be told from differences."
    else:
        why = "No verdict: these runs were saved without a loss for each row, so noise cannot be told from "
        why += "differences. A new comparison saves them."
    arms = []
    for arm, found in sorted(losses.items(), key=lambda entry: statistics.fmean(entry[1])):
        numbers: dict[str, Any] = {"seeds": len(found), "mean": statistics.fmean(found), "low": None, "high": None}
        numbers["seed_sd"] = statistics.stdev(found) if len(found) > 1 else None
        arms.append(JudgedArm(name=arm, label=names_of.labels[arm], best=False, **numbers))
    return _bare("judged_loss", why, None, arms)


def _bare(measure: str, why: str, rows: int | None, arms: Sequence[JudgedArm] = ()) -> Judgement:
    """A judgement without intervals, and the sentence that says why."""
    return Judgement(
        measure=measure, rows=rows, units=rows, seeds=max((arm.seeds for arm in arms), default=0),
        covers_training_noise=False, confidence=CONFIDENCE, correction="holm", arms=list(arms), pairs=[], groups=[],
        order=[], versus_full={}, sentences=[why],
    )  # fmt: skip
