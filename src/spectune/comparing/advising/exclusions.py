"""Which arms do not keep a user's limits, and what would have to give."""

import math
from collections.abc import Sequence

from spectune.comparing.advising.candidates import Candidate
from spectune.reporting import units
from spectune.results import Limits
from spectune.results.phrases import listed, sentence, share
from spectune.results.recommendation import Exclusion

#: how sentences call a limit
CALLED = {
    "max_memory_bytes": "the memory limit",
    "max_latency_overhead": "the latency limit",
    "max_stored_bytes": "the storage limit",
    "min_quality": "the quality limit",
}


def exclusions(arm: Candidate, limits: Limits, arms: Sequence[Candidate], bare: float | None) -> list[Exclusion]:
    """The limits that an arm does not keep, or that cannot be checked of it. `bare`: the bare base's judged loss."""
    stored = None if arm.stored_bytes is None else arm.stored_bytes * limits.tenants
    slower = f"takes {{}} more time a token ({'merged' if arm.merged else 'unmerged'})"
    checks = [
        ("max_memory_bytes", limits.max_memory_bytes, arm.peak_memory_bytes, units.size, "takes {} of memory"),
        ("max_latency_overhead", limits.max_latency_overhead, arm.inference_overhead, share, slower),
        ("max_stored_bytes", limits.max_stored_bytes, stored, units.size, f"stores {{}} for {tasks(limits)}"),
    ]
    found: list[tuple[str, str, float | None]] = []
    for name, limit, value, form, words in checks:
        # a share worked out from two speeds is rounded
        if limit is not None and (value is None or value > limit * (1 + 1e-9)):
            text = f"{arm.label} was not measured on a quiet machine, so that the limit cannot be checked"
            if value is not None:
                text = f"{arm.label} {words.format(form(value))}; the limit is {form(limit)}"
            found.append((name, text, value))
    quality, words = _quality(arm, arms, bare)
    if limits.min_quality is not None and (quality is None or quality < limits.min_quality):
        text = f"{arm.label} cannot be checked for quality: no loss of it, or none below the bare base's, was measured"
        if quality is not None:
            text = f"{arm.label} {words.format(f'{quality:.1f}')}; the limit is {limits.min_quality:g}"
        found.append(("min_quality", text, quality))
    runs = list(arm.runs)
    return [Exclusion(name=arm.name, limit=limit, text=sentence(t), value=v, runs=runs) for limit, t, v in found]


def what_would_have_to_give(excluded: Sequence[Exclusion], arms: Sequence[Candidate]) -> str:
    """Which limit keeps which arm out, and the least that would let one in."""
    labels = {arm.name: arm.label for arm in arms}
    by_arm = [[broken for broken in excluded if broken.name == name] for name in labels]
    keeps, gives = [], []
    for limit in dict.fromkeys(broken.limit for broken in excluded):
        out = [labels[broken.name] for broken in excluded if broken.limit == limit]
        keeps.append(f"{CALLED[limit]} keeps out {listed(out)}")
        alone = [(b[0].value, b[0].name) for b in by_arm if len(b) == 1 and b[0].limit == limit]
        if known := [(value, name) for value, name in alone if value is not None]:
            value, name = (max if limit == "min_quality" else min)(known, key=lambda entry: entry[0])
            gives.append(f"{CALLED[limit]} at {_to_keep(limit, value)} would let {labels[name]} in")
    give = sentence("; ".join(gives)) if gives else "No single limit, given up, would let one in."
    return f"No method keeps all limits: {'; '.join(keeps)}. {give}"


def tasks(limits: Limits) -> str:
    return "one task" if limits.tenants == 1 else f"{limits.tenants:,} tasks"


def _quality(arm: Candidate, arms: Sequence[Candidate], bare: float | None) -> tuple[float | None, str]:
    """What `min_quality` limits, and in words what it is: relative performance, or where that is undefined, the
    improvement on the bare base as a percentage of the best method's."""
    if any(other.relative_performance is not None for other in arms):
        return arm.relative_performance, "has a relative performance of {} (100 is full fine-tuning)"
    best = min(other.rank for other in arms)
    if bare is None or arm.judged_loss is None or best >= bare:
        return None, ""
    improved = 100 * (bare - arm.judged_loss) / (bare - best)
    return improved, "improves on the bare base by {} of 100 (100 is the best method)"


def _to_keep(limit: str, value: float) -> str:
    """A value on the side of the limit on which it would be kept, in the form that the command line takes."""
    if limit == "min_quality":
        return f"{math.floor(10 * value) / 10:g}"
    as_share = limit == "max_latency_overhead"
    return f"{math.ceil(1000 * value) / 1000:g}" if as_share else f"{math.ceil(value / 1e3):,} kB"
