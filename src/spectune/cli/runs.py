"""Run folders: the name of a new one, the newest one there is, and what a finished one holds."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from spectune.cli.console import note
from spectune.cli.heads import head_options, labels_of_checkpoint, recorded_labels
from spectune.cli.run_settings import TEXTS, RunSettings
from spectune.cli.settings import NAMING, Settings
from spectune.errors import ConfigError, DataError
from spectune.files.lock import LOCK_FILE
from spectune.files.metadata import check_seal, first_problem, read_json, read_yaml, record_of, without_seal
from spectune.files.plain_text import command_line
from spectune.results.run_result import RunRecord
from spectune.results.vouched import BEST, FILES, FREE, problems_with, vouched_for
from spectune.training.claim import OF_RUN, check_empty, claimed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from spectune.data import Labels

RUNS = Path("runs")
RESULT_FILE, TRAINING_FILE = "result.json", "training.json"
#: what is used of a run beside its weights, and was there when it was finished
_SHOWN = (FREE, f"{BEST}/{TRAINING_FILE}")
_COPY = "copy the run's folder again from where it was written"
#: the files of a delta's folder that name its base, and the keys under which they do
_BASE_NAMES = {"spectune.json": "base_name", "adapter_config.json": "base_model_name_or_path"}


class UnknownBaseError(DataError):
    """A delta's folder does not say which base it belongs to."""


def new_folder(label: str, root: Path = RUNS) -> Path:
    """`runs/<date>-<label>-<n>` with the first `n` that is free. The folder is made, so that nobody else gets its
    name."""
    while True:
        folder = free_name(label, root)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # somebody else has just taken it
            folder.mkdir()
            return folder


def free_name(label: str, root: Path = RUNS) -> Path:
    """The name that `new_folder` would take now."""
    start = f"{datetime.date.today().isoformat()}-{label}-"
    taken = {path.name for path in root.glob(start + "*")}
    number = next(n for n in range(1, len(taken) + 2) if f"{start}{n}" not in taken)
    return root / f"{start}{number}"


def check_output_folder(given: str | None, label: str, *, resume: bool, root: Path = RUNS) -> Path:
    """The folder that a run would go to: the one given, else a new one. Raises ConfigError: it is not empty, or
    `--resume` has no folder to go on in."""
    if given is None:
        if resume:
            folders = sorted((path for path in root.glob("*") if path.is_dir()), key=lambda path: path.stat().st_mtime)
            newest = f" The newest is {folders[-1]}." if folders else ""
            raise ConfigError(f"--resume goes on in a run's folder: name it with --output-dir.{newest}")
        return free_name(label, root)
    folder = Path(given)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output-dir {folder} is a file; expected a folder, or a name that is free")
    if not (folder / LOCK_FILE).exists():  # who has it is said first
        check_empty(folder, resume)
    return folder


@contextlib.contextmanager
def output_folder(
    given: str | None, label: str, doing: str, *, resume: bool, within: Sequence[str] = OF_RUN, root: Path = RUNS
) -> Iterator[Path]:
    """The folder of a run, the one given or a new one, for this process alone. One that was made is taken away again
    where nothing was written.

    Args:
        doing, within: see `spectune.training.claim`.

    Raises:
        ConfigError: it is not empty, or `--resume` has no folder to go on in.
        BusyFolderError: another process has it.
    """
    folder = check_output_folder(given, label, resume=resume, root=root)
    if given is not None:
        with claimed(folder, doing, resume=resume, within=within):
            yield folder
        return
    rooted, folder = root.is_dir(), new_folder(label, root)
    try:
        with claimed(folder, doing, resume=False, within=within):
            yield folder
    finally:
        for made in (folder, *([] if rooted else [root])):
            with contextlib.suppress(OSError):  # there is something in it
                made.rmdir()


def free_folder(given: Path | None, default: Path) -> Path:
    """The folder that a command writes: the one given, else its default. Raises ConfigError: it is a file, or not
    empty: nothing of the user's is written over."""
    folder = default if given is None else given
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; expected a folder, or a name that is free: give --output-dir")
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty: give another folder with --output-dir, or remove this one")
    return folder


def origin(settings: Settings) -> dict[str, Any]:
    """The origin of base and data for a run's config.yaml, so that `--config` with that file repeats the run."""
    keys = ("retain", "device", "dtype", "base_precision")
    named = {key: value for key in ("data", "valid", "test", "split_seed") if (value := settings.get(key)) is not None}
    kept: dict[str, Any] = {key: value for key in keys if (value := settings.text(key)) is not None}
    if settings.placement["allow_missing_weights"]:
        kept["allow_missing_weights"] = True
    return {"model": settings.base, **named, **kept}


def resumed(settings: Settings) -> Settings:
    """With `--resume`: what the user left open as the config.yaml in `--output-dir` has it; what they gave stays.

    Where that is another thing than the run had, training refuses it by name.
    """
    folder = settings.text("output_dir")
    if folder is None or not settings.get("resume") or not os.path.lexists(Path(folder) / FREE):
        return settings
    try:
        recorded = Settings.collect(Path(folder) / FREE, None, {})
    except ConfigError as error:  # the user has not named it
        raise DataError(f"{Path(folder) / FREE} is damaged: {error}") from error
    # whether code may run is for who starts the command to say, not for the folder
    kept = {key: value for key, value in recorded.given.items() if key != "trust_remote_code"}
    if any(key in settings.given for key in NAMING):
        other = settings.method_names([]) != recorded.method_names([])
        # the fields of one method are not for another
        kept = {k: v for k, v in kept.items() if k not in NAMING and not (other and k.startswith("method."))}
    # recorded ones first: where two keys mean the same field, such as method.r and r, the later one counts
    return Settings({**kept, **settings.given})


@dataclass(frozen=True)
class Run:
    """A finished run on disk, a saved delta's folder alone, or a model as it is.

    Attributes:
        delta_folder: None where there is no delta: the base is the model.
        result, config: empty where there is no run.
        rebased: the base is not the run's own word, but the user's.
        trust_remote_code, allow_missing_weights: how the base is loaded, see `spectune.load`.
    """

    folder: Path
    delta_folder: Path | None
    base: str
    result: dict[str, Any]
    config: dict[str, Any]
    rebased: bool = False
    trust_remote_code: bool = False
    allow_missing_weights: bool = False

    def allowing(self, trust_remote_code: bool, allow_missing_weights: bool) -> Run:
        """The same, on a base that is loaded so; what may be missing of it was allowed to the run, too."""
        allowed = allow_missing_weights or self.config.get("allow_missing_weights") is True
        return dataclasses.replace(self, trust_remote_code=trust_remote_code, allow_missing_weights=allowed)

    @property
    def name(self) -> str:
        """For a line that says what is used."""
        return f"run: {self.folder}" if self.delta_folder is not None else f"model: {self.base}, as it is"

    @property
    def delta(self) -> Path:
        """The delta's folder, of what has one."""
        assert self.delta_folder is not None, "a model as it is has no delta"
        return self.delta_folder

    @property
    def folder_name(self) -> str | None:
        """For JSON: None where there is no run."""
        return str(self.folder) if self.delta_folder is not None else None

    @property
    def recorded(self) -> bool:
        """Whether the run says what rows it was trained on: one of the command line does."""
        return "model" in self.config

    @property
    def prompt_options(self) -> dict[str, Any]:
        """How training made a prompt of a row: arguments of `spectune.data.prompts_ids`."""
        train_on, today = str(self.config.get("train_on") or "all"), self.config.get("template_date")
        return {
            "separator": str(self.config.get("separator") or ""), "train_on": train_on,
            "today": None if today is None else str(today),
        }  # fmt: skip

    @property
    def encode_options(self) -> dict[str, Any]:
        """How training made token ids of rows: arguments of `spectune.data.encode`, beside the length."""
        return {**self.prompt_options, "truncation": str(self.config.get("truncation") or "start")}

    @functools.cached_property
    def labels(self) -> Labels | None:
        """What its head says; None of a language model."""
        return (
            labels_of_checkpoint(self.base, self.trust_remote_code)
            if self.delta_folder is None
            else recorded_labels(self.config)
        )

    @property
    def row_options(self) -> dict[str, Any]:
        """How the run's data were read: arguments of `spectune.data.load_rows`, beside `skip_bad_rows`."""
        return {key: self.config.get(key) for key in ("columns", "delimiter", "encoding")}

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's. Raises DataError where it is not to be had."""
        from spectune.storage import load_tokenizer

        return load_tokenizer(self.base, trust_remote_code=self.trust_remote_code)

    def load(
        self, device: str | None, dtype: str | None, base_precision: str | None = None
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The base with the run's delta attached and active. Raises DataError where either is not to be had."""
        from spectune.storage import load, load_delta

        trained_over = self.config.get("base_precision")
        if trained_over is not None and base_precision is None:
            note(f"trained over the base in {trained_over}, and loaded on the base as it is")
        where: dict[str, Any] = {
            "device": device or "auto", "dtype": dtype or "auto", "base_precision": base_precision,
            "trust_remote_code": self.trust_remote_code, "allow_missing_weights": self.allow_missing_weights,
        }  # fmt: skip
        model, tokenizer = load(self.base, **where, **head_options(self.labels))
        if self.delta_folder is not None:
            try:
                load_delta(model, self.delta_folder, name="run")
            except DataError as error:
                if not self.rebased:
                    raise
                raise DataError(
                    f"--model {self.base} with --run {self.folder}: {error}\nLeave out --model, and the run's own base "
                    f"is taken; or --run, and {self.base} is taken as it is."
                ) from error
        return model, tokenizer


def find_run(given: Path | None, root: Path = RUNS) -> Run:
    """The run in a folder; of a comparison, the run with the lowest validation loss; of none, the newest in `root`.

    Raises:
        ConfigError: there is no run yet; says which command makes one.
        DataError: the folder given holds no run.
    """
    if given is None:
        finished = [path for path in root.glob("*") if _runs_in(path)]
        if not finished:
            raise ConfigError(
                f"there is no finished run under {root.absolute()}. `spectune train` or `spectune compare` makes one; "
                "or name a folder with --run."
            )
        given = max(finished, key=lambda path: max(inner.stat().st_mtime for inner in _runs_in(path)))
    if not given.is_dir():
        raise DataError(f"{given} is not a folder; expected a run's, such as runs/<date>-lora-1")
    if inside := _runs_in(given):
        return min((_open(folder) for folder in inside), key=_loss)
    if given.name == "best" and _runs_in(given.parent):
        return _open(given.parent)
    if is_delta(given):
        # how rows became token ids in training (`separator`, `max_length`, ...), as a run's `best/` tells by itself
        config = _checked(read_json(given / TRAINING_FILE) or {}, given / TRAINING_FILE)
        _warn_of_changes(given / TRAINING_FILE, config)
        return Run(given, given, _base_of(given, {}), {}, without_seal(config))
    if is_model(given):
        raise DataError(
            f"{given} is a model and no run: it has no delta to put onto a base. eval and generate take it as it is "
            f"with {command_line('--model', given)}"
        )
    command = "compare" if (given / "runs").is_dir() else "train"
    raise DataError(
        f"{given} holds no finished run: expected best/ and result.json, or a delta's adapter_config.json. "
        f"An interrupted run goes on with: {command_line('spectune', command, '--resume', '--output-dir', given)}"
    )


def model_as_it_is(name: str) -> Run:
    """What `--model` names without a run: a base, a merged model, or a saved delta (ours or PEFT's) on its own base.
    Raises ConfigError: it is a run's folder."""
    folder = Path(name)
    if not folder.is_dir():
        return Run(folder, None, name, {}, {})
    if _runs_in(folder) or (folder.name == "best" and _runs_in(folder.parent)):
        raise ConfigError(f"--model {name} is a run's folder: name it with --run, which takes it on its own base")
    return find_run(folder) if is_delta(folder) else Run(folder, None, name, {}, {})


def find_comparison(given: Path | None, file: str, root: Path = RUNS) -> Path | None:
    """The folder of a comparison, which holds `file`: the one given, else the newest in `root`, None where none is.
    Raises DataError: the folder given holds no such file."""
    if given is not None:
        if not given.is_dir():
            raise DataError(f"{given} is not a folder; expected a comparison's, such as runs/<date>-compare-1")
        if not (given / file).is_file():
            expected = "expected the folder of `spectune compare`"
            if (given / "result.json").is_file() or is_delta(given):
                expected += ", and this is a single run's: spectune eval measures it"
            elif is_model(given):
                command = command_line("spectune", "eval", "--model", given)
                expected += f", and this is a model: {command} measures it"
            raise DataError(f"{given} holds no {file}: {expected}")
        return given
    found = list(root.glob(f"*/{file}"))
    return max(found, key=lambda path: path.stat().st_mtime).parent if found else None


def is_delta(folder: Path) -> bool:
    """Whether a folder holds a saved delta, by its files' names."""
    return any((folder / file).is_file() for file in _BASE_NAMES)


def is_finished(folder: Path) -> bool:
    """Whether a folder is that of a run which has ended, by its files' names."""
    return (folder / "result.json").is_file() and (folder / "best").is_dir()


def is_model(folder: Path) -> bool:
    """Whether a folder holds a model that transformers can load, by its files' names."""
    return (folder / "config.json").is_file()


def _checked(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """A run's settings, whose values are of the types that they are used as. Raises DataError."""
    try:
        RunSettings.model_validate(config)
    except ValidationError as error:
        raise DataError(f"{path} cannot be read as a run's settings ({first_problem(error)}); {_COPY}") from error
    return config


def _warn_of_changes(path: Path, content: dict[str, Any]) -> None:
    check_seal(path, content, warn=lambda said: note(f"warning: {said}"))


def _runs_in(folder: Path) -> list[Path]:
    """The finished runs in a folder: itself, those that were trained together, or those of a comparison."""
    places = [folder, *folder.glob("*"), *folder.glob("runs/*"), *folder.glob("runs/*/*")]
    return [place for place in places if is_finished(place)]


def _open(folder: Path) -> Run:
    saved, config_file = folder / RESULT_FILE, folder / FREE
    result = read_json(saved, what="a run's result", again=_COPY) or {}
    record_of({**result, FILES: None}, saved, RunRecord, what="a run's result", again=_COPY, warn=lambda _: None)
    config = _checked(read_yaml(config_file, again=_COPY, texts=TEXTS) or {}, config_file)
    if not config and os.path.lexists(config_file):
        raise DataError(f"{config_file} is empty, expected a run's settings; {_COPY}")
    run = Run(folder, folder / BEST, _base_of(folder / BEST, config), without_seal(result), config)
    _warn_of_changes(saved, result)
    shown = {name: digest for name, digest in vouched_for(saved, result).items() if name in _SHOWN}
    for problem in problems_with(folder, shown):
        note(f"warning: {problem}; it was changed after the run was finished, and is taken as it is")
    return run


def _base_of(delta_folder: Path, config: dict[str, Any]) -> str:
    """The base that a delta belongs to: as the user named it, else as the delta's folder tells it."""
    if isinstance(config.get("model"), str):
        return str(config["model"])
    for file, key in _BASE_NAMES.items():
        if isinstance(name := (read_json(delta_folder / file, any_integer=True) or {}).get(key), str) and name:
            return name
    raise UnknownBaseError(f"{delta_folder} does not say which base it belongs to: name it with --model")


def _loss(run: Run) -> float:
    loss = run.result.get("valid_loss")
    return float(loss) if isinstance(loss, int | float) else math.inf
