"""A verdict in words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from spectune.results import ComparisonResult, Judgement
from spectune.results.arm_result import FULL
from spectune.results.phrases import listed, named, number_word, sentence, share

NO_DIFFERENCE = "no difference"


@dataclass(frozen=True)
class Naming:
    """How sentences call the arms, and which methods they are."""

    labels: Mapping[str, str]
    methods: Mapping[str, str]

    @classmethod
    def of(cls, comparison: ComparisonResult) -> Naming:
        """Each arm as a sentence calls it; two arms with one label get their names too."""
        runs = [run for run in comparison.runs if run.name]
        labels = {run.name: named(run.label or run.name, run.method) for run in runs}
        given = list(labels.values())
        return cls(
            {arm: f"{label} ({arm})" if given.count(label) > 1 else label for arm, label in labels.items()},
            {run.name: run.method for run in runs},
        )

    def listed(self, arms: Iterable[str]) -> str:
        return listed([self.labels[arm] for arm in arms])

    def full(self, arms: Iterable[str]) -> str | None:
        """The first of the arms that is full fine-tuning."""
        return next((arm for arm in arms if self.methods.get(arm) == FULL), None)


def sentences_of(judged: Judgement, names_of: Naming, what: str | None) -> list[str]:
    """A judgement in words, the headline first.

    Args:
        what: "of its loss" or the like: what a difference is given as a share of. None for metrics, whose differences
            are given in their own unit.
    """
    names, means = [arm.name for arm in judged.arms], judged.means
    if len(names) == 1:
        return [f"Only {names_of.listed(names)} was judged: there is nothing to compare it with.", _covered(judged)]
    full, best = names_of.full(names), [arm.name for arm in judged.arms if arm.best]
    if not any(pair.differs for pair in judged.pairs):
        both = names_of.listed(names) if len(names) == 2 else f"any of the {number_word(len(names))} methods"
        headline = f"No difference between {both} was found."
    elif full is not None:
        headline = _against_full(judged, names_of, names, full, what)
    else:
        headline = _best_first(names_of, names, best, means, what)
    rest = _rest_of_order(judged, names_of, full if full is not None else (best[0] if len(best) == 1 else None))
    left_open = _left_open(judged, names_of, what)
    return [headline, *rest, *left_open, _covered(judged), *_fewer_seeds(judged, names_of)]


def _against_full(judged: Judgement, names_of: Naming, names: Sequence[str], full: str, what: str | None) -> str:
    """`LoRA and the adapter match full fine-tuning within noise; BitFit is worse (by 12% of its loss).`"""
    parts: list[str] = []
    for kind in ("better", NO_DIFFERENCE, "worse"):
        arms = [name for name in names if judged.versus_full.get(name) == kind]
        if not arms:
            continue
        subject, other = names_of.listed(arms), names_of.labels[full] if not parts else ""
        one = len(arms) == 1
        if kind == NO_DIFFERENCE:
            words = f"{'matches' if one else 'match'} {other or 'it'} within noise"
        else:
            than = f" than {other}" if other else ""
            words = f"{'is' if one else 'are'} {kind}{than} (by {_range(arms, full, judged.means, what)})"
        parts.append(f"{subject} {words}")
    return sentence("; ".join(parts))


def _best_first(
    names_of: Naming, names: Sequence[str], best: Sequence[str], means: Mapping[str, float], what: str | None
) -> str:
    rest = [name for name in names if name not in best]
    top, are = names_of.listed(best), f"{names_of.listed(rest)} {'is' if len(rest) == 1 else 'are'}"
    if len(best) == 1:
        return sentence(f"{top} is best; {are} worse (by {_range(rest, best[0], means, what)})")
    found = f"{top} are best, and no difference between them was found"
    return sentence(f"{found}; {are} worse than at least one of them")


def _range(arms: Sequence[str], other: str, means: Mapping[str, float], what: str | None) -> str:
    """How far arms lie from another one: `4% to 12% of its loss`, or in a metric's own unit."""
    sizes = sorted(abs(means[arm] - means[other]) for arm in arms)
    as_share = what is not None and means[other] != 0
    texts = list(dict.fromkeys(share(size / abs(means[other])) if as_share else f"{size:.3g}" for size in sizes))
    words = texts[0] if len(texts) == 1 else f"{texts[0]} to {texts[-1]}"
    return f"{words} {what}" if as_share else words


def _rest_of_order(judged: Judgement, names_of: Naming, covered: str | None) -> list[str]:
    """The pairs of the order that the headline, which is about `covered`, has left out; arms that are better than the
    same ones stand together."""
    worse, better = defaultdict[str, list[str]](list), defaultdict[tuple[str, ...], list[str]](list)
    for a, b in judged.order:
        if covered not in (a, b):
            worse[a].append(b)
    for a, below in worse.items():
        better[tuple(below)].append(a)
    parts = [
        f"{names_of.listed(above)} {'is' if len(above) == 1 else 'are'} better than {names_of.listed(below)}"
        for below, above in better.items()
    ]
    return [sentence("; ".join(parts))] if parts else []


def _left_open(judged: Judgement, names_of: Naming, what: str | None) -> list[str]:
    """The largest difference that an interval leaves open: none found is not none there."""
    open_pairs = [pair for pair in judged.pairs if not pair.differs]
    if not open_pairs:
        return []
    scales = {arm: abs(mean) or 1.0 if what else 1.0 for arm, mean in judged.means.items()}
    reaches = [max(abs(pair.low or 0.0), abs(pair.high or 0.0)) / scales[pair.a] for pair in open_pairs]
    reach, widest = max(zip(reaches, open_pairs, strict=True), key=lambda entry: entry[0])
    amount = f"{share(reach)} {what.replace('its', 'the')}" if what else f"{reach:.3g}"
    labels = names_of.labels
    between = "" if len(judged.arms) == 2 else f" ({labels[widest.a]} against {labels[widest.b]})"
    return [f"No difference found does not mean that there is none: up to {amount} is not excluded{between}."]


def _covered(judged: Judgement) -> str:
    rows = f"{judged.rows or 0:,} {'passages' if judged.measure == 'forgetting' else 'rows'}"
    if judged.measure != "forgetting" and judged.units != judged.rows:
        rows += f" with {judged.units or 0:,} different prompts"
    rows += f", Holm-corrected {100 * judged.confidence:.0f}%"
    if judged.seeds == 1:
        return f"One seed each, {rows}: training noise is not covered, so that other seeds may give another order."
    return f"{judged.seeds} seeds, {rows}."


def _fewer_seeds(judged: Judgement, names_of: Naming) -> list[str]:
    fewer = [arm for arm in judged.arms if arm.seeds < judged.seeds]
    if not fewer:
        return []
    counts = listed([f"{arm.seeds} of {names_of.labels[arm.name]}" for arm in fewer])
    borrowed = [arm.name for arm in fewer if arm.seeds == 1]
    note = f"; the training noise of {names_of.listed(borrowed)} is taken to be that of the others" if borrowed else ""
    return [f"Fewer seeds: {counts}{note}."]


def edge_sentences(comparison: ComparisonResult, names_of: Naming) -> list[str]:
    """The arms whose best learning rate is the lowest or the highest tried: their place may be too low."""
    on_edge = {
        arm: f"{arm_label} ({search.best:g}, the {search.edge}est of {len(search.trials)})"
        for arm, arm_label in names_of.labels.items()
        if (search := comparison.searches.get(arm)) is not None and search.edge is not None and search.best is not None
    }
    if not on_edge:
        return []
    one = len(on_edge) == 1
    text = f"the best learning rate of {listed(list(on_edge.values()))} lies on the edge of what was tried: "
    return [sentence(text + f"with a better one {'it' if one else 'they'} may stand higher than here")]


def failure_sentences(comparison: ComparisonResult) -> list[str]:
    """What failed: it is in no order."""
    ended = {run.name for run in comparison.runs}
    names = [failure.name for failure in comparison.failed]
    labels = {failure.name: named(failure.label or failure.name, failure.method) for failure in comparison.failed}
    whole = [label for name, label in labels.items() if name not in ended]
    partly = [f"{names.count(name)} of {label}" for name, label in labels.items() if name in ended]
    are = "is" if len(whole) == 1 else "are"
    sentences = [sentence(f"{listed(whole)} failed and {are} not judged")] if whole else []
    return sentences + ([f"Failed runs, left out: {listed(partly)}."] if partly else [])
