"""What `comparison.json` holds. Files of earlier versions are read too; unknown keys of later ones are kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from spectune.errors import DataError
from spectune.files.metadata import read_json, record_of
from spectune.results.recommendation import Recommendation
from spectune.results.record import Count, Measure, Record, Seconds
from spectune.results.run_result import RunRecord, TrainSource
from spectune.results.verdict_record import Verdict

FILE = "comparison.json"
#: raised when a reader of this version would misunderstand the file; one without a version is of the first
FORMAT_VERSION = 1
_AGAIN = "`spectune report` makes it anew from the comparison's runs"


class Base(Record):
    """The base that all methods adapt. `judged_loss` and `metrics` are the bare base's on the judged rows;
    `judged_loss_by_source` is empty where those are of one source."""

    name: str = ""
    total_parameters: Count | None = None
    device: str = ""
    dtype: str = ""
    precision: str | None = None
    judged_loss: Measure | None = None
    judged_loss_by_source: dict[str, Measure | None] = Field(default_factory=dict)
    metrics: dict[str, Measure | None] = Field(default_factory=dict)
    valid_loss: Measure | None = None
    decode_tokens_per_second: Measure | None = None


class Data(Record):
    """The rows. `held_out`: the share of the training rows that validates, None where rows for that were given.
    `sources` and `mixture`, the same as a sentence: where the training rows are of several sources. `loss_unit`: of the
    losses. `decided_by`: what the arms are ordered by, a metric where their losses are of different things."""

    train_rows: Count = 0
    train_examples: Count | None = None
    valid_rows: Count = 0
    held_out: Measure | None = None
    judged_on: str = "valid"
    judged_rows: Count | None = None
    generated_rows: Count | None = None
    higher_is_better: dict[str, bool] = Field(default_factory=dict)
    task: str | None = None
    retained_passages: Count | None = None
    retained_tokens: Count | None = None
    retained_from: str = ""
    target_tokens_per_step: Measure | None = None
    sources: dict[str, TrainSource] = Field(default_factory=dict)
    mixture: str = ""
    loss_unit: str = "nats per target token"
    decided_by: str = "judged_loss"


class Share(Record):
    """Trained weights of a method on some model; None where it cannot be said."""

    parameters: Count | None = None
    share: Measure | None = None


class Scale(Record):
    """The share of the weights that each method trains on a model of known size."""

    model: str = ""
    total_parameters: Count | None = None
    shares: dict[str, Share] = Field(default_factory=dict)


class Preset(Record):
    """The budget of each method. `rungs`: of the search, each (rates, share of the final steps); `curve`: (rows, steps)
    of each point."""

    name: str = ""
    seeds: list[int] = Field(default_factory=list)
    rungs: list[tuple[Count, Measure]] = Field(default_factory=list)
    fixed_learning_rate: Measure | None = None
    final_steps: Count | None = None
    final_target_tokens: Count | None = None
    search_target_tokens: Count | None = None
    total_target_tokens: Count | None = None
    curve: list[tuple[Count, Count]] = Field(default_factory=list)
    search_valid_rows: Count | None = None
    covers_training_noise: bool = False
    memory_in_own_process: bool = False


class Entry(Record):
    """Something of one arm. In files from before arms had names, the method's name is the arm's."""

    name: str = ""
    method: str = ""
    label: str = ""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, content: Any) -> Any:
        if isinstance(content, dict) and content.get("method") and not content.get("name"):
            return {**content, "name": content["method"]}
        return content


class Arm(Entry):
    """One method with its settings; the parameter counts are None until a run of it has ended. `seconds_by_phase`: of
    all its runs together, those of the search too. `task_type`: what it learns of the rows."""

    best_for: str = ""
    task_type: str = "CAUSAL_LM"
    settings: dict[str, Any] = Field(default_factory=dict)
    stored_parameters: Count | None = None
    trainable_parameters: Count | None = None
    seconds_by_phase: dict[str, Seconds] = Field(default_factory=dict)


class Failure(Entry):
    """A run that failed, or where there is no seed, a search."""

    seed: int | None = None
    learning_rate: Measure | None = None
    reason: str = ""


class Missing(Record):
    """A final run that has not been made yet."""

    name: str
    seed: int


class Trial(Record):
    """One short run of a search. `valid_loss` is None where it diverged, with the reason; an extension was tried
    because the best rate lay on the edge."""

    learning_rate: Measure = 0.0
    steps: Count = 0
    target_tokens: Count = 0
    valid_loss: Measure | None = None
    reason: str | None = None
    extension: bool = False
    seconds_by_phase: dict[str, Seconds] = Field(default_factory=dict)

    @property
    def rank(self) -> float:
        return math.inf if self.valid_loss is None else self.valid_loss


class Search(Record):
    """A search for a learning rate.

    Attributes:
        source: where the range comes from.
        trials: in the order in which they were run.
        best: the rate of the lowest loss in the last rung; None where all trials diverged.
        edge: "low" or "high" where no rate beyond the best one was tried.
        range: the lowest and the highest rate that was tried.
        sentence: the search in words.
    """

    source: str = ""
    trials: list[Trial] = Field(default_factory=list)
    best: Measure | None = None
    edge: str | None = None
    range: tuple[Measure, Measure] | None = None
    sentence: str = ""


class CurvePoint(Record):
    """A run on some of the rows: a point of a data curve."""

    name: str = ""
    rows: Count = 0
    method: str = ""
    seed: int | None = None
    learning_rate: Measure | None = None
    steps: Count | None = None
    valid_loss: Measure | None = None
    last_valid_loss: Measure | None = None
    train_loss: Measure | None = None
    base_valid_loss: Measure | None = None
    seconds_by_phase: dict[str, Seconds] = Field(default_factory=dict)


class Decoding(Record):
    """Decoded tokens a second over all rows of a batch, and overheads as shares of the bare base's time: medians over
    rounds, `_range` are quartiles. None where there is no merged model."""

    tuned: Measure | None = None
    merged: Measure | None = None
    base: Measure | None = None
    overhead: Measure | None = None
    overhead_range: tuple[Measure, Measure] | None = None
    overhead_merged: Measure | None = None
    overhead_merged_range: tuple[Measure, Measure] | None = None


class ComparedRun(RunRecord, Entry):
    """A final run that ended, with what its method is called. `decode`: by batch size."""

    decode: dict[str, Decoding] | None = None
    best_for: str = ""

    @property
    def place(self) -> str:
        """What proves its numbers: a path within the comparison's folder where that is known."""
        return self.rows_file or self.folder or f"runs/{self.name}"


class Conditions(Record):
    """What all runs of a comparison share. `seconds_by_phase`: what was no arm's own, such as loading the base.
    `other_bases`: by task type, the base with an untrained head, where other arms learn text."""

    base: Base = Field(default_factory=Base)
    other_bases: dict[str, Base] = Field(default_factory=dict)
    data: Data = Field(default_factory=Data)
    settings: dict[str, Any] = Field(default_factory=dict)
    environment: dict[str, Any] = Field(default_factory=dict)
    scale: list[Scale] = Field(default_factory=list)
    preset: Preset = Field(default_factory=Preset)
    arms: list[Arm] = Field(default_factory=list)
    seconds_by_phase: dict[str, Seconds] = Field(default_factory=dict)


class ComparisonResult(Conditions):
    """The content of `comparison.json`.

    Attributes:
        searches: of the learning rate, by arm.
        runs: final runs that ended.
        curves: points of the data curve.
        missing: final runs of a comparison that was interrupted.
        command: of files that have it, the command line that made them.
        changed: a line for each file that was changed or damaged after it was written, and is shown as it is.
    """

    format_version: int = 1
    searches: dict[str, Search] = Field(default_factory=dict)
    runs: list[ComparedRun] = Field(default_factory=list)
    curves: list[CurvePoint] = Field(default_factory=list)
    failed: list[Failure] = Field(default_factory=list)
    missing: list[Missing] = Field(default_factory=list)
    verdict: Verdict | None = None
    recommendation: Recommendation | None = None
    command: list[str] | str | None = None
    changed: list[str] = Field(default_factory=list)

    @property
    def decided_by_loss(self) -> bool:
        return self.data.decided_by == "judged_loss"

    @property
    def has_text(self) -> bool:
        """Whether some arm is a language model; else all have heads, which write no text."""
        return not self.arms or any(arm.task_type == "CAUSAL_LM" for arm in self.arms)

    @property
    def runs_by_arm(self) -> dict[str, list[ComparedRun]]:
        """The runs that ended, by the name of their arm, seeds in order."""
        found: dict[str, list[ComparedRun]] = {}
        for run in self.runs:
            if run.name:
                found.setdefault(run.name, []).append(run)
        return {name: sorted(runs, key=lambda run: run.seed or 0) for name, runs in found.items()}

    @property
    def labels(self) -> dict[str, str]:
        """The label of each arm; two arms with the same one are told apart by their names."""
        entries: list[Entry] = [*self.arms, *self.runs, *self.failed]
        given = {entry.name: entry.label.strip() or entry.name for entry in reversed(entries)}
        first: dict[str, str] = {}
        for entry in entries:
            first.setdefault(given[entry.name], entry.name)
        names = dict.fromkeys(entry.name for entry in entries)
        return {name: given[name] if first[given[name]] == name else f"{given[name]} ({name})" for name in names}

    def label_of(self, arm: str) -> str:
        return self.labels.get(arm, arm)

    def save(self, folder: Path) -> None:
        """Write `comparison.json`, atomically; a number that is not finite becomes null."""
        self.write(folder / FILE)

    @classmethod
    def load(cls, folder: Path, *, warn: Callable[[str], None] | None = None) -> ComparisonResult:
        """The comparison in a folder.

        Args:
            warn: is told where the file was changed after it was written; by default that is an error.

        Raises:
            DataError: there is none, or it is damaged, or of a later version of spectune than this one can read.
        """
        path, what = folder / FILE, "a comparison"
        content = read_json(path, what=what, again=_AGAIN)
        if content is None:
            raise DataError(f"{path} cannot be read as a comparison: there is no such file")
        version = content.get("format_version", 1)
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise DataError(
                f"{path} has format_version {version}, and this version of spectune reads up to {FORMAT_VERSION}: "
                "install a newer one"
            )
        return record_of(content, path, cls, what=what, again=_AGAIN, warn=warn)
