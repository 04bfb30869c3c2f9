"""`train`: from rows and a method to a trained delta, a folder and a result."""

import contextlib
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectune.compute.memory import leaving_nothing
from spectune.deltas import Delta, Method
from spectune.files.plain_console import PlainConsole
from spectune.results.run_result import RunResult
from spectune.training.claim import claimed
from spectune.training.config import TrainingConfig
from spectune.training.display import Display
from spectune.training.distribution import World
from spectune.training.ending import end, until_its_end
from spectune.training.loop import Loop
from spectune.training.membership import membership
from spectune.training.observer import Observer
from spectune.training.prediction import Predictions
from spectune.training.starting import Asked, Started, start


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
    asked = Asked(
        config or TrainingConfig(), name, origin or {}, base_valid_loss, predictions, rehearsed, observer or Observer()
    )
    with leaving_nothing(model.device):
        return _trained(model, tokenizer, method_or_delta, (train_rows, valid_rows), asked, console)


def _trained(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, method_or_delta: Method | Delta, rows: tuple[Any, Any],
    asked: Asked, console: Console | None
) -> RunResult:  # fmt: skip
    """`train`. When it returns, it holds nothing of the device any more but the delta's weights."""
    world, config = World(model.device), asked.config
    out = (console or PlainConsole()) if world.leads else Console(quiet=True)
    with contextlib.ExitStack() as held:
        with world.agreed():
            if config.output_dir is not None and world.leads:
                held.enter_context(claimed(config.output_dir, "spectune train", resume=config.resume))
        started = start(model, tokenizer, method_or_delta, rows, asked, world, out)
        if isinstance(started, RunResult):
            return started
        started.begin(out)
        return end(started, stopped=_run_to_end(started, out))


def _run_to_end(started: Started, out: Console) -> bool:
    """The run to its end. Returns whether that came early because validation stopped improving."""
    run = started.run
    loop = Loop(run, started.predicted.execution)
    display = run.observer.display or Display(out, run.delta.method.label, run.total_steps, 0)
    try:
        with until_its_end(started):
            display.go_on_from(run.progress.step)
            with display:
                return loop.drive(display)
    finally:
        loop.model.train(False)
