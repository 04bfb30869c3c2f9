"""The beginning of a run: a delta on the base, rows, a plan, a folder; at its start or where it left off."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectune.blocks.execution import Execution
from spectune.data import mixture
from spectune.deltas import Delta, Method, attach, attached
from spectune.errors import ConfigError
from spectune.files.plain_console import print_line
from spectune.results.run_result import RunResult
from spectune.training.config import TrainingConfig
from spectune.training.decisions import check_graphs
from spectune.training.distribution import World
from spectune.training.finished import check_finished
from spectune.training.identity import check_alike, check_identity, read_identity
from spectune.training.machine import environment
from spectune.training.observer import Observer
from spectune.training.prediction import Prediction, Predictions, check_memory, predict
from spectune.training.prepare import Prepared, prepare
from spectune.training.restoring import check_same_step, newest_whole
from spectune.training.run_folder import RunFolder, check_folder, load_end
from spectune.training.run_state import RunState, trained_parameters


@dataclass(frozen=True)
class Asked:
    """What is asked of a run beside a method and rows; see `spectune.train`."""

    config: TrainingConfig = field(default_factory=TrainingConfig)
    name: str = "default"
    origin: Mapping[str, Any] = field(default_factory=dict)
    base_valid_loss: float | None = None
    predictions: Predictions | None = None
    rehearsed: TrainingConfig | None = None
    observer: Observer = field(default_factory=Observer)


@dataclass(frozen=True)
class Started:
    """A run that may take its first step, or its next."""

    asked: Asked
    prepared: Prepared
    predicted: Prediction
    run: RunState
    folder: RunFolder

    def begin(self, out: Console) -> None:
        """Say what is trained, and write what is known before training; until then nothing is written."""
        execution, phases = self.predicted.execution, self.asked.observer.phases
        machine = {**environment(), **execution.settings()}
        phases.call("save", self.folder.begin, self.prepared.encoded, machine, self.asked.origin)
        _announce(out, self.run, self.prepared, execution)


def start(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, method_or_delta: Method | Delta, rows: tuple[Any, Any],
    asked: Asked, world: World, out: Console
) -> Started | RunResult:  # fmt: skip
    """A run at its start, or where it left off; its result where it was finished before. The random state is the run's
    from here on. Raises as `spectune.train`."""
    config, phases = asked.config, asked.observer.phases
    finished = check_folder(config.output_dir, config.resume)
    torch.manual_seed(config.seed)
    delta = phases.call("prove", _attach, model, tokenizer, method_or_delta, asked.name, config.seed)
    given = delta.method, *rows, config, delta.base_fingerprint, world.size
    prepared = phases.call("rows", prepare, model, tokenizer, *given)
    if finished is not None:
        phases.add(finished.seconds_by_phase)
        return _finished_before(finished, delta, prepared, out)
    trained_parameters(delta)
    predicted = phases.call("plan", _planned, delta, prepared, world, asked.predictions, asked.rehearsed)
    parts = prepared, predicted.execution, world, asked.observer
    run, folder = phases.call("save", _start_or_resume, delta, tokenizer, *parts, out)
    return Started(asked, prepared, predicted, run, folder)


def _attach(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, method_or_delta: Method | Delta, name: str, seed: int
) -> Delta:
    if not isinstance(method_or_delta, Delta):
        return attach(model, method_or_delta, name, tokenizer=tokenizer, seed=seed)
    delta = method_or_delta
    if delta.model is not model:
        raise ConfigError(
            f"delta {delta.name!r} is attached to another model than the one given: pass delta.model, or attach its "
            "method to this model"
        )
    if attached(model).get(delta.name) is not delta:
        raise ConfigError(
            f"delta {delta.name!r} is not attached to the model any more (attached are: "
            f"{', '.join(attached(model)) or 'none'}): attach or load it again, and train what that returns"
        )
    return delta


def _planned(
    delta: Delta, prepared: Prepared, world: World, known: Predictions | None, rehearsed: TrainingConfig | None
) -> Prediction:
    """How the run is executed, which is the same run on all processes, each of which has the memory for it."""
    check_alike(world.gather(prepared.identity))
    predicted = predict(delta, prepared, world.first, known, rehearsed)
    with world.agreed():
        check_memory(predicted, delta, prepared.config.memory_check)
    how = predicted.execution
    if prepared.config.cuda_graphs is True:  # what is recomputed may be decided by what is free
        check_graphs(delta.model.device.type, how.packing.on, how.recomputation)
    return predicted


def _finished_before(finished: RunResult, delta: Delta, prepared: Prepared, out: Console) -> RunResult:
    """Of a run that was finished before: its weights and its result."""
    folder = prepared.config.output_dir
    assert folder is not None
    check_identity(read_identity(folder), prepared.identity, folder, "finished run")
    check_finished(folder)
    load_end(folder, delta)
    print_line(out, f"the run in {folder} is finished already: nothing to do")
    return finished


def _start_or_resume(
    delta: Delta, tokenizer: PreTrainedTokenizerBase, prepared: Prepared, execution: Execution, world: World,
    observer: Observer, out: Console
) -> tuple[RunState, RunFolder]:  # fmt: skip
    """The run at its start, or where its newest checkpoint is; and what it keeps."""
    world.broadcast(delta.parameters())
    run = RunState.of(delta, prepared, execution.packing, world)
    run.observer = observer
    folder, best = prepared.config.output_dir, None
    if folder is not None and prepared.config.resume and (saved := newest_whole(folder, run, prepared.identity)):
        saved.restore(run)
        best = saved.best
        observer.phases.add(run.progress.seconds_by_phase)
        print_line(out, f"going on from {saved.path}")
    check_same_step(world.gather(run.progress.step), folder)
    return run, RunFolder(folder, run, best, prepared, tokenizer)


def _spread(world: World) -> str:
    return "" if world.size == 1 else f" on {world.size} processes"


def _announce(out: Console, run: RunState, prepared: Prepared, execution: Execution) -> None:
    delta, config = run.delta, run.config
    trained, base = delta.num_trained_parameters(), delta.family.num_parameters
    # nothing is cut or dropped in silence; data_report.json has every row
    summaries = [found.report.summary(part) for part, found in zip(("train", "valid"), prepared.encoded, strict=True)]
    world = run.batches.world
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps * world.size
    lines = [
        f"{delta.method.label}: {trained:,} trainable of {base:,} weights ({100 * trained / base:.4g}%)",
        f"{run.total_steps} steps of {rows} rows{_spread(world)}, "
        f"{len(prepared.examples):,} rows to train on, {len(prepared.valid):,} to validate, learning rate "
        f"{prepared.learning_rate:g}"
        + ("" if config.learning_rate else f" ({delta.method.learning_rates.at(delta.family.hidden_size).sentence})"),
        mixture(prepared.encoded[0].report) or None,
        execution.reason("packing"),
        execution.reason("cuda_graphs"),
        *(f"{line} (see data_report.json)" for line in summaries if line),
        execution.reason("gradient_checkpointing"),
        execution.reason("torch_compile"),
    ]
    for line in (line for line in lines if line is not None):
        print_line(out, line)
