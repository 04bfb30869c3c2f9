"""The runs that a comparison makes of each method, in optimizer steps: the same for every one. How much it searches
and repeats is the preset's: `--quick`, the default, `--thorough`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spectune.errors import ConfigError
from spectune.results import comparison_file as results
from spectune.training import TrainingConfig
from spectune.training.prepare import total_steps

#: a run on fewer rows sees each of them at most so many times
CURVE_EPOCHS = 20


@dataclass(frozen=True)
class Preset:
    """The same budget for every method, counted in steps of equal batches, and so in equal target tokens.

    Attributes:
        rungs: of the learning-rate search, each (rates tried, share of the final run's steps): the best rates of a
            rung go on to the next, each time from the start and with a schedule of its own.
        around_default: the first rates lie around the method's default, the highest so many times the lowest; None:
            in the whole range that the method gives for this base.
        extensions: further rates that may be tried where the best lies on the edge: few ever are (a rule that is right
            to a factor of 3 needs one), and a rate on an edge makes a method look worse than it is.
        search_rows: validation rows that a trial is judged on, the same for all rates.
        seeds: final runs of each method at its best rate.
        curve_seeds: runs of each method and number of rows on a data curve.
        own_process: the memory of each final run is measured once more in a process that does nothing else.
    """

    name: str
    rungs: tuple[tuple[int, float], ...]
    seeds: int
    around_default: float | None = None
    extensions: int = 0
    curve_seeds: int = 1
    own_process: bool = False
    search_rows: int = 512


#: a rate below the default, one three times as high above it, and, beyond the better of them, further ones
QUICK = Preset("quick", rungs=((2, 1 / 8),), seeds=1, around_default=3.0, extensions=3, search_rows=64)
#: in all 1.5 final runs of search: 8/16 + 4/8 + 2/4
DEFAULT = Preset("default", rungs=((8, 1 / 16), (4, 1 / 8), (2, 1 / 4)), seeds=3, extensions=3)
#: in all 3 final runs of search: 8/8 + 4/4 + 2/2
THOROUGH = Preset(
    "thorough", rungs=((8, 1 / 8), (4, 1 / 4), (2, 1 / 2)), seeds=5, extensions=4, curve_seeds=3, own_process=True
)
PRESETS = {preset.name: preset for preset in (QUICK, DEFAULT, THOROUGH)}


@dataclass(frozen=True)
class Schedule:
    """What is run for each arm.

    Attributes:
        rungs: of the search, each (rates, steps); none where the learning rate is given.
        seeds: of the final runs.
        curve: of the data curve, each (rows, steps); the point with all `rows` is a final run.
        curve_seeds: of each point of the curve.
        target_tokens_per_step: on average over the training rows.
    """

    preset: Preset
    rungs: tuple[tuple[int, int], ...]
    seeds: tuple[int, ...]
    rows: int
    final_steps: int
    curve: tuple[tuple[int, int], ...]
    curve_seeds: tuple[int, ...]
    target_tokens_per_step: float
    learning_rate: float | None

    @classmethod
    def of(
        cls, preset: Preset, settings: TrainingConfig, rows: int, target_tokens: int, *, seeds: int | None = None,
        fractions: Sequence[float] = (),
    ) -> Schedule:  # fmt: skip
        """From a preset and the data: `rows` training rows with `target_tokens` in all."""
        per_step = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
        final = total_steps(rows, settings, 1)
        every = tuple(range(settings.seed, settings.seed + (preset.seeds if seeds is None else seeds)))
        counts = planned_rows(fractions, rows)
        return cls(
            preset=preset,
            rungs=() if settings.learning_rate is not None else _rungs(preset, final),
            seeds=every,
            rows=rows,
            final_steps=final,
            curve=tuple((n, final if n == rows else min(final, CURVE_EPOCHS * -(-n // per_step))) for n in counts),
            curve_seeds=every[: preset.curve_seeds],
            target_tokens_per_step=target_tokens / rows * per_step,
            learning_rate=settings.learning_rate,
        )

    @property
    def planned_trials(self) -> tuple[tuple[int, int], ...]:
        """(trials, steps) of the search. Of two rates the better one always lies on an edge: one more follows."""
        sure = 1 if self.rungs and self.rungs[-1][0] == 2 == self.rungs[0][0] and self.preset.extensions else 0
        return (*self.rungs[:-1], (self.rungs[-1][0] + sure, self.rungs[-1][1])) if self.rungs else ()

    def pieces(self, arm: str) -> list[tuple[str, int]]:
        """(arm, steps) of every run of an arm."""
        search = [steps for count, steps in self.planned_trials for _ in range(count)]
        curve = [steps for count, steps in self.curve if count < self.rows for _ in self.curve_seeds]
        return [(arm, steps) for steps in (*search, *[self.final_steps] * len(self.seeds), *curve)]

    def record(self, valid_rows: int) -> results.Preset:
        """The budget of each method, for `comparison.json`."""
        tokens = self.target_tokens_per_step
        search = sum(count * steps for count, steps in self.planned_trials)
        return results.Preset(
            name=self.preset.name,
            seeds=list(self.seeds),
            rungs=[(count, steps / self.final_steps) for count, steps in self.planned_trials],
            fixed_learning_rate=self.learning_rate,
            final_steps=self.final_steps,
            final_target_tokens=round(self.final_steps * tokens),
            search_target_tokens=round(search * tokens),
            curve=list(self.curve),
            search_valid_rows=min(self.preset.search_rows, valid_rows),
            covers_training_noise=len(self.seeds) > 1,
            memory_in_own_process=self.preset.own_process,
        )


def _rungs(preset: Preset, final_steps: int) -> tuple[tuple[int, int], ...]:
    """(rates, steps) of a preset's search. Where a run is so short that two rungs come to the same steps, the second
    would only repeat the first, and is left out."""
    rungs: list[tuple[int, int]] = []
    for count, share in preset.rungs:
        steps = max(1, round(share * final_steps))
        if not rungs or steps > rungs[-1][1]:
            rungs.append((count, steps))
    return tuple(rungs)


def planned_rows(fractions: Sequence[float], total: int) -> list[int]:
    """Row counts of a data curve: shares of all rows where at most 1, else counts; rising, each once.

    Raises:
        ConfigError: a count above the number of rows.
    """
    counts = {max(1, round(fraction * total)) if fraction <= 1 else int(fraction) for fraction in fractions}
    if above := sorted(count for count in counts if count > total):
        wrong = ", ".join(f"{count:,}" for count in above)
        raise ConfigError(f"fractions {wrong}: there are {total:,} training rows; 1 is all of them")
    return sorted(counts)
