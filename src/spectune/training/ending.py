"""The end of a run: its last validation, its best weights, its result."""

import contextlib
import math
from collections.abc import Iterator

from spectune.blocks.compile import seconds_compiling
from spectune.deltas import route
from spectune.errors import DivergedError, InterruptedRun
from spectune.evaluation import perplexity
from spectune.results.run_result import RunResult
from spectune.training.machine import Gauges, load_of
from spectune.training.peaks import largest
from spectune.training.prepare import train_sources
from spectune.training.run_folder import stored_bytes
from spectune.training.run_state import RunState
from spectune.training.starting import Started
from spectune.training.validating import valid_losses


@contextlib.contextmanager
def until_its_end(started: Started) -> Iterator[None]:
    """Around a run's steps: its base's loss is taken before them, its folder and optimizer are closed behind them,
    whatever ends them."""
    run, folder, compiled = started.run, started.folder, seconds_compiling()
    phases, world = run.observer.phases, run.batches.world
    try:
        if run.progress.base_valid_loss is None:
            given = started.asked.base_valid_loss
            with phases.of("validation"):
                run.progress.base_valid_loss = _base_loss(run) if given is None else given
        with phases.of("steps"):
            yield
    except DivergedError:  # on all processes alike: none ends before what is kept is written
        folder.go_back()
        world.barrier()
        raise
    except InterruptedRun:
        world.barrier()
        raise
    finally:
        phases.move(max(0.0, seconds_compiling() - compiled), "steps", "compile")
        run.optimizer.close()
        folder.close()


def _base_loss(run: RunState) -> float:
    delta = run.delta
    # full fine-tuning is at its base until the first step; all others leave the base as it is
    with route(delta.model, delta.name if delta.method.trains_base else None):
        loss = valid_losses(run).mean_per_token
    if not math.isfinite(loss):
        raise DivergedError(
            f"the validation loss of the bare base is {loss}, before any step: nothing was trained. Try another dtype "
            "(float32 or bfloat16), and look at the base and the data."
        )
    return loss


def end(started: Started, *, stopped: bool, beside: int = 1) -> RunResult:
    """What a run ends with: the delta's best weights, and its result.

    Args:
        stopped: it ended early.
        beside: the most runs that were trained at the same time, itself included.
    """
    run, folder = started.run, started.folder
    run.observer.phases.call("save", _keep, started)
    result = _result(started, stopped, beside)
    folder.keep_result(result)
    run.batches.world.barrier()  # all are done, or none
    return result


def _keep(started: Started) -> None:
    """What the run ends with."""
    run, folder = started.run, started.folder
    if run.config.load_best_at_end and run.progress.best_step != run.progress.step:
        folder.load_best()
    folder.keep_end()


def _result(started: Started, stopped: bool, beside: int) -> RunResult:
    run, prepared, predicted = started.run, started.prepared, started.predicted
    delta, progress, config = run.delta, run.progress, run.config
    best = config.load_best_at_end
    valid_loss = progress.best_loss if best else progress.valid_loss
    tokens, world = progress.timed_tokens or progress.tokens, run.batches.world
    load = load_of(progress.timed_seconds, progress.timed_cpu_seconds, Gauges.of(delta.model.device.type))
    return RunResult(
        method=delta.method.name,
        name=delta.name,
        settings=delta.method.model_dump(mode="json"),
        seed=config.seed,
        learning_rate=prepared.learning_rate,
        task_type=config.task_type,
        trainable_parameters=delta.num_trained_parameters(), stored_parameters=delta.num_parameters(),
        total_parameters=delta.family.num_parameters, stored_bytes=stored_bytes(started.folder.folder),
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
        seconds_by_phase=run.observer.phases.record(),
        peak_memory_bytes=largest(world.gather(progress.peak_memory_bytes)),
        predicted_memory_bytes=predicted.memory,
        memory_prediction_source=predicted.source,
        gradient_checkpointing=predicted.execution.recomputation,
        stopped_early=stopped,
        trained_together=beside,
        processes=world.size,
        folder=None if config.output_dir is None else str(config.output_dir),
    )  # fmt: skip
