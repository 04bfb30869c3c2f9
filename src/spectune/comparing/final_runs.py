"""Final runs: trained with their seeds, judged and measured. Each is taken from its folder where an earlier call has
finished it."""

import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spectune.comparing.arms import Arm
from spectune.comparing.conditions import final_place
from spectune.comparing.intact import PASSAGES_FILE, base_folder, rows_as_written
from spectune.comparing.isolated import memory_job, train_memory_in_own_process
from spectune.comparing.job import FAILED, Job
from spectune.comparing.measure import forgetting, measure, measure_loading
from spectune.comparing.short_runs import by_itself
from spectune.data import pad_token_id
from spectune.deltas import Delta
from spectune.errors import DataError, SpectuneError
from spectune.evaluation import corpus_metrics, judge, judged_loss, loss_by_source, read_rows, row_losses, write_rows
from spectune.families import base_precision, vocabulary_rows
from spectune.files.atomic import atomic_write_text
from spectune.files.metadata import sealed
from spectune.files.strict_json import strict_json
from spectune.phases import Phases
from spectune.results import RunResult
from spectune.results.vouched import digests_of_run
from spectune.training import TrainingConfig
from spectune.training.finished import RESULT_FILE, ROWS_FILE
from spectune.training.observer import Observer

log = logging.getLogger("spectune")


def final_folder(job: Job, arm: Arm, rate: float, seed: int) -> Path:
    """Where the final run of a seed lies."""
    return job.folder / final_place(arm.name, seed, job.key(arm, rate, job.schedule.final_steps, seed))


def final_config(job: Job, arm: Arm, rate: float, seed: int) -> TrainingConfig:
    """Its settings."""
    folder = final_folder(job, arm, rate, seed)
    return job.config_of(rate, job.schedule.final_steps, seed, output_dir=folder, resume=True)


def final_run(job: Job, arm: Arm, rate: float, seed: int, *, timed: bool) -> tuple[RunResult, float | None]:
    """Train, or take what a finished run left, and measure what has not been measured; with `timed` decoding
    speeds as well, which do not depend on the seed. And the seconds it took; None where nothing was left to do."""
    folder = final_folder(job, arm, rate, seed)
    if (done := _with_rows(folder)) is not None:
        return done, None
    if isinstance(failed := job.ahead.get(folder), SpectuneError):
        raise failed
    begin, config = time.perf_counter(), final_config(job, arm, rate, seed)
    with job.phases.apart() as phases:
        with job.attached(arm, seed, phases) as delta:
            observer = Observer(phases)
            result = job.run(delta, config, job.inputs.train, job.inputs.valid, observer)
            if not isinstance(losses := job.ahead.get(folder), SpectuneError | None):
                observer.losses = losses
            rows = len(job.inputs.task.rows)
            job.print(f"{arm.label}, seed {seed}: trained; now judged on {rows:,} rows and measured")
            (folder / FAILED).unlink(missing_ok=True)
            # memory is measured as the run was: what "auto" chose here is not chosen again there
            same = config.model_copy(update={"gradient_checkpointing": result.gradient_checkpointing or False})
            found = _judged(job, folder, observer) | _costs(job, delta, folder, same, phases, timed)
        if result.shared:
            result = _without_shared(result)
            if timed:
                found = _and_also(found, phases.call("costs", by_itself, job, arm, same))
        key, passages = folder.name.rsplit("-", 1)[-1], job.conditions.identity["passages_sha256"]
        found |= {"name": arm.name, "key": key, "retained_sha256": passages, "seconds_by_phase": phases.record()}
        result = result.with_measured(found)
        result.save(folder / RESULT_FILE, digests_of_run(folder))
    return result, time.perf_counter() - begin


def _without_shared(result: RunResult) -> RunResult:
    """The result of a run that shared passes, without the peaks and the load that were those of all their runs."""
    return result.model_copy(update={"peak_memory_bytes": {}, "machine_load": {}})


def _and_also(found: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Both, peaks and loads together; where both have one, that of `found`."""
    both = {key: {**more[key], **found.get(key, {})} for key in ("peak_memory_bytes", "machine_load")}
    return {**more, **found, **both}


def base_rows(job: Job) -> Path:
    """The file of the bare base's judged rows."""
    return job.folder / base_folder(job.track) / ROWS_FILE


def base_passages(job: Job) -> Path:
    """The file of the lengths of the passages that forgetting is measured on."""
    return base_rows(job).with_name(PASSAGES_FILE)


def judge_base(job: Job) -> None:
    """Put the bare base's loss and metrics on the judged rows into the job's conditions; its rows go to base/."""
    judged = judge(job.model, job.tokenizer, job.inputs.task, questions=job.questions, phases=job.phases)
    write_rows(base_rows(job), judged)
    tokens = {"tokens": [len(passage) for passage in job.passages]}
    atomic_write_text(base_passages(job), strict_json(sealed(tokens), indent=None) + "\n")
    base = job.base
    base.judged_loss, base.metrics = judged_loss(judged), {**corpus_metrics(judged)}
    base.judged_loss_by_source = {**loss_by_source(judged)}


def valid_loss_of_base(job: Job) -> float:
    """The bare base's loss on the validation rows."""
    pad = pad_token_id(job.tokenizer, vocabulary_rows(job.model))
    with job.phases.of("validation"):
        losses = row_losses(job.model, job.inputs.valid.examples, pad, job.config.per_device_eval_batch_size)
    return losses.mean_per_token


def _judged(job: Job, folder: Path, observer: Observer) -> dict[str, Any]:
    """The attached delta on the judged rows."""
    seen = observer.losses if job.inputs.rows.test is None else None  # else validated on other rows
    begin = time.perf_counter()
    judged = judge(
        job.model, job.tokenizer, job.inputs.task, questions=job.questions, phases=observer.phases, losses=seen
    )
    write_rows(folder / ROWS_FILE, judged)
    return {
        "judged_on": job.inputs.rows.judged_on,
        "judged_loss": judged_loss(judged),
        "judged_loss_by_source": loss_by_source(judged),
        "metrics": corpus_metrics(judged),
        "rows_file": str((folder / ROWS_FILE).relative_to(job.folder)),
        "evaluation_seconds": time.perf_counter() - begin,
    }


def _costs(job: Job, delta: Delta, folder: Path, config: TrainingConfig, phases: Phases, timed: bool) -> dict[str, Any]:
    """Forgetting for every seed (it is of a vocabulary: not with a head); for one of them (`timed`) speed, swapping
    and, with the preset's `own_process`, memory in a process of its own."""
    found: dict[str, Any] = {}
    if job.labels is None:
        with phases.of("forget"):
            found = forgetting(job.model, job.passages, job.base_passages)
    if timed:
        with phases.of("costs"):
            found |= _timed_costs(job, delta, folder, config)
    return found


def _timed_costs(job: Job, delta: Delta, folder: Path, config: TrainingConfig) -> dict[str, Any]:
    if job.labels is None:
        found = measure(job.model, job.tokenizer, delta, folder / "best")
    else:
        found = measure_loading(job.model, delta, folder / "best")
    if job.schedule.preset.own_process:
        model, precision = job.model, base_precision(job.model)
        base = {
            "name": model.config._name_or_path, "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."), "base_precision": precision,
            **{key: job.loaded[key] for key in ("trust_remote_code", "allow_missing_weights") if key in job.loaded},
        }  # fmt: skip
        same = memory_job(base, delta.method, config, job.inputs.train.rows, labels=job.labels)
        found["peak_memory_bytes"] = {**found.get("peak_memory_bytes", {}), **train_memory_in_own_process(same)}
    return found


def measured(folder: Path, warn: Callable[[str], None] | None = None) -> RunResult | None:
    """The result of a run that has been trained and measured. `warn`: see `RunResult.load`. Raises DataError where it
    is damaged."""
    path = folder / RESULT_FILE
    found = RunResult.load(path, warn=warn) if os.path.lexists(path) else None
    return None if found is None or found.key is None else found


def _with_rows(folder: Path) -> RunResult | None:
    """The same; None, too, for a run whose rows are gone or damaged: they are made anew from its weights."""
    found = measured(folder)
    if found is None:
        return None
    try:
        loss = judged_loss(read_rows(folder / ROWS_FILE))
    except DataError:
        return None
    if not rows_as_written(folder):
        log.warning("%s is not as it was written: its rows are judged again", folder / ROWS_FILE)
        return None
    return found if found.judged_loss is None or math.isclose(loss, found.judged_loss) else None
