"""`spectune train`: one method, one run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectune.cli import options
from spectune.cli.arms import arms_of, given_arms, names_of
from spectune.cli.console import complain, import_libraries, note, print_answer, work
from spectune.cli.dry_run import dry_run
from spectune.cli.heads import decided, head_options
from spectune.cli.input_rows import check_inputs, training_rows
from spectune.cli.known_keys import method_names
from spectune.cli.one_of_several import joined, of_first, refuse_several
from spectune.cli.runs import origin, output_folder, resumed
from spectune.cli.settings import Settings, runs_together
from spectune.cli.train_several import LABEL, sharing, train_several
from spectune.errors import ConfigError, InterruptedRun, SpectuneError
from spectune.files.plain_text import command_line
from spectune.torchrun import Place

if TYPE_CHECKING:
    from rich.console import Console

    from spectune.comparing import Arm

DEFAULT_METHOD = "lora"


def train(
    context: typer.Context,
    model: options.Model = None,
    data: options.Data = None,
    valid: options.Valid = None,
    method: Annotated[str | None, typer.Option(help=f"One of {method_names()}.", show_default=DEFAULT_METHOD)] = None,
    output_dir: options.OutputDir = None,
    config: options.Config = None,
    assignments: options.Set = None,
    task_type: options.TaskType = None,
    train_on: options.TrainOn = None,
    seed: options.Seed = None,
    resume: options.Resume = False,
    together: options.Together = None,
    dry: options.DryRun = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    base_precision: options.BasePrecision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_missing_weights: options.AllowMissingWeights = False,
    skip_bad_rows: options.SkipBadRows = False,
    as_json: options.Json = False,
) -> None:
    """Train one method on one base. Ctrl-C writes a checkpoint; `spectune train --resume --output-dir X` goes on
    with the settings, base and data that the run there has.

    Keys of --config and --set are those of transformers and PEFT: learning_rate, num_train_epochs, max_steps,
    per_device_train_batch_size, gradient_accumulation_steps, lr_scheduler_type, warmup_steps, max_length, r,
    num_virtual_tokens, and so on.

    \b
    Examples:
      spectune train --method prefix
      spectune train --model gpt2 --data train.jsonl --method lora --set r=8 --set learning_rate=1e-3
      spectune train --config run.yaml --output-dir runs/legal --resume
      spectune train --method lora:r=8,adapter,prefix --together
    """
    settings = resumed(Settings.collect(config, assignments, options.flags(context)))
    if runs_together(settings) is not None:
        _together(settings, dry=dry, as_json=as_json)
        return
    names = settings.method_names([DEFAULT_METHOD])
    if len(names) != 1:
        raise ConfigError(
            f"train takes one method, given {', '.join(names)}; with --together it takes many, "
            "and `spectune compare` measures them side by side"
        )
    with work(as_json=as_json) as out:
        check_inputs(settings, names)
        [name] = names
        with joined(settings.placement["device"]):
            answer = dry_run(_arms(settings, name), settings, name, out) if dry else _train(name, settings, out)
    print_answer(answer, as_json=as_json)


def _together(settings: Settings, *, dry: bool, as_json: bool) -> None:
    """Several methods in shared passes. Exit code of the first that failed, if any did."""
    refuse_several("train --together")
    given = given_arms(settings, [DEFAULT_METHOD])
    errors: list[SpectuneError] = []
    with work(as_json=as_json) as out:
        check_inputs(settings, names_of(given))
        import_libraries()
        chosen = arms_of(settings, given)
        if dry:
            answer = dry_run(sharing(chosen, settings), settings, LABEL, out)
        else:
            answer, errors = train_several(chosen, settings, out)
            for name, reason in answer["failed"].items():
                complain(f"{name} failed: {reason}")
    print_answer(answer, as_json=as_json)
    if errors:
        raise typer.Exit(errors[0].exit_code)


def _arms(settings: Settings, name: str) -> list[Arm]:
    from spectune.comparing import Arm

    [method] = settings.methods([name])
    return [Arm(name, method)]


def _train(name: str, settings: Settings, out: Console) -> dict[str, Any]:
    with _folder(name, settings) as folder:
        try:
            return _train_in(folder, name, settings, out)
        except KeyboardInterrupt as stop:  # outside of the loop, which has its own answer
            raise InterruptedRun(
                "interrupted outside of a step. To go on from what is saved, or to start again if nothing is: the same "
                f"command with {command_line('--output-dir', folder, '--resume')}"
            ) from stop


@contextlib.contextmanager
def _folder(name: str, settings: Settings) -> Iterator[Path]:
    """The run's folder, which the first process chooses and locks."""
    with contextlib.ExitStack() as held:
        chosen = ""
        if Place.from_environment().leads:
            given, resume = settings.text("output_dir"), settings.training().resume
            chosen = str(held.enter_context(output_folder(given, name, "spectune train", resume=resume)))
        yield Path(of_first(chosen))


def _train_in(folder: Path, name: str, settings: Settings, out: Console) -> dict[str, Any]:
    wanted = settings.training()
    rows, held_out, source = training_rows(settings)

    import_libraries()
    from spectune import training
    from spectune.deltas import attach
    from spectune.storage import load
    from spectune.training.observer import Observer

    [method] = settings.methods([name])
    observer = Observer()
    labels = decided(settings, rows)
    with observer.phases.of("load"):
        model, tokenizer = load(settings.base, **settings.placement, **head_options(labels))
    place = f"{model.device}, {str(model.dtype).removeprefix('torch.')}"
    if (precision := settings.text("base_precision")) is not None:
        place += f", frozen linears in {precision}"
    note(f"base: {settings.base} ({place})\ndata: {source}\nfolder: {folder}")
    with observer.phases.of("prove"):
        delta = attach(model, method, method.name, tokenizer=tokenizer, seed=wanted.seed)
    learned = "CAUSAL_LM" if labels is None else labels.task_type
    config = wanted.model_copy(update={"output_dir": folder, "task_type": learned})
    result = training.train(
        model, tokenizer, delta, rows, held_out, config, origin=origin(settings), console=out, observer=observer
    )
    does = "writes" if labels is None else "says"
    note(f"kept in {folder / 'best'}; see what it {does}: {command_line('spectune', 'generate', '--run', folder)}")
    return result.model_dump(mode="json")
