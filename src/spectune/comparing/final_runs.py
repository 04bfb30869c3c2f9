"""Final runs: trained with their seeds, judged and measured. Each is taken from its folder where an earlier call has
finished it."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectune.comparing.conditions import final_place
from spectune.comparing.isolated import train_memory_in_own_process
from spectune.comparing.job import FAILED, Arm, Job
from spectune.comparing.measure import forgetting, measure
from spectune.deltas import Delta
from spectune.errors import DataError
from spectune.evaluation import Task, corpus_metrics, judge, judged_loss, read_rows, write_rows
from spectune.families import base_precision
from spectune.files.atomic import atomic_write_text
from spectune.results import RunResult
from spectune.training import TrainingConfig


@dataclass(frozen=True)
class FinalRuns:
    """What final runs are judged on and how they are measured.

    Attributes:
        judged_on: "valid" or "test".
        passages: token ids of the text on which forgetting is measured.
        own_process: the memory of runs that are timed is measured once more in a process that does nothing else.
    """

    job: Job
    task: Task
    judged_on: str
    passages: list[list[int]]
    own_process: bool

    def folder(self, arm: Arm, rate: float, seed: int) -> Path:
        key = self.job.key(arm, rate, self.job.final_steps, seed)
        return self.job.folder / final_place(arm.name, seed, key)

    def run(self, arm: Arm, rate: float, seed: int, *, timed: bool) -> tuple[RunResult, float | None]:
        """Train, or take what a finished run left, and measure what has not been measured; with `timed` decoding
        speeds as well, which do not depend on the seed. And the seconds it took; None where nothing was left to do."""
        job, folder = self.job, self.folder(arm, rate, seed)
        if (done := _measured(folder)) is not None:
            return done, None
        begin = time.perf_counter()
        config = job.config_of(rate, job.final_steps, seed, output_dir=folder, resume=True)
        with job.attached(arm, seed) as delta:
            result = job.run(delta, config, job.train, job.valid, job.console)
            (folder / FAILED).unlink(missing_ok=True)
            # memory is measured as the run had it: what "auto" came to here is no matter of choice there
            same = config.model_copy(update={"gradient_checkpointing": result.gradient_checkpointing or False})
            found = self._judged(folder) | self._costs(delta, folder, same, timed)
        key = folder.name.rsplit("-", 1)[-1]
        result = result.with_measured(
            {**found, "name": arm.name, "key": key, "retained_sha256": job.identity["passages_sha256"]}
        )
        result.save(folder / "result.json")
        return result, time.perf_counter() - begin

    @property
    def base_rows(self) -> Path:
        """The file of the bare base's judged rows."""
        return self.job.folder / "base" / "rows.jsonl"

    def judge_base(self) -> tuple[float, dict[str, float]]:
        """The bare base's loss and metrics on the judged rows; its rows go to base/."""
        judged = judge(self.job.model, self.job.tokenizer, self.task)
        write_rows(self.base_rows, judged)
        tokens = {"tokens": [len(passage) for passage in self.passages]}
        atomic_write_text(self.base_rows.with_name("passages.json"), json.dumps(tokens) + "\n")
        return judged_loss(judged), corpus_metrics(judged)

    def _judged(self, folder: Path) -> dict[str, Any]:
        """The attached delta on the judged rows."""
        begin = time.perf_counter()
        judged = judge(self.job.model, self.job.tokenizer, self.task)
        write_rows(folder / "rows.jsonl", judged)
        return {
            "judged_on": self.judged_on,
            "judged_loss": judged_loss(judged),
            "metrics": corpus_metrics(judged),
            "rows_file": str((folder / "rows.jsonl").relative_to(self.job.folder)),
            "evaluation_seconds": time.perf_counter() - begin,
        }

    def _costs(self, delta: Delta, folder: Path, config: TrainingConfig, timed: bool) -> dict[str, Any]:
        """Forgetting for every seed; speed, swapping and, where asked for, memory apart for one of them."""
        model = self.job.model
        if not timed:
            return forgetting(model, self.passages)
        found = measure(model, self.job.tokenizer, delta, folder / "best", self.passages)
        if self.own_process:
            alone = train_memory_in_own_process(
                model.config._name_or_path,
                str(model.device),
                str(model.dtype).removeprefix("torch."),
                delta.method,
                config.model_copy(update={"output_dir": None, "resume": False}),
                self.job.train.rows,
                base_precision=base_precision(model),
            )
            found["peak_memory_bytes"] = {**found.get("peak_memory_bytes", {}), **alone}
        return found


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
