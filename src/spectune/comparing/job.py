"""The parts of every run of a comparison: attach, train, and the settings and the key that a run has."""

import contextlib
import functools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectune.blocks.recompute import Recomputation
from spectune.comparing.arms import Arm
from spectune.comparing.budget import Budget
from spectune.comparing.conditions import FILE, RecordedConditions, run_key
from spectune.comparing.inputs import Inputs
from spectune.comparing.schedule import Schedule
from spectune.data import DataReport, Encoded, Labels
from spectune.deltas import BaseFacts, BaseRate, Delta, attach, attached, detach
from spectune.errors import SpectuneError
from spectune.evaluation import KeptLogits, Questions, RowLosses
from spectune.families import embedding_width, vocabulary_rows
from spectune.files.plain_console import PlainConsole, print_line
from spectune.phases import Phases
from spectune.planning.device_memory import free_memory
from spectune.planning.estimate import Estimate
from spectune.results import RunResult
from spectune.results import comparison_file as results
from spectune.results.comparison_file import Failure
from spectune.training import TrainingConfig, train
from spectune.training.company import worth_sharing
from spectune.training.display import Display, Heartbeat
from spectune.training.distribution import World
from spectune.training.observer import Observer
from spectune.training.prediction import Predictions, check_memory, predict
from spectune.training.prepare import prepare

QUIET = Console(quiet=True)
#: bytes of the bare base's logits that are kept for forgetting
MOST_KEPT = 2 * 2**30
#: in the folder of a run, or of a search, that failed
FAILED = "failed.json"


class FailureNote(Failure):
    """What is noted in the folder of a run that failed until it has succeeded. `given_up`: nothing more of its arm was
    tried."""

    given_up: bool = False


@dataclass
class Job:
    """What all runs share.

    Attributes:
        track: the task type, where others of the comparison learn something else and were begun before; else "".
        labels: what the models' head says; None of language models.
        config: of every run but for its rate, steps and seed.
        passages: token ids of the text on which forgetting is measured.
        origin: entries for each run's config.yaml.
        console: where final runs show their progress.
        phases: where the time goes that is no arm's own: each run records its own.
        loaded: how the base was, as `spectune.load` takes it.
        together: runs that share passes, at most; "auto" as many as gain from it; None trains each by itself.
        plans: of each arm how many runs gain from a pass with one of its own, and the plan of such a run.
        ahead: of final runs that were trained before their turn, by folder: why they failed, or the loss of each
            validation row.
    """

    folder: Path
    track: str
    labels: Labels | None
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    arms: Sequence[Arm]
    config: TrainingConfig
    inputs: Inputs
    passages: list[list[int]]
    schedule: Schedule
    origin: Mapping[str, Any] | None
    console: Console | None
    phases: Phases = field(default_factory=Phases)
    conditions: RecordedConditions = field(default_factory=RecordedConditions)
    loaded: Mapping[str, Any] = field(default_factory=dict)
    together: int | str | None = None
    predictions: Predictions = field(default_factory=Predictions, init=False)
    base_passages: KeptLogits = field(default_factory=lambda: KeptLogits(_room()), init=False)
    base_facts: BaseFacts = field(default_factory=BaseFacts, init=False)
    budget: Budget = field(default_factory=lambda: Budget([]), init=False)
    heartbeat: Heartbeat = field(default_factory=Heartbeat, init=False)
    recomputation: dict[str, Recomputation] = field(default_factory=dict, init=False)
    plans: dict[str, tuple[int, Estimate | None]] = field(default_factory=dict, init=False)
    ahead: dict[Path, RowLosses | SpectuneError | None] = field(default_factory=dict, init=False)

    @property
    def base(self) -> results.Base:
        """What is known of the bare base; of a head's the untrained one."""
        return self.conditions.other_bases[self.track] if self.track else self.conditions.base

    @functools.cached_property
    def questions(self) -> Questions:
        """What every model is judged on."""
        return Questions(self.inputs.task, self.tokenizer, vocabulary_rows(self.model))

    def check_memory(self, arm: Arm) -> None:
        """Raise DoesNotFitError where the plan says that an arm's longest batch does not fit; and keep what its runs
        have to recompute, so that those of the search, which have other rows, need no plan of their own."""
        config = self.config_of(self.rates(arm).rate, self.schedule.final_steps, self.config.seed)
        with self.attached(arm, config.seed, self.phases) as delta, self.phases.of("plan"):
            base, rows = delta.base_fingerprint, self.inputs
            prepared = prepare(self.model, self.tokenizer, arm.method, rows.train, rows.valid, config, base)
            predicted = predict(delta, prepared, World(), self.predictions)
            check_memory(predicted, delta, config.memory_check)
        self.recomputation[arm.name] = predicted.execution.recomputation
        self.plans[arm.name] = worth_sharing(delta, prepared), predicted.estimate

    def record_time(self) -> None:
        """Write where the time went that is no arm's own."""
        self.conditions.seconds_by_phase = self.phases.record()
        self.conditions.write(self.folder / FILE)

    def rates(self, arm: Arm) -> BaseRate:
        """The default learning rate of an arm on this base, and where a search begins."""
        return arm.method.learning_rates.at(embedding_width(self.model))

    def key(self, arm: Arm, rate: float, steps: int, seed: int, rows: int | None = None) -> str:
        return run_key(self.conditions.identity, arm.settings, rate, steps, seed, rows)

    def config_of(self, rate: float, steps: int, seed: int, **more: Any) -> TrainingConfig:
        fixed = {"learning_rate": rate, "max_steps": steps, "seed": seed, "output_dir": None, "resume": False}
        if self.config.warmup_steps >= 1 and steps < self.schedule.final_steps:
            # steps of a final run: a trial warms up for the same share of its own, else it would never reach its rate
            fixed["warmup_steps"] = max(1, round(self.config.warmup_steps * steps / self.schedule.final_steps))
        return self.config.model_copy(update={**fixed, **more})

    def run(
        self, delta: Delta, config: TrainingConfig, rows: Encoded, valid: Encoded, observer: Observer, trying: str = "",
        rehearsed: TrainingConfig | None = None,
    ) -> RunResult:  # fmt: skip
        """Train an attached delta, or take what was trained ahead of its turn.

        Args:
            trying: what a short run is for, of which nothing is shown but how far it is.
            rehearsed: the settings of the run whose memory and speed a short one measures.
        """
        quiet = trying or config.output_dir in self.ahead
        observer.display = observer.display or self._display(delta, config, trying)
        observer.memory = not trying or rehearsed is not None
        return train(
            self.model, self.tokenizer, delta, rows, valid, config, origin=self.origin,
            console=QUIET if quiet else self.console, base_valid_loss=self.base.valid_loss,
            predictions=self.predictions, rehearsed=rehearsed, observer=observer,
        )  # fmt: skip

    def _display(self, delta: Delta, config: TrainingConfig, trying: str) -> Display:
        name, steps = delta.name, config.max_steps
        label = f"{self.label_of(name)}, {trying or f'seed {config.seed}'}"
        return Display(
            self.console or PlainConsole(), label, steps, 0, heartbeat=self.heartbeat, says=not trying,
            behind=lambda: self.budget.seconds_behind(name, steps),
        )  # fmt: skip

    def label_of(self, name: str) -> str:
        """What the arm of that name is called."""
        return next(arm.label for arm in self.arms if arm.name == name)

    def print(self, line: str) -> None:
        print_line(self.console or PlainConsole(), line)

    def planned(self, arm: Arm, config: TrainingConfig) -> TrainingConfig:
        """The config of a short run, which is executed as the arm's final runs were planned, and not planned again."""
        if arm.name not in self.recomputation:
            return config
        known = {"memory_check": "off", "gradient_checkpointing": self.recomputation[arm.name]}
        return config.model_copy(update=known)

    @contextlib.contextmanager
    def attached(self, arm: Arm, seed: int, phases: Phases) -> Iterator[Delta]:
        """An arm's delta on the base, inside a `with`; after it the base is bare again, come what may."""
        with self.bare_after():
            yield self.attach(arm, seed, phases)

    def attach(self, arm: Arm, seed: int, phases: Phases, suffix: str = "") -> Delta:
        """An arm's delta on the base, called as the arm is and `suffix`."""
        keep = arm.method.trains_base
        with phases.of("prove"):
            how: dict[str, Any] = {"tokenizer": self.tokenizer, "seed": seed, "keep_base": keep}
            return attach(self.model, arm.method, arm.name + suffix, **how, facts=self.base_facts)

    @contextlib.contextmanager
    def bare_after(self) -> Iterator[None]:
        """After the `with` nothing is attached to the base."""
        try:
            yield
        finally:
            for name in list(attached(self.model)):
                detach(self.model, name)


def _room() -> int:
    """Bytes of host memory that the bare base's logits may take: a small part of what is free."""
    return min(MOST_KEPT, (free_memory("cpu") or 0) // 8)


def subset(rows: Encoded, count: int, seed: int) -> Encoded:
    """`count` rows of a seeded order, all where there are no more; a smaller subset lies in every larger one."""
    if count >= len(rows.examples):
        return rows
    order = list(range(len(rows.examples)))
    random.Random(seed).shuffle(order)
    return Encoded([rows.examples[i] for i in order[:count]], DataReport(rows=count, kept=count))
