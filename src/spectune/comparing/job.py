"""The runs of a comparison: trials of the search, final runs, runs on fewer rows. Each is taken from its folder where
an earlier call has finished it."""

from __future__ import annotations

import contextlib
import json
import math
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectune.comparing.conditions import curve_place, final_place, run_key
from spectune.comparing.isolated import train_memory_in_own_process
from spectune.comparing.measure import forgetting, measure
from spectune.comparing.schedule import SEARCH_ROWS
from spectune.comparing.search import Trial
from spectune.data import DataReport, Encoded
from spectune.deltas import Delta, Method, attach, attached, detach
from spectune.errors import DataError, DivergedError
from spectune.evaluation import Task, corpus_metrics, judge, judged_loss, read_rows, write_rows
from spectune.families import base_precision
from spectune.files.strict_json import strict_json
from spectune.storage import atomic_write_text
from spectune.training import RunResult, TrainingConfig, train
from spectune.training.distribution import World
from spectune.training.prediction import Predictions, check_memory, predict
from spectune.training.prepare import prepare

#: a run on fewer rows is validated at so many points, and the best one counts
CURVE_VALIDATIONS = 5
#: trials draw weights and batches with seeds of their own: the rate is not chosen by the luck of a final run's seed
SEARCH_SEED = 10_000
#: in the folder of a run, or of a search, that failed
FAILED = "failed.json"
#: what a point of a data curve keeps of its run
POINT = (
    "method",
    "seed",
    "learning_rate",
    "steps",
    "valid_loss",
    "last_valid_loss",
    "train_loss",
    "base_valid_loss",
)
QUIET = Console(quiet=True)


@dataclass(frozen=True)
class Arm:
    """One method of a comparison, under the name of its runs."""

    name: str
    method: Method


@dataclass
class Job:
    """What all runs share.

    Attributes:
        identity: everything that a result depends on beside method, rate, steps, seed and rows.
        final_steps: of the final runs.
        own_process: the memory of final runs that are timed is measured once more in a process that does nothing else.
    """

    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: Encoded
    valid: Encoded
    task: Task
    judged_on: str
    passages: list[list[int]]
    config: TrainingConfig
    identity: Mapping[str, Any]
    base_valid_loss: float
    final_steps: int
    own_process: bool
    origin: Mapping[str, Any] | None
    console: Console | None
    search_valid: Encoded = field(init=False)
    predictions: Predictions = field(default_factory=Predictions, init=False)

    def __post_init__(self) -> None:
        self.search_valid = subset(self.valid, SEARCH_ROWS, self.config.seed)

    def check_memory(self, arm: Arm) -> None:
        """Raise DoesNotFitError where the plan says that an arm's longest batch does not fit."""
        config = self._config(arm.method.default_learning_rate, self.final_steps, self.config.seed)
        with self._attached(arm, config.seed) as delta:
            base = delta.base_fingerprint
            prepared = prepare(self.model, self.tokenizer, arm.method, self.train, self.valid, config, base)
            check_memory(predict(delta, prepared, World(), self.predictions), delta, config.memory_check)

    # -- search ---------------------------------------------------------------------------------------------------

    def trial(self, arm: Arm, rate: float, steps: int) -> tuple[Trial, float | None]:
        """One rate for so many steps, and the seconds it took; None where it lay in its folder already."""
        seed = self.config.seed + SEARCH_SEED
        label = f"{rate:g}-{steps}-{self._key(arm, rate, steps, seed)}"
        path = self.folder / "search" / arm.name / label / "result.json"
        if (done := _saved(path)) is not None and set(done) == {item.name for item in fields(Trial)}:
            return Trial(**done), None
        begin = time.perf_counter()
        config = self._config(rate, steps, seed, eval_steps=steps)
        reason, loss, targets = None, None, 0
        try:
            result = self._train(arm, config, self.train, self.search_valid)
            loss, targets = result.valid_loss, result.target_tokens
        except DivergedError as error:
            reason = str(error).split(". ", 1)[0]
        found = Trial(rate, steps, targets, loss, reason)
        atomic_write_text(path, strict_json(asdict(found)) + "\n")
        return found, time.perf_counter() - begin

    def calibrate(self, arm: Arm, steps: int = 2) -> float:
        """Seconds of a training step of this arm, of a run that is thrown away."""
        few = subset(self.valid, 1, 0)
        result = self._train(arm, self._config(1e-6, steps, self.config.seed, eval_steps=steps), self.train, few)
        return result.train_seconds / steps

    # -- final runs -----------------------------------------------------------------------------------------------

    def final_folder(self, arm: Arm, rate: float, steps: int, seed: int) -> Path:
        return self.folder / final_place(arm.name, seed, self._key(arm, rate, steps, seed))

    def final(self, arm: Arm, rate: float, steps: int, seed: int, *, timed: bool) -> tuple[RunResult, float | None]:
        """Train, or take what a finished run left, and measure what has not been measured; with `timed` decoding
        speeds as well, which do not depend on the seed. And the seconds it took; None where nothing was left to do."""
        folder = self.final_folder(arm, rate, steps, seed)
        if (done := _measured(folder)) is not None:
            return done, None
        begin = time.perf_counter()
        config = self._config(rate, steps, seed, output_dir=folder, resume=True)
        with self._attached(arm, seed) as delta:
            result = train(
                self.model,
                self.tokenizer,
                delta,
                self.train,
                self.valid,
                config,
                origin=self.origin,
                console=self.console,
                base_valid_loss=self.base_valid_loss,
                predictions=self.predictions,
            )
            (folder / FAILED).unlink(missing_ok=True)
            # memory is measured as the run had it: what "auto" came to here is no matter of choice there
            same = config.model_copy(update={"gradient_checkpointing": result.gradient_checkpointing or False})
            found = self._judged(folder) | self._costs(delta, folder, same, timed)
        key = folder.name.rsplit("-", 1)[-1]
        result = result.with_measured(
            {**found, "name": arm.name, "key": key, "retained_sha256": self.identity["passages_sha256"]}
        )
        result.save(folder / "result.json")
        return result, time.perf_counter() - begin

    def failed(
        self, folder: Path, arm: Arm, rate: float | None, seed: int | None, reason: str, *, given_up: bool
    ) -> None:
        """Note in `folder` that a run failed, and whether its arm was given up with it; the note stays there until the
        run has succeeded."""
        method = arm.method
        entry = {"name": arm.name, "method": method.name, "label": method.label, "seed": seed, "learning_rate": rate}
        atomic_write_text(folder / FAILED, strict_json({**entry, "reason": reason, "given_up": given_up}) + "\n")

    @property
    def base_rows(self) -> Path:
        return self.folder / "base" / "rows.jsonl"

    def judge_base(self) -> dict[str, Any]:
        """The bare base on the judged rows: its metrics; its rows go to base/."""
        judged = judge(self.model, self.tokenizer, self.task)
        write_rows(self.base_rows, judged)
        tokens = {"tokens": [len(passage) for passage in self.passages]}
        atomic_write_text(self.folder / "base" / "passages.json", json.dumps(tokens) + "\n")
        return {"judged_loss": judged_loss(judged), "metrics": corpus_metrics(judged)}

    # -- fewer rows -----------------------------------------------------------------------------------------------

    def on_fewer(self, arm: Arm, rate: float, rows: int, steps: int, seed: int) -> tuple[dict[str, Any], float | None]:
        """One point of a data curve, and its seconds: the first `rows` of a seeded order, so that each set holds the
        smaller ones."""
        path = self.folder / curve_place(arm.name, rows, seed, self._key(arm, rate, steps, seed, rows)) / "result.json"
        if (done := _saved(path)) is not None and {"name", *POINT} <= set(done):
            return done, None
        begin = time.perf_counter()
        config = self._config(rate, steps, seed, eval_steps=max(1, steps // CURVE_VALIDATIONS))
        result = self._train(arm, config, subset(self.train, rows, self.config.seed), self.valid)
        point = curve_point(result, arm.name, rows)
        atomic_write_text(path, strict_json(point) + "\n")
        return point, time.perf_counter() - begin

    # -- the parts of these ---------------------------------------------------------------------------------------

    def _key(self, arm: Arm, rate: float, steps: int, seed: int, rows: int | None = None) -> str:
        return run_key(self.identity, arm.method.model_dump(mode="json"), rate, steps, seed, rows)

    def _config(self, rate: float, steps: int, seed: int, **more: Any) -> TrainingConfig:
        fixed = {"learning_rate": rate, "max_steps": steps, "seed": seed, "output_dir": None, "resume": False}
        if self.config.warmup_steps >= 1 and steps < self.final_steps:
            # steps of a final run: a trial warms up for the same share of its own, else it would never reach its rate
            fixed["warmup_steps"] = max(1, round(self.config.warmup_steps * steps / self.final_steps))
        return self.config.model_copy(update={**fixed, **more})

    def _train(self, arm: Arm, config: TrainingConfig, rows: Encoded, valid: Encoded) -> RunResult:
        """A run that keeps nothing on disk."""
        with self._attached(arm, config.seed) as delta:
            return train(
                self.model,
                self.tokenizer,
                delta,
                rows,
                valid,
                config,
                console=QUIET,
                base_valid_loss=self.base_valid_loss,
                predictions=self.predictions,
            )

    @contextlib.contextmanager
    def _attached(self, arm: Arm, seed: int) -> Iterator[Delta]:
        """An arm's method attached to the base, inside a `with`; after it the base is bare again, come what may."""
        method = arm.method
        try:
            yield attach(
                self.model, method, arm.name, tokenizer=self.tokenizer, seed=seed, keep_base=method.trains_base
            )
        finally:
            for name in list(attached(self.model)):
                detach(self.model, name)

    def _judged(self, folder: Path) -> dict[str, Any]:
        """The attached delta on the judged rows."""
        begin = time.perf_counter()
        judged = judge(self.model, self.tokenizer, self.task)
        write_rows(folder / "rows.jsonl", judged)
        return {
            "judged_on": self.judged_on,
            "judged_loss": judged_loss(judged),
            "metrics": corpus_metrics(judged),
            "rows_file": str((folder / "rows.jsonl").relative_to(self.folder)),
            "evaluation_seconds": time.perf_counter() - begin,
        }

    def _costs(self, delta: Delta, folder: Path, config: TrainingConfig, timed: bool) -> dict[str, Any]:
        """Forgetting for every seed; speed, swapping and, where asked for, memory apart for one of them."""
        if not timed:
            return forgetting(self.model, self.passages)
        found = measure(self.model, self.tokenizer, delta, folder / "best", self.passages)
        if self.own_process:
            alone = train_memory_in_own_process(
                self.model.config._name_or_path,
                str(self.model.device),
                str(self.model.dtype).removeprefix("torch."),
                delta.method,
                config.model_copy(update={"output_dir": None, "resume": False}),
                self.train.rows,
                base_precision=base_precision(self.model),
            )
            found["peak_memory_bytes"] = {**found.get("peak_memory_bytes", {}), **alone}
        return found


def subset(rows: Encoded, count: int, seed: int) -> Encoded:
    """`count` rows of a seeded order, all where there are no more; a smaller subset lies in every larger one."""
    if count >= len(rows.examples):
        return rows
    order = list(range(len(rows.examples)))
    random.Random(seed).shuffle(order)
    return Encoded([rows.examples[i] for i in order[:count]], DataReport(rows=count, kept=count))


def curve_point(result: RunResult, arm: str, rows: int) -> dict[str, Any]:
    """A run as a point of a data curve."""
    return {"name": arm, "rows": rows, **{name: getattr(result, name) for name in POINT}}


def _saved(path: Path) -> dict[str, Any] | None:
    """The small result that an earlier call left; None where there is none, or a damaged one: it is made anew."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _measured(folder: Path) -> RunResult | None:
    """The result of a run that has been trained and measured; of a run whose rows are gone or damaged, None: they are
    made anew from its weights."""
    path = folder / "result.json"
    if not path.is_file():
        return None
    found = RunResult.load(path)
    try:
        loss = judged_loss(read_rows(folder / "rows.jsonl"))
    except DataError:
        return None
    whole = found.judged_loss is None or math.isclose(loss, found.judged_loss)
    return found if found.key is not None and whole else None
