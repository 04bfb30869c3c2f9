"""The learning rate of a method by successive halving (Jamieson and Talwalkar 2016): many rates for a few steps, the
better half of them for twice as many, and so on. It knows nothing of models: a trial is a function."""

import math
from collections.abc import Callable, Generator, Sequence

from spectune.results.comparison_file import Search, Trial


def candidates(low: float, high: float, count: int) -> list[float]:
    """`count` rates from low to high, both among them, evenly on a log scale, of three significant digits."""
    if count == 1:
        return [float(f"{math.sqrt(low * high):.3g}")]
    ratio = (high / low) ** (1 / (count - 1))
    return [float(f"{low * ratio**i:.3g}") for i in range(count)]


def successive_halving(
    bounds: tuple[float, float], rungs: Sequence[tuple[int, int]], trial: Callable[[float, int], Trial], *,
    source: str, extensions: int = 0,
) -> Search:  # fmt: skip
    """Run trials, one by one, and return the best rate.

    Args:
        trial: runs one rate for so many steps; a divergence is a trial without a loss.
        bounds, rungs, source, extensions: see `halving`.
    """
    search, made = halving(bounds, rungs, source=source, extensions=extensions), None
    while True:
        try:
            wanted = search.send(made)
        except StopIteration as end:
            found: Search = end.value
            return found
        made = [trial(rate, steps) for rate, steps in wanted]


def halving(
    bounds: tuple[float, float], rungs: Sequence[tuple[int, int]], *, source: str, extensions: int = 0
) -> Generator[list[tuple[float, int]], list[Trial] | None, Search]:
    """The search as what it asks for: it yields (rate, steps) of trials that do not wait for each other, is sent those
    trials, and returns the best rate. Many searches can so take their trials in one go.

    Args:
        bounds: lowest and highest rate of the first rung.
        rungs: (rates, steps) of each rung; rates fall from one to the next.
        extensions: where the best of the last rung is the lowest or highest rate tried so far, a rate as far beyond it
            as the first rung's are apart is tried, as long as that helps, at most so many times; where all diverged,
            lower ones.
    """
    rates = candidates(*bounds, rungs[0][0])
    ratio = rates[1] / rates[0] if len(rates) > 1 else 3.0
    trials: list[Trial] = []
    last: list[Trial] = []
    for count, steps in rungs:
        ranked = sorted(last, key=lambda t: t.rank)
        left = rates if not last else [t.learning_rate for t in ranked if t.valid_loss is not None]
        last = []
        # where all that go on diverge in their longer runs, the next best of the rung before take their place
        while left and all(t.valid_loss is None for t in last):
            last = yield from _tried(left[:count], steps)
            left = left[count:]
            trials += last
        if all(t.valid_loss is None for t in last):
            break
    best = min(last, key=lambda t: t.rank)
    steps = rungs[-1][1]
    for _ in range(extensions):
        if none := best.valid_loss is None:  # each rate diverged in one rung or another
            beyond = min(t.learning_rate for t in trials) / ratio
        elif (side := _edge(best.learning_rate, trials)) is not None:
            beyond = best.learning_rate * ratio if side == "high" else best.learning_rate / ratio
        else:
            break
        [further] = yield from _tried([float(f"{beyond:.3g}")], steps)
        trials.append(further.model_copy(update={"extension": True}))
        if further.rank >= best.rank and not none:
            break
        best = further
    if best.valid_loss is None:
        return _found(source, trials, None, None)
    return _found(source, trials, best.learning_rate, _edge(best.learning_rate, trials))


def _tried(rates: Sequence[float], steps: int) -> Generator[list[tuple[float, int]], list[Trial] | None, list[Trial]]:
    """Ask for these rates; what was made of them."""
    return (yield [(rate, steps) for rate in rates]) or []


def _found(source: str, trials: list[Trial], best: float | None, edge: str | None) -> Search:
    rates = {trial.learning_rate for trial in trials}
    low, high = min(rates), max(rates)
    text = f"{len(rates)} rates from {low:.3g} to {high:.3g} ({source})"
    text = f"all of {text} diverged" if best is None else f"best of {text}: {best:g}"
    none_ended = all(trial.valid_loss is None for trial in trials if not trial.extension)
    if extended := sum(trial.extension for trial in trials):
        words = "one of them was tried" if extended == 1 else f"{extended} of them were tried"
        text += f"; {words} because {'all others diverged' if none_ended else 'the best lay on the edge'}"
    if edge is not None:
        text += f"; it is the {edge}est tried: a {edge}er one may be better still"
    return Search(source=source, trials=trials, best=best, edge=edge, range=(low, high), sentence=text)


def _edge(rate: float, trials: Sequence[Trial]) -> str | None:
    tried = [t.learning_rate for t in trials]
    if len(set(tried)) == 1:
        return None  # one rate has no edges: nothing was searched
    return "high" if rate == max(tried) else "low" if rate == min(tried) else None
