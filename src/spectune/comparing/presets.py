"""How much a comparison searches and repeats: `--quick`, the default, `--thorough`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """The same budget for every method, counted in steps of equal batches, and so in equal target tokens.

    Attributes:
        rungs: of the learning-rate search, each (rates tried, share of the final run's steps): the best rates of a
            rung go on to the next, each time from the start and with a schedule of its own.
        from_default: rates lie between the method's default and so many times as much, not in its whole range.
        extensions: further rates that may be tried where the best lies on the edge.
        seeds: final runs of each method at its best rate.
        curve_seeds: runs of each method and number of rows on a data curve.
        own_process: the memory of each final run is measured once more in a process that does nothing else.
    """

    name: str
    rungs: tuple[tuple[int, float], ...]
    seeds: int
    from_default: float | None = None
    extensions: int = 0
    curve_seeds: int = 1
    own_process: bool = False


#: the default rate, three times as much, and, beyond the better of them, a third
QUICK = Preset("quick", rungs=((2, 1 / 4),), seeds=1, from_default=3.0, extensions=1)
#: in all 1.5 final runs of search: 8/16 + 4/8 + 2/4
DEFAULT = Preset("default", rungs=((8, 1 / 16), (4, 1 / 8), (2, 1 / 4)), seeds=3, extensions=2)
#: in all 3 final runs of search: 8/8 + 4/4 + 2/2
THOROUGH = Preset(
    "thorough", rungs=((8, 1 / 8), (4, 1 / 4), (2, 1 / 2)), seeds=5, extensions=3, curve_seeds=3, own_process=True
)
PRESETS = {preset.name: preset for preset in (QUICK, DEFAULT, THOROUGH)}
