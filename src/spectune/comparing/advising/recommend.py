"""Which method to take, from what a comparison measured, within a user's limits; every sentence names its runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spectune.comparing.advising.limits import Limits
from spectune.comparing.judging.verdict import FULL
from spectune.comparing.judging.words import listed, named, share
from spectune.reporting import units

AXES = ("judged_loss", "train_memory_bytes", "stored_bytes", "inference_overhead", "train_seconds")
#: Two runs of one seed each are not told apart below this share of the loss. Over seeds a run's loss had standard
#: deviations of 0.5% to 2.7% (docs/results/calibration.md); a difference of two has sqrt(2) times as much, and 1.96 of
#: the largest is this.
SEED_NOISE = 0.075
#: A tie may stand for a method that is this much worse: where more is left open the evidence does not decide.
MATERIAL = 0.05
#: Costs within this share of the least are as good as the least.
SAME_COST = 0.10
#: Overheads within this share of the base's time are: below it measurements at batch 1 do not repeat.
SAME_OVERHEAD = 0.05


def recommend(content: Mapping[str, Any], limits: Limits | None = None) -> dict[str, Any]:
    """The Pareto set, the pick and why.

    The pick is the cheapest of the methods that keep the limits and are not worse than the best of them within noise.
    Cheapest: with one tenant by inference overhead, training memory, stored bytes, training time, with more by stored
    bytes, inference overhead, training memory, training time; what comes within 10% (overhead: 5 points) of the least
    goes on to the next.

    Args:
        content: a `comparison.json` with its `verdict`; old or partial ones too.

    Returns:
        `limits, axes, pareto, pick, abstains, reasons, excluded`. Either `pick` or `abstains` (a sentence) is None;
        `axes` are those that were measured of some arm.
        Each reason and exclusion has `text` and `runs`: the files or folders, below the comparison's, that prove it.
    """
    limits = limits or Limits()
    arms = _arms(content, limits)
    found = content.get("verdict") if isinstance(content.get("verdict"), dict) else {}
    quality = _Quality.of(found or {}, arms)
    answer: dict[str, Any] = {
        "limits": limits.model_dump(exclude_defaults=True),
        "axes": [axis for axis in AXES if not arms or any(getattr(arm, axis) is not None for arm in arms)],
        "pareto": [arm.name for arm in arms if not any(_dominates(other, arm, quality) for other in arms)],
        "pick": None,
        "abstains": None,
        "reasons": [],
        "excluded": [],
    }
    if not arms:
        answer["abstains"] = (
            "No recommendation: every run failed." if content.get("failed") else "No recommendation: no run ended."
        )
        return answer
    answer["excluded"] = [broken for arm in arms for broken in _broken(arm, limits, arms, content)]
    out = {broken["name"] for broken in answer["excluded"]}
    allowed = [arm for arm in arms if arm.name not in out and (arm.name in quality.arms or not quality.judged)]
    bare = _base_loss(content)
    if not [arm for arm in arms if arm.name not in out]:
        answer["abstains"] = _what_would_have_to_give(answer["excluded"], arms)
    elif not allowed:
        answer["abstains"] = "No recommendation: the methods that keep the limits were not judged on the others' rows."
    elif bare is not None and all(arm.judged_loss is not None and arm.judged_loss >= bare for arm in allowed):
        who = "no method" if len(allowed) == len(arms) else "none that keeps the limits"
        answer["abstains"] = f"No recommendation: {who} has a lower loss than the bare base ({bare:.3f} nats a token)."
        answer["reasons"] = [_reason(f"the lowest loss is {min(_loss_of(arm) for arm in allowed):.3f}", allowed)]
    elif not quality.judged and len(allowed) > 1:
        why = " ".join((found or {}).get("sentences", [])[:1]) or "The comparison holds no verdict."
        answer["abstains"] = f"No recommendation: without intervals no difference can be told from noise. {why}"
    else:
        _pick(answer, allowed, arms, quality, limits)
    return answer


@dataclass(frozen=True)
class _Arm:
    """One arm, medians over its seeds; None where nothing was measured."""

    name: str
    label: str
    method: str
    runs: tuple[str, ...]
    judged_loss: float | None
    train_memory_bytes: float | None
    peak_memory_bytes: float | None
    stored_bytes: float | None
    inference_overhead: float | None
    merged: bool
    train_seconds: float | None


def _arms(content: Mapping[str, Any], limits: Limits) -> list[_Arm]:
    runs_of: dict[str, list[Mapping[str, Any]]] = {}
    for run in content.get("runs") or []:
        if isinstance(run, dict) and run.get("name"):
            runs_of.setdefault(str(run["name"]), []).append(run)
    means = {arm["name"]: arm["mean"] for arm in (content.get("verdict") or {}).get("arms") or []}
    base = content.get("base") or {}
    arms = []
    for name, runs in runs_of.items():
        merged = _median(_overhead(run, base, "_merged") for run in runs) if limits.tenants == 1 else None
        plain = _median(_overhead(run, base, "") for run in runs)
        method = str(runs[0].get("method"))
        arms.append(
            _Arm(
                name,
                named(str(runs[0].get("label") or name), method),
                method,
                tuple(str(run.get("rows_file") or run.get("folder") or f"runs/{name}") for run in runs),
                means.get(name, _median(_loss(run) for run in runs)),
                _median((run.get("peak_memory_bytes") or {}).get("train_allocated") for run in runs),
                _median(_peak(run.get("peak_memory_bytes") or {}) for run in runs),
                _median(run.get("stored_bytes") for run in runs),
                plain if merged is None else merged,
                merged is not None,
                _median(run.get("train_seconds") for run in runs),
            )
        )
    return arms


def _loss(run: Mapping[str, Any]) -> Any:
    return run["judged_loss"] if run.get("judged_loss") is not None else run.get("valid_loss")


def _loss_of(arm: _Arm) -> float:
    """Its judged loss; infinite where there is none, so that it is never the lowest."""
    return math.inf if arm.judged_loss is None else arm.judged_loss


def _base_loss(content: Mapping[str, Any]) -> float | None:
    """The bare base's loss on the judged rows: as the verdict has it, else its validation loss if those were judged."""
    judged = (content.get("verdict") or {}).get("base")
    if judged is not None or (content.get("data") or {}).get("judged_on", "valid") != "valid":
        return judged
    found = (content.get("base") or {}).get("valid_loss")
    return float(found) if isinstance(found, int | float) and math.isfinite(found) else None


def _overhead(run: Mapping[str, Any], base: Mapping[str, Any], kind: str) -> float | None:
    """Extra time a token at batch 1, as a share of the bare base's."""
    at_one = (run.get("decode") or {}).get("1") or {}
    measured, middle = at_one.get(f"overhead{kind}"), at_one.get(f"overhead{kind}_range")
    if kind == "_merged" and middle is not None and middle[0] <= SAME_OVERHEAD:
        return 0.0  # a merged model runs the base's own operations: what rounds do not agree on is noise
    if measured is not None:
        return float(measured)
    rate = run.get(f"decode_tokens_per_second{kind}")
    bare = run.get("decode_tokens_per_second_base") or base.get("decode_tokens_per_second")
    return bare / rate - 1 if bare and rate else None


def _peak(memory: Mapping[str, Any]) -> float | None:
    """The largest peak of all phases: reserved where the allocator told, else tensors."""
    for kind in ("_reserved", "_allocated"):
        found = [value for key, value in memory.items() if key.endswith(kind) and value is not None]
        if found:
            return float(max(found))
    return None


def _median(values: Iterable[Any]) -> float | None:
    found = [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]
    return statistics.median(found) if found else None


# ------------------------------------------------------------------------------------------------ quality, and Pareto


@dataclass(frozen=True)
class _Quality:
    """What the verdict says of pairs: which are better, and how much worse an arm may be than another."""

    judged: bool
    arms: frozenset[str]
    covers_training_noise: bool
    better: frozenset[tuple[str, str]]
    relative: Mapping[tuple[str, str], float]
    open: Mapping[tuple[str, str], float]

    @classmethod
    def of(cls, verdict: Mapping[str, Any], arms: Sequence[_Arm]) -> _Quality:
        pairs = [pair for pair in verdict.get("pairs") or [] if pair.get("low") is not None]
        means = {arm["name"]: arm["mean"] for arm in verdict.get("arms") or []}
        relative, left_open = {}, {}
        for pair in pairs:
            a, b, scale = pair["a"], pair["b"], abs(means[pair["a"]]) or 1.0
            relative[a, b], relative[b, a] = pair["difference"] / scale, -pair["difference"] / scale
            left_open[a, b], left_open[b, a] = pair["high"] / scale, -pair["low"] / scale
        better = {(pair["a"], pair["b"]) for pair in pairs if pair["differs"]}
        if not pairs:  # nothing but raw numbers: good enough for a picture, not for a pick
            better = {
                (a.name, b.name)
                for a in arms
                for b in arms
                if a.judged_loss is not None and b.judged_loss is not None and a.judged_loss < b.judged_loss
            }
        covers = bool(verdict.get("covers_training_noise"))
        return cls(bool(pairs), frozenset(means), covers, frozenset(better), relative, left_open)

    def clearly_better(self, a: str, b: str) -> bool:
        """Whether a is better than b by more than rows, and with one seed another seed, could do."""
        beyond = self.covers_training_noise or self.relative.get((a, b), math.inf) > SEED_NOISE
        return (a, b) in self.better and beyond

    def best(self, arms: Sequence[_Arm], than: Callable[[str, str], bool]) -> list[_Arm]:
        return [arm for arm in arms if not any(than(other.name, arm.name) for other in arms)]

    def is_better(self, a: str, b: str) -> bool:
        return (a, b) in self.better


def _dominates(one: _Arm, other: _Arm, quality: _Quality) -> bool:
    """Whether `one` is as good on every axis and better on one. Losses are compared by the verdict; what was not
    measured of either is no argument."""
    costs = [
        (a, b) for axis in AXES[1:] if (a := getattr(one, axis)) is not None and (b := getattr(other, axis)) is not None
    ]
    if (other.name, one.name) in quality.better or any(a > b for a, b in costs):
        return False
    return (one.name, other.name) in quality.better or any(a < b for a, b in costs)


# ------------------------------------------------------------------------------------------------------------ limits


def _broken(arm: _Arm, limits: Limits, arms: Sequence[_Arm], content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The limits that an arm does not keep, or that cannot be checked of it."""
    stored = None if arm.stored_bytes is None else arm.stored_bytes * limits.tenants
    quality, against = _relative_performance(arm, arms, content)
    slower = f"takes {{}} more time a token ({'merged' if arm.merged else 'unmerged'})"
    checks = [
        ("max_memory_bytes", limits.max_memory_bytes, arm.peak_memory_bytes, units.size, "takes {} of memory"),
        ("max_latency_overhead", limits.max_latency_overhead, arm.inference_overhead, share, slower),
        ("max_stored_bytes", limits.max_stored_bytes, stored, units.size, f"stores {{}} for {_tenants(limits)}"),
    ]
    found = []  # a share worked out from two speeds is rounded
    for name, limit, value, form, words in checks:
        if limit is not None and (value is None or value > limit * (1 + 1e-9)):
            missing = f"{arm.label} was not measured, so that the limit cannot be checked"
            text = missing if value is None else f"{arm.label} {words.format(form(value))}; the limit is {form(limit)}"
            found.append(_exclusion(arm, name, text, value))
    if limits.min_quality is not None and (quality is None or quality < limits.min_quality):
        text = f"{arm.label} cannot be checked for quality: no loss of it, or none below the bare base's, was measured"
        if quality is not None:
            text = f"{arm.label} reaches {quality:.1f} of 100 ({against}); the limit is {limits.min_quality:g}"
        found.append(_exclusion(arm, "min_quality", text, quality))
    return found


def _exclusion(arm: _Arm, limit: str, text: str, value: float | None) -> dict[str, Any]:
    return {"name": arm.name, "limit": limit, "text": _sentence(text), "value": value, "runs": list(arm.runs)}


def _relative_performance(arm: _Arm, arms: Sequence[_Arm], content: Mapping[str, Any]) -> tuple[float | None, str]:
    """Relative performance, and what stands for 100."""
    base = _base_loss(content)
    losses = {other.name: other.judged_loss for other in arms if other.judged_loss is not None}
    if base is None or arm.name not in losses or min(losses.values()) >= base:
        return None, ""
    full = next((losses[a.name] for a in arms if a.method == FULL and losses.get(a.name, base) < base), None)
    top = min(losses.values()) if full is None else full
    against = "100 is the best method" if full is None else "100 is full fine-tuning"
    return 100 * (base - losses[arm.name]) / (base - top), against


#: how sentences call a limit
CALLED = {
    "max_memory_bytes": "the memory limit",
    "max_latency_overhead": "the latency limit",
    "max_stored_bytes": "the storage limit",
    "min_quality": "the quality limit",
}


def _what_would_have_to_give(excluded: Sequence[Mapping[str, Any]], arms: Sequence[_Arm]) -> str:
    """Which limit keeps which arm out, and the least that would let one in."""
    labels = {arm.name: arm.label for arm in arms}
    by_arm = {name: [broken for broken in excluded if broken["name"] == name] for name in labels}
    keeps, gives = [], []
    for limit in dict.fromkeys(broken["limit"] for broken in excluded):
        out = [labels[broken["name"]] for broken in excluded if broken["limit"] == limit]
        keeps.append(f"{CALLED[limit]} keeps out {listed(out)}")
        alone = [b[0] for b in by_arm.values() if len(b) == 1 and b[0]["limit"] == limit and b[0]["value"] is not None]
        if alone:
            nearest = (max if limit == "min_quality" else min)(alone, key=lambda broken: broken["value"])
            gives.append(
                f"{CALLED[limit]} at {_to_keep(limit, nearest['value'])} would let {labels[nearest['name']]} in"
            )
    give = _sentence("; ".join(gives)) if gives else "No single limit, given up, would let one in."
    return f"No method keeps all limits: {'; '.join(keeps)}. {give}"


def _to_keep(limit: str, value: float) -> str:
    """A value on the side of the limit on which it would be kept, in the form that the command line takes."""
    if limit == "min_quality":
        return f"{math.floor(10 * value) / 10:g}"
    return (
        f"{math.ceil(1000 * value) / 1000:g}" if limit == "max_latency_overhead" else f"{math.ceil(value / 1e3):,} kB"
    )


def _tenants(limits: Limits) -> str:
    return "one task" if limits.tenants == 1 else f"{limits.tenants:,} tasks"


# ---------------------------------------------------------------------------------------------------------- the pick


def _pick(
    answer: dict[str, Any], allowed: Sequence[_Arm], arms: Sequence[_Arm], quality: _Quality, limits: Limits
) -> None:
    """Fill in `pick` or `abstains`, and `reasons`."""
    best = quality.best(allowed, quality.is_better)
    pick, why = _cheapest(best, limits)
    top = min(best, key=_loss_of)
    reasons = answer["reasons"]
    if len(allowed) == 1:
        text = f"{pick.label} is the only method" + (" that keeps the limits" if len(arms) > 1 else " that was run")
        reasons.append(_reason(text, arms))
    else:
        reasons.append(_quality_reason(best, pick, top, allowed, quality))
    wider = quality.best(allowed, quality.clearly_better)
    other, _ = _cheapest(wider, limits)
    if other.name != pick.name:
        gap = share(abs(quality.relative.get((pick.name, other.name), 0.0)))
        answer["abstains"] = _sentence(
            f"The evidence does not decide between {pick.label} and {other.label}: {other.label} is cheaper and {gap} "
            f"worse, with one seed each, and another seed alone can move a difference by {share(SEED_NOISE)}. Run the "
            "comparison with more seeds (--seeds 3)"
        )
        reasons.append(
            _reason(f"the runs that leave it open have one seed each: {pick.label}, {other.label}", [pick, other])
        )
        return
    left_open = quality.open.get((top.name, pick.name), 0.0)
    if pick.name != top.name and left_open > MATERIAL:
        answer["abstains"] = _sentence(
            f"The evidence does not decide between {pick.label} and {top.label}: no difference was found, but "
            f"{pick.label}, the cheaper, may be up to {share(left_open)} worse. More rows to judge on, or more seeds, "
            "would tell"
        )
        reasons.append(_reason(f"the interval between them is too wide: {pick.label}, {top.label}", [pick, top]))
        return
    answer["pick"] = pick.name
    if len(best) > 1:
        reasons.append(_reason(why, best))
    reasons += _bill(pick, limits)
    if len(allowed) > 1 and not quality.covers_training_noise:
        text = (
            "one seed each, so that training noise is not covered; the pick would be the same if other seeds moved "
            f"every difference by {share(SEED_NOISE)}"
        )
        reasons.append(_reason(text, allowed))


def _cheapest(arms: Sequence[_Arm], limits: Limits) -> tuple[_Arm, str]:
    """The cheapest of some arms and, in words, what decided."""
    order = ["inference_overhead", "train_memory_bytes", "stored_bytes", "train_seconds"]
    if limits.tenants > 1:
        order = ["stored_bytes", "inference_overhead", "train_memory_bytes", "train_seconds"]
    left = list(arms)
    steps = []
    for axis in order:
        known = [(arm, value) for arm in left if (value := getattr(arm, axis)) is not None]
        if len(left) == 1 or not known:
            continue
        least = min(value for _, value in known)
        reach = least + SAME_OVERHEAD if axis == "inference_overhead" else least * (1 + SAME_COST)
        kept = [arm for arm, value in known if value <= reach]
        if len(kept) < len(left):
            gone = [arm.label for arm in left if arm not in kept]
            steps.append(f"less {COSTS[axis]} than {listed(gone)}")
            left = kept
    # of equals the better one
    pick = min(left, key=_loss_of)
    if not steps:
        return pick, f"{pick.label} costs no more than the others, and has the lowest loss of those as cheap"
    equal = [arm.label for arm in left if arm is not pick]
    tie = f", and a loss not above that of {listed(equal)}, as cheap" if equal else ""
    return pick, f"of these {pick.label} is the cheapest: {', '.join(steps)}{tie}"


COSTS = {
    "inference_overhead": "time a decoded token",
    "train_memory_bytes": "training memory",
    "stored_bytes": "storage",
    "train_seconds": "training time",
}


def _quality_reason(
    best: Sequence[_Arm], pick: _Arm, top: _Arm, allowed: Sequence[_Arm], quality: _Quality
) -> dict[str, Any]:
    worse = [arm for arm in allowed if arm not in best]
    one = len(best) == 1
    text = f"{listed([arm.label for arm in best])} {'has' if one else 'have'} the best loss"
    if not one:
        text += ": no difference between them was found"
    if pick is not top:
        left_open = max(quality.open.get((top.name, pick.name), 0.0), 0.0)
        text += f" ({pick.label} may be up to {share(left_open)} worse than {top.label})"
    if worse:
        are = "is" if len(worse) == 1 else "are"
        text += f"; {listed([arm.label for arm in worse])} {are} worse than {'it' if one else 'at least one of them'}"
    return _reason(text, allowed)


def _bill(pick: _Arm, limits: Limits) -> list[dict[str, Any]]:
    """What the pick costs, as measured."""
    parts = []
    if pick.peak_memory_bytes is not None:
        parts.append(f"{units.size(pick.peak_memory_bytes)} of memory at its peak")
    if pick.stored_bytes is not None:
        parts.append(f"{units.size(pick.stored_bytes * limits.tenants)} stored for {_tenants(limits)}")
    if pick.inference_overhead is not None:
        how = "merged" if pick.merged else "unmerged"
        more = f"{units.percent(pick.inference_overhead, sign=True)} time a decoded token"
        if pick.inference_overhead <= SAME_OVERHEAD:  # below zero it is noise: nothing is faster than the bare base
            more = "no more time a decoded token than the bare base, within noise"
        parts.append(f"{more} ({how})")
    if pick.train_seconds is not None:
        parts.append(f"{units.seconds(pick.train_seconds)} of training")
    return [_reason(f"{pick.label} takes {listed(parts)}", [pick])] if parts else []


def _reason(text: str, arms: Iterable[_Arm]) -> dict[str, Any]:
    return {"text": _sentence(text), "runs": [run for arm in arms for run in arm.runs]}


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
