"""Compare methods on one base and one data set: search, repeat, measure, judge, recommend."""

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectune.comparing import conditions
from spectune.comparing.arms import Arm, arms_of
from spectune.comparing.beginning import Beginning
from spectune.comparing.comparison import Comparison
from spectune.comparing.conditions import RecordedConditions
from spectune.comparing.final_runs import base_passages, base_rows, judge_base, valid_loss_of_base
from spectune.comparing.inputs import Rows
from spectune.comparing.intact import vouched_files
from spectune.comparing.job import Job
from spectune.comparing.runner import Runner
from spectune.comparing.schedule import PRESETS
from spectune.deltas import Method
from spectune.errors import ConfigError, DoesNotFitError, InterruptedRun, WriteError
from spectune.files.disk_errors import disk_errors
from spectune.files.plain_text import command_line
from spectune.inference import CHOICE_NORMALIZATIONS
from spectune.phases import Phases
from spectune.results import Limits
from spectune.training import TrainingConfig
from spectune.training.claim import OF_RUN, claimed

GENERATE_ROWS = 64
#: folders in a comparison's
WITHIN = ("plots", "base*", "search/*", "search/*/*", "curve/*", "curve/*/*", "runs/*", "runs/*/*",
          *(f"runs/*/*/{name}" for name in OF_RUN))  # fmt: skip
#: files of a folder that is no comparison which can be resumed
OF_OTHER_RUNS = ("comparison.json", "result.json", "identity.json", "runs")


def compare(
    base: str | Path | PreTrainedModel, train_rows: Any, valid_rows: Any = None, *, test_rows: Any = None,
    methods: Sequence[str | Method | Arm] | Mapping[str, Method | Arm] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None, output_dir: str | Path | None = None,
    config: TrainingConfig | None = None, preset: str = "default", seeds: int | None = None,
    fractions: Sequence[float] = (), metric: str = "auto", generate_rows: int = GENERATE_ROWS,
    limits: Limits | None = None, seed: int | None = None, device: str = "auto", dtype: str = "auto",
    base_precision: str | None = None, retain: str | Path | None = None, resume: bool = False,
    choice_normalization: str = "sum", origin: Mapping[str, Any] | None = None, console: Console | None = None,
    trust_remote_code: bool = False, allow_missing_weights: bool = False, together: int | str | None = None,
) -> Comparison:  # fmt: skip
    """Search each method's learning rate, train it with several seeds, measure all alike, and say what differs.

    Args:
        base: a loaded model, a hub id, a folder, or "spectune-tiny".
        train_rows, valid_rows: paths, lists of dicts, `datasets` objects, or several of them with weights, as a list of
            `spectune.Source`; without `valid_rows` a seeded tenth of the training rows is held out.
        test_rows: rows that only the final runs are judged on; without them they are judged on the validation rows,
            which have also chosen the rates.
        methods: names, configs or arms (`Arm(name, method, task_type="SEQ_CLS")`, see `spectune.comparing.arms`), or a
            mapping from names to configs or arms; all methods by default. What is learned of the rows, their text or
            their labels with a head, is the config's `task_type`, unless an arm has its own.
        config: one budget for all. A `learning_rate` is every method's, and nothing is searched.
        preset, seeds: "quick", "default" or "thorough" (`spectune.comparing.schedule`), and final runs of each method.
        fractions: a data curve: shares of the rows (at most 1) or numbers of rows.
        metric: "auto", names or `package.module:function`, see `spectune.evaluation.Task`.
        generate_rows: judged rows that every final run writes a completion for.
        limits: of the user, for the recommendation; a resumption without any keeps those it began with.
        seed: of weights, data order and splits; default is the config's.
        output_dir, resume: default is the config's, else a new temporary folder; to go on with what has ended.
        retain: a text file whose passages measure forgetting; default is text sampled from the base itself.
        choice_normalization: "sum", "token" or "byte", see `spectune.evaluation.Task`.
        origin: entries for config.yaml, the comparison's and each run's, see `train`.
        together: how many runs may share a pass; "auto": as many as gain from it and have room, by the plan.
        base_precision, trust_remote_code, allow_missing_weights: how the base is loaded, see `spectune.load`.

    Raises:
        ConfigError, DataError: bad settings or data, or a folder to go on in whose runs had other settings, data or
            base; before anything is trained.
        DoesNotFitError: by the plan no method fits into memory. Of several, those that do not are failed runs.
        BusyFolderError: another process works in the folder. WriteError: the disk is full, read-only or broken.
        InterruptedRun: Ctrl-C, SIGTERM or SIGHUP; `resume` goes on from there, as after a WriteError.

    A run that fails stays in the result with its reason, and the others go on.
    """
    own: dict[str, Any] = {"preset": preset, "seeds": seeds, "fractions": list(fractions), "metric": metric}
    own |= {"generate_rows": generate_rows, "choice_normalization": choice_normalization, "together": together}
    check_settings(**own)
    with _folder(config, output_dir, resume) as folder:
        phases, (settings, before) = Phases(), _begin(folder, config, seed)
        arms = arms_of(methods, base_precision)
        rows = phases.call("rows", Rows.read, train_rows, valid_rows, test_rows, settings)
        where = {"device": device, "dtype": dtype, "base_precision": base_precision,
                 "trust_remote_code": trust_remote_code, "allow_missing_weights": allow_missing_weights}  # fmt: skip
        return _carried_out(
            Beginning.of(
                base, arms, rows, settings, tokenizer=tokenizer, where=where, own=own, folder=folder, before=before,
                retain=retain, limits=limits, origin=origin, console=console, phases=phases,
            )
        )  # fmt: skip


def _carried_out(beginning: Beginning) -> Comparison:
    """Make all runs that are not there yet, and the comparison from all of them."""
    folder, misfits = beginning.folder, list[DoesNotFitError]()
    for job in beginning.jobs():
        try:
            _carry_out(job)
        except DoesNotFitError as error:  # of the arms of one kind of model none fits
            misfits.append(error)
        del job  # before the next one loads its model
    if len(misfits) == len(beginning.tracks):
        raise misfits[0]
    comparison = Comparison.from_runs(folder)
    comparison.save()
    return comparison


def _carry_out(job: Job) -> None:
    """Make the runs of one kind of model that are not there yet."""
    folder, base = job.folder, job.base
    for line in (job.conditions.data.mixture, job.inputs.notice):
        if line:
            job.print(line)
    try:
        if base.judged_loss is None or not all(path.is_file() for path in (base_rows(job), base_passages(job))):
            judge_base(job)
        if base.valid_loss is None:
            # the judged rows are those, unless there are rows to test on
            base.valid_loss = base.judged_loss if job.inputs.rows.test is None else valid_loss_of_base(job)
        job.conditions.files = vouched_files(folder, job.conditions)
        job.conditions.write(folder / conditions.FILE)
        runner = Runner(job)
        runner.run()
        if runner.has_run:  # what finds all runs there is none of their time
            job.record_time()
    except InterruptedRun as stop:  # what it says is of one run
        job.record_time()
        raise InterruptedRun(
            f"the comparison is in {folder}. To go on: the same command with "
            f"{command_line('--output-dir', folder, '--resume')}"
        ) from stop


def check_settings(
    *, preset: str, seeds: int | None, fractions: Sequence[float], metric: str, generate_rows: int,
    choice_normalization: str = "sum", together: int | str | None = None,
) -> None:  # fmt: skip
    """Check a comparison's own settings, before anything is read. Raises ConfigError."""
    if preset not in PRESETS:
        raise ConfigError(f"preset {preset!r}; expected one of {', '.join(PRESETS)}")
    if seeds is not None and seeds < 1:
        raise ConfigError(f"seeds = {seeds}; expected at least 1 final run of each method")
    if generate_rows < 0:
        raise ConfigError(f"generate_rows = {generate_rows}; expected 0 (write nothing) or more")
    if together not in (None, "auto") and (isinstance(together, bool | str) or together < 1):
        raise ConfigError(f"together = {together!r}; expected auto, or how many runs share a pass: 2, say")
    if choice_normalization not in CHOICE_NORMALIZATIONS:
        expected = f"expected one of {', '.join(CHOICE_NORMALIZATIONS)}"
        raise ConfigError(f"choice_normalization {choice_normalization!r}; {expected}")
    if wrong := [f"{f:g}" for f in fractions if not 0 < f < math.inf or (f > 1 and f != int(f))]:
        expected = "expected shares of the rows above 0 and up to 1, or whole numbers of rows"
        raise ConfigError(f"fractions {', '.join(wrong)}; {expected}")


def _begin(
    folder: Path, config: TrainingConfig | None, seed: int | None
) -> tuple[TrainingConfig, RecordedConditions | None]:
    """The settings of all runs, and the conditions of an earlier call that lie in the folder."""
    settings = config or TrainingConfig()
    other = [name for name in OF_OTHER_RUNS if (folder / name).exists()]
    if other and not (folder / conditions.FILE).is_file():
        raise ConfigError(
            f"{folder} holds {', '.join(other)} and no {conditions.FILE}: a single run, or a comparison of an earlier "
            "version, so nothing says under which conditions it was made. Give another --output-dir."
        )
    # whether it was changed is looked at once it is known to be the comparison that is asked for
    before = conditions.read(folder, warn=lambda _: None) if os.path.lexists(folder / conditions.FILE) else None
    seed = settings.seed if seed is None else seed
    return settings.model_copy(update={"seed": seed, "resume": False, "output_dir": None}), before


@contextlib.contextmanager
def _folder(config: TrainingConfig | None, output_dir: str | Path | None, resume: bool) -> Iterator[Path]:
    """The comparison's folder, for this process alone. Raises WriteError, which says how to go on: its disk is full,
    read-only or broken."""
    settings = config or TrainingConfig()
    given, resume = output_dir if output_dir is not None else settings.output_dir, resume or settings.resume
    if resume and given is None:
        raise ConfigError("resume needs an output_dir: there is nothing to go on from")
    folder = Path(given) if given is not None else Path(tempfile.mkdtemp(prefix="spectune-compare-"))
    try:
        with disk_errors(folder), claimed(folder, "spectune compare", resume=resume, within=WITHIN):
            yield folder
    except WriteError as error:  # what it says to go on with is of one run
        again = command_line("--output-dir", folder, "--resume")
        go_on = f"What had ended is kept. With that mended, the same command with {again}"
        raise WriteError(folder, error.reason, f"{go_on} goes on from there.") from error
    finally:
        if given is None:
            with contextlib.suppress(OSError):  # there is something in it
                folder.rmdir()
