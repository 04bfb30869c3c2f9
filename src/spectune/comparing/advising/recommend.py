"""Which method to take, from what a comparison measured, within a user's limits; every sentence names its runs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from spectune.comparing.advising.candidates import SAME_OVERHEAD, SEED_NOISE, Candidate, Quality, candidates
from spectune.comparing.advising.exclusions import exclusions, tasks, what_would_have_to_give
from spectune.reporting import units
from spectune.results import ComparisonResult, Limits, Recommendation, Verdict
from spectune.results.arm_result import base_loss, undominated
from spectune.results.phrases import listed, sentence, share
from spectune.results.recommendation import AXES, Reason

#: A tie may stand for a method that is this much worse: where more is left open the evidence does not decide.
MATERIAL = 0.05
#: Costs within this share of the least are as good as the least.
SAME_COST = 0.10


@dataclass
class _Decision:
    """Either a pick or the sentence that says why there is none, and the reasons."""

    pick: str | None = None
    abstains: str | None = None
    reasons: list[Reason] = field(default_factory=list)


def recommend(comparison: ComparisonResult, limits: Limits | None = None) -> Recommendation:
    """The Pareto set, the pick and why.

    The pick is the cheapest of the methods that keep the limits and are not worse than the best of them within noise.
    Cheapest: with one tenant by inference overhead, training memory, stored bytes, training time, with more by stored
    bytes, inference overhead, training memory, training time; what comes within 10% (overhead: 5 points) of the least
    goes on to the next.

    Args:
        comparison: with its `verdict`; old or partial ones too.
    """
    limits = limits or Limits()
    arms, bare = candidates(comparison, limits), base_loss(comparison)
    verdict = comparison.verdict or Verdict()
    quality = Quality.of(verdict, arms)
    excluded = [broken for arm in arms for broken in exclusions(arm, limits, arms, bare)]
    out = {broken.name for broken in excluded}
    kept = [arm for arm in arms if arm.name not in out]
    allowed = [arm for arm in kept if arm.name in quality.arms or not quality.judged]
    if not arms:
        failed = "every run failed" if comparison.failed else "no run ended"
        decision = _Decision(abstains=f"No recommendation: {failed}.")
    elif not kept:
        decision = _Decision(abstains=what_would_have_to_give(excluded, arms))
    elif not allowed:
        why = "No recommendation: the methods that keep the limits were not judged on the others' rows."
        decision = _Decision(abstains=why)
    elif bare is not None and all(arm.judged_loss is not None and arm.judged_loss >= bare for arm in allowed):
        who = "no method" if len(allowed) == len(arms) else "none that keeps the limits"
        unit = comparison.data.loss_unit.replace("nats per target token", "nats a token")
        why = f"No recommendation: {who} has a lower loss than the bare base ({bare:.3f} {unit})."
        lowest = min(arm.rank for arm in allowed)
        decision = _Decision(abstains=why, reasons=[_reason(f"the lowest loss is {lowest:.3f}", allowed)])
    elif not quality.judged and len(allowed) > 1:
        why, *_ = [*verdict.sentences, "The comparison holds no verdict."]
        text = f"No recommendation: without intervals no difference can be told from noise. {why}"
        decision = _Decision(abstains=text)
    else:
        decision = _decided(allowed, arms, quality, limits)
    return Recommendation(
        limits=Limits(**limits.model_dump(exclude_defaults=True)),
        axes=[axis for axis in AXES if not arms or any(arm.cost(axis) is not None for arm in arms)],
        pareto=[arm.name for arm in undominated(arms, quality.dominates)],
        excluded=excluded,
        **vars(decision),
    )


def _decided(allowed: Sequence[Candidate], arms: Sequence[Candidate], quality: Quality, limits: Limits) -> _Decision:
    """The cheapest of the best, unless the evidence leaves too much open."""
    best = undominated(allowed, quality.is_better)
    pick, why = _cheapest(best, limits, quality)
    top = min(best, key=lambda arm: arm.rank)
    only = f"{pick.label} is the only method that {'keeps the limits' if len(arms) > 1 else 'was run'}"
    many = len(allowed) > 1
    reasons = [_quality_reason(best, pick, top, allowed, quality) if many else _reason(only, arms)]
    other, _ = _cheapest(undominated(allowed, quality.is_clearly_better), limits, quality)

    def undecided(other: Candidate, text: str, why: str) -> _Decision:
        abstains = f"The evidence does not decide between {pick.label} and {other.label}: {text}"
        proof = _reason(f"{why}: {pick.label}, {other.label}", [pick, other])
        return _Decision(None, sentence(abstains), [*reasons, proof])

    if other.name != pick.name:
        gap = share(abs(quality.relative.get((pick.name, other.name), 0.0)))
        text = (
            f"{other.label} is cheaper and {gap} worse, with one seed each, and another seed alone can move a "
            f"difference by {share(SEED_NOISE)}. Run the comparison with more seeds (--seeds 3)"
        )
        return undecided(other, text, "the runs that leave it open have one seed each")
    left_open = quality.open.get((top.name, pick.name), 0.0)
    if pick.name != top.name and left_open > MATERIAL:
        text = (
            f"no difference was found, but {pick.label}, the cheaper, may be up to {share(left_open)} worse. More "
            "rows to judge on, or more seeds, would tell"
        )
        return undecided(top, text, "the interval between them is too wide")
    if len(best) > 1:
        reasons.append(_reason(why, best))
    reasons += _bill(pick, limits)
    if many and not quality.covers_training_noise:
        text = "one seed each, so that training noise is not covered; the pick would be the same if other seeds moved "
        text += f"every difference by {share(SEED_NOISE)}"
        reasons.append(_reason(text, allowed))
    return _Decision(pick.name, None, reasons)


def _cheapest(arms: Sequence[Candidate], limits: Limits, quality: Quality) -> tuple[Candidate, str]:
    """The cheapest of some arms and, in words, what decided."""
    order = ["inference_overhead", "train_memory_bytes", "stored_bytes", "train_seconds"]
    order = sorted(order, key=lambda axis: axis != "stored_bytes") if limits.tenants > 1 else order
    left = list(arms)
    steps = []
    for axis in order:
        known = [(arm, value) for arm in left if (value := arm.cost(axis)) is not None]
        if len(left) == 1 or len(known) < len(left):  # what was not measured of one decides between none
            continue
        least = min(value for _, value in known)
        reach = least + SAME_OVERHEAD if axis == "inference_overhead" else least * (1 + SAME_COST)
        kept = [arm for arm, value in known if value <= reach]
        if len(kept) < len(left):
            gone = [arm.label for arm in left if arm not in kept]
            steps.append(f"less {AXES[axis].cost} than {listed(gone)}")
            left = kept
    # of equals the better one
    pick = min(left, key=lambda arm: arm.rank)
    if not steps:
        return pick, f"{pick.label} costs no more than the others, and has {quality.best} of those as cheap"
    equal = [arm.label for arm in left if arm is not pick]
    no_worse = "a loss not above that of" if quality.what == "loss" else f"no worse {quality.what} than"
    tie = f", and {no_worse} {listed(equal)}, as cheap" if equal else ""
    return pick, f"of these {pick.label} is the cheapest: {', '.join(steps)}{tie}"


def _quality_reason(
    best: Sequence[Candidate], pick: Candidate, top: Candidate, allowed: Sequence[Candidate], quality: Quality
) -> Reason:
    worse = [arm for arm in allowed if arm not in best]
    one = len(best) == 1
    text = f"{listed([arm.label for arm in best])} {'has' if one else 'have'} the best {quality.what}"
    if not one:
        text += ": no difference between them was found"
    if pick is not top:
        left_open = max(quality.open.get((top.name, pick.name), 0.0), 0.0)
        text += f" ({pick.label} may be up to {share(left_open)} worse than {top.label})"
    if worse:
        are = "is" if len(worse) == 1 else "are"
        text += f"; {listed([arm.label for arm in worse])} {are} worse than {'it' if one else 'at least one of them'}"
    return _reason(text, allowed)


def _bill(pick: Candidate, limits: Limits) -> list[Reason]:
    """What the pick costs, as measured."""
    parts = []
    if pick.peak_memory_bytes is not None:
        parts.append(f"{units.size(pick.peak_memory_bytes)} of memory at its peak")
    if pick.stored_bytes is not None:
        parts.append(f"{units.size(pick.stored_bytes * limits.tenants)} stored for {tasks(limits)}")
    if pick.inference_overhead is not None:
        how = "merged" if pick.merged else "unmerged"
        more = f"{units.percent(pick.inference_overhead, sign=True)} time a decoded token"
        if pick.inference_overhead <= SAME_OVERHEAD:  # below zero it is noise: nothing is faster than the bare base
            more = "no more time a decoded token than the bare base, within noise"
        parts.append(f"{more} ({how})")
    if pick.train_seconds is not None:
        parts.append(f"{units.seconds(pick.train_seconds)} of training")
    return [_reason(f"{pick.label} takes {listed(parts)}", [pick])] if parts else []


def _reason(text: str, arms: Iterable[Candidate]) -> Reason:
    return Reason(text=sentence(text), runs=[run for arm in arms for run in arm.runs])
