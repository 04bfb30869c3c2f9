"""`train_together`: several runs on one frozen base, in shared steps."""

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectune.compute.memory import leaving_nothing
from spectune.deltas import Delta, Method, attached, detach
from spectune.errors import ConfigError, InterruptedRun, RunsFailedError, SpectuneError
from spectune.files.plain_console import PlainConsole, print_line
from spectune.results.run_result import RunResult
from spectune.training.claim import claimed
from spectune.training.company import check_together
from spectune.training.config import TrainingConfig
from spectune.training.display import Display
from spectune.training.distribution import World
from spectune.training.interrupt import Interrupts
from spectune.training.joint_display import JointDisplay
from spectune.training.joint_execution import joint_execution
from spectune.training.lanes import Lane
from spectune.training.loop import Loop
from spectune.training.peaks import Peaks, largest
from spectune.training.random_stream import RandomStream
from spectune.training.rounds import Rounds
from spectune.training.run_state import RunState
from spectune.training.sharing import why_not_shared
from spectune.training.starting import Asked, Started, start


@dataclass(frozen=True)
class Run:
    """One of the runs of `train_together`.

    Attributes:
        method: a method, or a delta that is attached to the model.
        train_rows, valid_rows, config: as `spectune.train` takes them.
        name: of the delta; by default the method's, numbered where several have the same. An attached delta has one.
    """

    method: Method | Delta
    train_rows: Any
    valid_rows: Any = None
    config: TrainingConfig | None = None
    name: str | None = None


def train_together(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    runs: Sequence[Run],
    *,
    output_dir: str | Path | None = None,
    console: Console | None = None,
    asked: Sequence[Asked] = (),
    display: Display | None = None,
    share_passes: bool | Literal["auto"] = "auto",
) -> list[RunResult]:
    """Train several methods on one frozen base, in steps that all of them share: each as `spectune.train` would by
    itself, with its own rows, optimizer, schedule, clipping, validation, early stop, checkpoints and random numbers.

    Rows of several runs in one pass give each run what it gets alone, up to the rounding of products of another size.
    A run whose pass is its own gets it to the last bit: where passes are not shared, where a run draws random numbers
    (dropout), and where its method cannot share a batch.

    A run that ends, stops early or fails leaves, and the others go on. The deltas stay attached, each as the best of
    its validation.

    Args:
        runs: what to train. Settings may differ in everything; a run with an `output_dir` and `resume` goes on there.
        output_dir: runs without an `output_dir` of their own get a folder of their name in it.
        console: where to print; default is standard output.
        display: what shows how far they are; by default one on the console.
        asked: for each run what `spectune.train` takes beside method and rows, for callers that want more of it than
            `runs` says; its config and name stand in place of those.
        share_passes: whether rows of several runs go through the base in one pass; "auto" does on CUDA. On a CPU, which
            computes no faster for more rows, that takes longer (docs/decisions.md): each run has its own pass.

    Returns:
        the results, in the order of `runs`.

    Raises:
        ConfigError, DataError, DoesNotFitError, BusyFolderError: as `spectune.train`, before any step: nothing was
            trained or written, and nothing is attached that was not before. Also: two runs of one name or folder, a
            delta under another name than its own, a method that trains the base itself, several processes.
        RunsFailedError: some runs failed (diverged, say), and the others have ended: it has the results of these, and
            why each of those failed.
        InterruptedRun: a signal came; each run has a checkpoint.
        OutOfMemoryError: a step that all share does not fit.
    """
    wanted = _wanted(list(runs), None if output_dir is None else Path(output_dir), asked)
    out = console or PlainConsole()
    with leaving_nothing(model.device), contextlib.ExitStack() as held:
        for _, each in wanted:
            if (folder := each.config.output_dir) is not None:
                held.enter_context(claimed(folder, "spectune train", resume=each.config.resume))
        shared = model.device.type != "cpu" if share_passes == "auto" else share_passes
        begun = _start(model, tokenizer, wanted, out, shared=shared)
        going = [made for made in begun if not isinstance(made, RunResult)]
        found = _driven(model, going, shared, out, display)
        results = [made if isinstance(made, RunResult) else found[made.asked.name] for made in begun]
    return _checked(results, [each.name for _, each in wanted])


def _wanted(runs: Sequence[Run], folder: Path | None, asked: Sequence[Asked]) -> list[tuple[Run, Asked]]:
    """Each run with its name, its folder and the rest of what is asked of it. Raises ConfigError: two have the same."""
    if not runs:
        raise ConfigError("no runs: give at least one spectune.Run")
    World()  # one process alone
    _check_runs(runs)
    found = list[Asked]()
    asked = asked or [Asked(run.config or TrainingConfig(), name) for run, name in zip(runs, _names(runs), strict=True)]
    for run, made in zip(runs, asked, strict=True):
        if made.config.output_dir is None and folder is not None:
            made = replace(made, config=made.config.model_copy(update={"output_dir": folder / made.name}))
        if _method_of(run).trains_base:
            raise ConfigError(
                f"{made.name}: {_method_of(run).label} trains the base itself, which all runs share: train it alone"
            )
        made.observer.phases.pause()
        found.append(made)
    _check_unlike("named", [each.name for each in found])
    _check_unlike("written to", [str(each.config.output_dir.resolve()) for each in found if each.config.output_dir])
    return list(zip(runs, found, strict=True))


def _check_runs(runs: Sequence[Run]) -> None:
    for run in runs:
        if not isinstance(run, Run):
            raise ConfigError(f"expected runs such as spectune.Run(spectune.LoRA(r=16), rows), got {run!r}")
        if not isinstance(run.method, Method | Delta):
            raise ConfigError(f"expected a method such as spectune.LoRA(r=16), or a delta, got {run.method!r}")
        if isinstance(run.method, Delta) and run.name not in (None, run.method.name):
            raise ConfigError(
                f"run {run.name!r} trains a delta that is attached as {run.method.name!r}: leave the name out, or give "
                "the method, of which a new delta is attached"
            )


def _method_of(run: Run) -> Method:
    return run.method.method if isinstance(run.method, Delta) else run.method


def _names(runs: Sequence[Run]) -> list[str]:
    """The runs' names: as given, else the delta's or the method's, numbered where several have the same."""
    own = [run.name or (run.method.name if isinstance(run.method, Delta) else None) for run in runs]
    methods = Counter(run.method.name for run, name in zip(runs, own, strict=True) if name is None)
    taken, numbers, found = set(own), Counter[str](), list[str]()
    for run, name in zip(runs, own, strict=True):
        while name is None:
            numbers[run.method.name] += 1
            several = methods[run.method.name] > 1 or run.method.name in taken
            made = f"{run.method.name}-{numbers[run.method.name]}" if several else run.method.name
            name = None if made in taken else made
        found.append(name)
    return found


def _check_unlike(what: str, given: Sequence[str]) -> None:
    twice = [each for each, count in Counter(given).items() if count > 1]
    if twice:
        raise ConfigError(f"several runs are {what} {twice[0]}: give each its own")


def _start(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, wanted: Sequence[tuple[Run, Asked]], out: Console, *,
    shared: bool,
) -> list[RunResult | Started]:  # fmt: skip
    """Begin all runs, or none."""
    before, begun = set(attached(model)), list[RunResult | Started]()
    outside = RandomStream(model.device)
    try:
        for run, asked in wanted:
            asked.observer.phases.go_on()
            made = start(model, tokenizer, run.method, (run.train_rows, run.valid_rows), asked, World(), out)
            asked.observer.phases.pause()
            if isinstance(made, Started):
                made.run.stream = RandomStream(model.device)
            begun.append(made)
        going = [made for made in begun if isinstance(made, Started)]
        if shared:
            check_together(model, going)
        for started in going:  # all can: until here nothing was written
            started.asked.observer.phases.go_on()
            started.begin(out)
            started.asked.observer.phases.pause()
    except BaseException:
        for started in [made for made in begun if isinstance(made, Started)]:
            started.run.optimizer.close()
            started.folder.close()
        for name in [name for name in attached(model) if name not in before]:
            detach(model, name)
        raise
    finally:
        outside.restore()
    return begun


def _driven(
    model: PreTrainedModel,
    begun: Sequence[Started],
    shared: bool,
    out: Console,
    shown: Display | None,
) -> dict[str, RunResult | SpectuneError]:
    """Train all to their ends. Returns the result of each, or why it failed, by name."""
    if not begun:
        return {}
    interrupts, deltas = Interrupts(), [made.run.delta for made in begun]
    sharing = _sharing(deltas, out) if shared and len(deltas) > 1 else []
    executions = [made.predicted.execution for made in begun]
    execution = joint_execution(executions, [made.run for made in begun if made.run.delta in sharing])
    peaks = _joint_peaks([made.run for made in begun])
    progress = [(made.asked.name, made.run.total_steps, made.run.progress.step) for made in begun]
    display = JointDisplay(out, progress, shown)
    lanes = [
        Lane(made, Loop(made.run, replace(execution, packing=made.run.batches.packing), interrupts, peaks),
             display.of(made.asked.name), shares=made.run.delta in sharing)
        for made in begun
    ]  # fmt: skip
    applied = execution.applied(*deltas, around_capture=peaks.set_aside)
    try:
        with interrupts, display, applied:
            model.train()
            peaks.resume()
            Rounds(model, interrupts, execution).drive(lanes)
    finally:
        for lane in lanes:
            lane.close()
        model.train(False)
    return {lane.name: lane.result or lane.error for lane in lanes}  # type: ignore[misc]


def _sharing(deltas: Sequence[Delta], out: Console) -> list[Delta]:
    """Those whose rows may be in one pass; why others are not is said."""
    found = list[Delta]()
    for delta in deltas:
        if (reason := why_not_shared(delta)) is None:
            found.append(delta)
        else:
            print_line(out, f"{delta.name} takes its steps by itself: {reason}")
    return found


def _joint_peaks(runs: Sequence[RunState]) -> Peaks:
    """What measures the memory of all: one record, which each has."""
    found = largest([run.progress.peak_memory_bytes for run in runs])
    for run in runs:
        run.progress.peak_memory_bytes = found
    model, optimizers = runs[0].delta.model, [run.optimizer for run in runs]
    return Peaks(
        model.device, lambda: [*model.parameters(), *(t for each in optimizers for t in each.tensors())], found
    )


def _checked(found: Sequence[RunResult | SpectuneError], names: Sequence[str]) -> list[RunResult]:
    """The results, if there are all."""
    failures = {name: each for name, each in zip(names, found, strict=True) if isinstance(each, SpectuneError)}
    results = [each for each in found if isinstance(each, RunResult)]
    if any(isinstance(error, InterruptedRun) for error in failures.values()):
        raise InterruptedRun("\n".join(f"{name}: {error}" for name, error in failures.items()))
    if failures:
        raise RunsFailedError(failures, results)
    return results
