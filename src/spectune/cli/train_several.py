"""`spectune train --together`: several methods in shared passes, each into a folder of its own."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectune.cli.console import import_libraries, note
from spectune.cli.heads import decided, head_options
from spectune.cli.input_rows import training_rows
from spectune.cli.runs import origin, output_folder
from spectune.cli.settings import Settings, runs_together
from spectune.errors import ConfigError, InterruptedRun
from spectune.files.plain_text import command_line
from spectune.training.claim import OF_RUN

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from spectune.comparing import Arm
    from spectune.errors import SpectuneError
    from spectune.results import RunResult

LABEL = "together"
WITHIN = ("*", *(f"*/{name}" for name in OF_RUN))


def sharing(arms: Sequence[Arm], settings: Settings) -> list[Arm]:
    """The arms, each with a name of its own, and so a folder. Raises ConfigError: one cannot share the base."""
    from spectune.comparing.arms import arms_of

    arms = arms_of(arms, settings.text("base_precision"))
    if own := [arm.name for arm in arms if arm.task_type != "auto"]:
        raise ConfigError(f"{', '.join(own)}: of runs that share passes all learn the same: set task_type for all")
    alone = [arm.name for arm in arms if arm.method.trains_base]
    if alone:
        raise ConfigError(
            f"{', '.join(alone)} trains the base itself, which runs that share passes have in common: train it by "
            "itself, without --together"
        )
    return arms


def train_several(arms: Sequence[Arm], settings: Settings, out: Console) -> tuple[dict[str, Any], list[SpectuneError]]:
    """Train each arm into `<output-dir>/<arm>`. Returns what is printed with --json, and the errors of those that
    failed. Raises SpectuneError: as `spectune train`, before any step."""
    how: dict[str, Any] = {"resume": settings.training().resume, "within": WITHIN}
    with output_folder(settings.text("output_dir"), LABEL, "spectune train", **how) as folder:
        try:
            return _train_in(folder, arms, settings, out)
        except (InterruptedRun, KeyboardInterrupt) as stop:
            again = command_line("--output-dir", folder, "--resume")
            raise InterruptedRun(f"the runs are in {folder}. To go on: the same command with {again}") from stop


def _train_in(
    folder: Path, arms: Sequence[Arm], settings: Settings, out: Console
) -> tuple[dict[str, Any], list[SpectuneError]]:
    arms = sharing(arms, settings)
    rows, held_out, source = training_rows(settings)
    import_libraries()
    from spectune.storage import load

    labels = decided(settings, rows)
    model, tokenizer = load(settings.base, **settings.placement, **head_options(labels))
    place = f"{model.device}, {str(model.dtype).removeprefix('torch.')}"
    names = ", ".join(arm.name for arm in arms)
    note(f"base: {settings.base} ({place})\ndata: {source}\nmethods: {names}; folder: {folder}")
    if runs_together(settings) == "auto" and model.device.type == "cpu" and len(arms) > 1:
        note("each run has passes of its own: shared ones gain nothing here (cpu); --together N has them")
    learned = "CAUSAL_LM" if labels is None else labels.task_type
    with _recorded(folder, arms, settings):
        found = _Runs(model, tokenizer, (rows, held_out), settings, learned, folder, out).train(arms)
    ended = {name: run.model_dump(mode="json") for name, run in found.results.items()}
    failed = {name: _of_all(str(error), folder, name) for name, error in found.failures.items()}
    for name in ended:
        note(f"kept in {folder / name / 'best'}")
    return {"folder": str(folder), "runs": ended, "failed": failed}, list(found.failures.values())


class _Runs:
    """What is the same for all runs, and what they come to, by name."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: tuple[Any, Any], settings: Settings,
        task_type: str, folder: Path, out: Console,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.rows, self.out = model, tokenizer, rows, out
        self.folder, self.origin, self.most = folder, origin(settings), runs_together(settings)
        self.config = settings.training().model_copy(update={"task_type": task_type})
        self.results: dict[str, RunResult] = {}
        self.failures: dict[str, SpectuneError] = {}

    def train(self, arms: Sequence[Arm]) -> _Runs:
        """All, as many in a pass as share one."""
        from spectune.training.company import MOST, TooManyTogetherError

        most, left = self.most if isinstance(self.most, int) else MOST, list(arms)
        while left:
            try:
                self._train(left[:most])
                left = left[most:]
            except TooManyTogetherError as error:
                if self.most != "auto":
                    raise
                note(f"{error.most} runs share a pass: more do not fit, by the plan")
                most = error.most
        return self

    def _train(self, arms: Sequence[Arm]) -> None:
        from spectune.deltas import attached, detach
        from spectune.errors import RunsFailedError
        from spectune.results import RunResult
        from spectune.training import Run, train_together
        from spectune.training.starting import Asked

        runs = [Run(arm.method, *self.rows) for arm in arms]
        asked = [
            Asked(self.config.model_copy(update={"output_dir": self.folder / arm.name}), arm.name, self.origin)
            for arm in arms
        ]
        try:
            shares: Any = "auto" if self.most == "auto" else True
            results = train_together(
                self.model, self.tokenizer, runs, asked=asked, console=self.out, share_passes=shares
            )
        except RunsFailedError as error:
            self.failures |= error.failures
            results = [run for run in error.results if isinstance(run, RunResult)]
        for name in attached(self.model).copy():
            detach(self.model, name)
        names = [arm.name for arm in arms if arm.name not in self.failures]
        self.results |= dict(zip(names, results, strict=True))


def _of_all(said: str, folder: Path, name: str) -> str:
    """What a run by itself says of how to go on, as it is for all of them."""
    own, of_all = (command_line("--output-dir", place, "--resume") for place in (folder / name, folder))
    return said.replace(own, of_all)


@contextlib.contextmanager
def _recorded(folder: Path, arms: Sequence[Arm], settings: Settings) -> Iterator[None]:
    """Write what `--resume` reads where the command line says nothing; taken back where no run has begun."""
    from spectune.comparing.arms import recorded_arms
    from spectune.files.atomic import atomic_write_text
    from spectune.files.core_yaml import yaml_text
    from spectune.results.vouched import FREE

    recorded = {
        **origin(settings), **recorded_arms(arms), "together": runs_together(settings),
        **settings.training().model_dump(mode="json", exclude={"output_dir", "resume"}),
    }  # fmt: skip
    if not (folder / FREE).is_file():
        atomic_write_text(folder / FREE, yaml_text(recorded))
    try:
        yield
    finally:
        if not any((folder / arm.name).exists() for arm in arms):
            (folder / FREE).unlink(missing_ok=True)
