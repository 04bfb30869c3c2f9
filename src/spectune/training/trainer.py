"""`train`: from rows and a method to a trained delta, a folder and a result."""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectune.blocks.compile import seconds_compiling
from spectune.blocks.execution import Execution
from spectune.compute.memory import leaving_nothing
from spectune.data import mixture
from spectune.deltas import Delta, Method, attach, attached, route
from spectune.errors import ConfigError, DivergedError, InterruptedRun
from spectune.evaluation import perplexity
from spectune.files.plain_console import PlainConsole, print_line
from spectune.results.run_result import RunResult
from spectune.training.claim import claimed
from spectune.training.config import TrainingConfig
from spectune.training.decisions import check_graphs
from spectune.training.display import Display
from spectune.training.distribution import World
from spectune.training.finished import check_finished
from spectune.training.identity import check_alike, check_identity, read_identity
from spectune.training.loop import Loop
from spectune.training.machine import Gauges, environment, load_of
from spectune.training.membership import membership
from spectune.training.observer import Observer
from spectune.training.peaks import largest
from spectune.training.prediction import Prediction, Predictions, check_memory, predict
from spectune.training.prepare import Prepared, prepare, train_sources
from spectune.training.restoring import check_same_step, newest_whole
from spectune.training.run_folder import RunFolder, check_folder, load_end, stored_bytes
from spectune.training.run_state import RunState, trained_parameters


@membership()
def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method_or_delta: Method | Delta,
    train_rows: Any,
    valid_rows: Any = None,
    config: TrainingConfig | None = None,
    *,
    name: str = "default",
    origin: Mapping[str, Any] | None = None,
    console: Console | None = None,
    base_valid_loss: float | None = None,
    predictions: Predictions | None = None,
    rehearsed: TrainingConfig | None = None,
    observer: Observer | None = None,
) -> RunResult:
    """Train one method (attached as `name`) or an attached delta; the delta ends as the best of validation.

    Args:
        train_rows, valid_rows: what `spectune.data.load_rows` takes: paths, lists of dicts, `datasets` objects, or
            several of them as a list of `spectune.Source`, with weights by which training mixes them. Without
            `valid_rows` a seeded tenth of the training rows is held out.
        config: see `TrainingConfig`; with an `output_dir` everything is written there.
        origin: entries for config.yaml that say where base and data came from (model, data, valid, device, dtype).
        console: where to print; default is standard output.
        base_valid_loss: the bare base's loss on the validation rows, where it is known already.
        predictions: what was planned of earlier runs, for callers that train many on one base.
        rehearsed: settings of a longer run that this one stands for: steps are executed as that one's would be.
        observer: what sees more of the run than its result tells.

    Raises:
        ConfigError, DataError: bad settings or data, a delta that is not of this model or that nothing may be trained
            of, or a run to resume that had other settings, data or base; nothing was trained.
        DoesNotFitError: the plan says that the run does not fit into memory, and `memory_check` is "refuse".
        BusyFolderError: another process works in the folder.
        WriteError: the disk is full, read-only or broken; says which checkpoint is whole.
        InterruptedRun, OutOfMemoryError, DivergedError: see `spectune.errors`.
    """
    asked = _Asked(
        config or TrainingConfig(), name, origin or {}, console, base_valid_loss, predictions, rehearsed,
        observer or Observer(),
    )  # fmt: skip
    with leaving_nothing(model.device):
        return _trained(model, tokenizer, method_or_delta, (train_rows, valid_rows), asked)


@dataclass(frozen=True)
class _Asked:
    """What `train` is given beside a model, a method and rows."""

    config: TrainingConfig
    name: str
    origin: Mapping[str, Any]
    console: Console | None
    base_valid_loss: float | None
    predictions: Predictions | None
    rehearsed: TrainingConfig | None
    observer: Observer


def _trained(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, method_or_delta: Method | Delta, rows: tuple[Any, Any],
    asked: _Asked
) -> RunResult:  # fmt: skip
    """`train`. When it returns, it holds nothing of the device any more but the delta's weights."""
    world, config = World(model.device), asked.config
    with contextlib.ExitStack() as held:
        with world.agreed():
            if config.output_dir is not None and world.leads:
                held.enter_context(claimed(config.output_dir, "spectune train", resume=config.resume))
        return _alone(model, tokenizer, method_or_delta, rows, asked, world)


def _alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, method_or_delta: Method | Delta, rows: tuple[Any, Any],
    asked: _Asked, world: World
) -> RunResult:  # fmt: skip
    """The same, with the run's folder for itself."""
    config, phases = asked.config, asked.observer.phases
    out = (asked.console or PlainConsole()) if world.leads else Console(quiet=True)
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
    execution = predicted.execution
    parts = prepared, execution, world, asked.observer
    run, folder = phases.call("save", _start_or_resume, delta, tokenizer, *parts, out)
    phases.call("save", folder.begin, prepared.encoded, {**environment(), **execution.settings()}, asked.origin)
    _announce(out, run, prepared, execution)
    stopped = _run_to_end(Loop(run, execution), folder, out, asked.base_valid_loss)
    phases.call("save", _keep, folder)
    result = _result(folder, prepared, predicted, stopped)
    folder.keep_result(result)
    world.barrier()  # all are done, or none
    return result


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


def _keep(folder: RunFolder) -> None:
    """What the run ends with."""
    run = folder.run
    if run.config.load_best_at_end and run.progress.best_step != run.progress.step:
        folder.load_best()
    folder.keep_end()


def _run_to_end(loop: Loop, folder: RunFolder, out: Console, base_valid_loss: float | None) -> bool:
    """The run to its end. Returns whether that came early because validation stopped improving."""
    run, compiled = loop.run, seconds_compiling()
    display = run.observer.display or Display(out, run.delta.method.label, run.total_steps, 0)
    try:
        if run.progress.base_valid_loss is None:
            with run.observer.phases.of("validation"):
                run.progress.base_valid_loss = _base_loss(loop) if base_valid_loss is None else base_valid_loss
        display.go_on_from(run.progress.step)
        with display, run.observer.phases.of("steps"):
            return loop.drive(display)
    except DivergedError:  # on all processes alike: none ends before what is kept is written
        folder.go_back()
        loop.world.barrier()
        raise
    except InterruptedRun:
        loop.world.barrier()
        raise
    finally:
        run.observer.phases.move(max(0.0, seconds_compiling() - compiled), "steps", "compile")
        loop.model.train(False)
        run.optimizer.close()
        folder.close()


def _base_loss(loop: Loop) -> float:
    delta = loop.run.delta
    # full fine-tuning is at its base until the first step; all others leave the base as it is
    with route(loop.model, delta.name if delta.method.trains_base else None):
        loss = loop.valid_losses().mean_per_token
    if not math.isfinite(loss):
        raise DivergedError(
            f"the validation loss of the bare base is {loss}, before any step: nothing was trained. Try another dtype "
            "(float32 or bfloat16), and look at the base and the data."
        )
    return loss


def _result(folder: RunFolder, prepared: Prepared, predicted: Prediction, stopped: bool) -> RunResult:
    delta, progress, config = folder.run.delta, folder.run.progress, folder.run.config
    best = config.load_best_at_end
    valid_loss = progress.best_loss if best else progress.valid_loss
    tokens, world = progress.timed_tokens or progress.tokens, folder.run.batches.world
    load = load_of(progress.timed_seconds, progress.timed_cpu_seconds, Gauges.of(delta.model.device.type))
    return RunResult(
        method=delta.method.name,
        name=delta.name,
        settings=delta.method.model_dump(mode="json"),
        seed=config.seed,
        learning_rate=prepared.learning_rate,
        task_type=config.task_type,
        trainable_parameters=delta.num_trained_parameters(), stored_parameters=delta.num_parameters(),
        total_parameters=delta.family.num_parameters, stored_bytes=stored_bytes(folder.folder),
        steps=progress.step, best_step=progress.best_step,
        train_tokens=progress.tokens, target_tokens=progress.targets,
        train_loss=progress.last_epoch_loss, valid_loss=valid_loss, last_valid_loss=progress.valid_loss,
        valid_loss_by_source=progress.best_loss_by_source if best else progress.valid_loss_by_source,
        train_sources=train_sources(prepared.encoded[0].report),
        base_valid_loss=progress.base_valid_loss,
        valid_perplexity=None if valid_loss is None or prepared.labels is not None else perplexity(valid_loss),
        train_tokens_per_second=tokens / (progress.timed_seconds or progress.seconds),
        train_seconds=progress.seconds,
        machine_load={"train": load},
        seconds_by_phase=folder.run.observer.phases.record(),
        peak_memory_bytes=largest(world.gather(progress.peak_memory_bytes)),
        predicted_memory_bytes=predicted.memory,
        memory_prediction_source=predicted.source,
        gradient_checkpointing=predicted.execution.recomputation,
        stopped_early=stopped,
        processes=world.size,
        folder=None if config.output_dir is None else str(config.output_dir),
    )  # fmt: skip


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
