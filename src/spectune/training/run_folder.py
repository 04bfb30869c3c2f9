"""A run's folder (or none) and its best weights: everything that training writes goes through here."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spectune.data import Encoded, Row
from spectune.deltas import Delta
from spectune.errors import ConfigError
from spectune.evaluation import common_answers
from spectune.files.atomic import atomic_file, atomic_write_text
from spectune.files.core_yaml import yaml_text
from spectune.files.disk_errors import disk_errors
from spectune.files.metadata import numbered, read_json, sealed
from spectune.files.plain_text import command_line
from spectune.files.strict_json import strict_json
from spectune.files.tensor_file import write_tensors
from spectune.files.weights import read_weights
from spectune.results.run_result import RunResult
from spectune.results.vouched import digests_of_run
from spectune.training.checkpoint import (
    BEST,
    PREFIX,
    TRAINING_FILE,
    drop_best,
    drop_checkpoints,
    save_checkpoint,
    swap_best,
)
from spectune.training.finished import RESULT_FILE
from spectune.training.identity import FILE as IDENTITY_FILE
from spectune.training.identity import write_identity
from spectune.training.interrupt import held_back
from spectune.training.prepare import Prepared
from spectune.training.run_log import RunLog, board_class
from spectune.training.run_state import Keeper, RunState

#: the weights at the end, where best/ does not hold them as they were trained
END_FILE = "end.safetensors"


def check_folder(folder: Path | None, resume: bool) -> RunResult | None:
    """The result of a finished run that is asked to resume; None where there is something to do. Raises ConfigError
    where there is nothing to resume in."""
    if folder is None:
        if resume:
            raise ConfigError("resume needs an output_dir: there is nothing to go on from")
        return None
    done = folder / RESULT_FILE
    # its seal is looked at once it is known to be the run that is asked for
    return RunResult.load(done, warn=lambda _: None) if resume and os.path.lexists(done) else None


def load_end(folder: Path, delta: Delta) -> None:
    """Give an attached delta the weights that a finished run ended with. Raises DataError where they are gone or
    damaged."""
    end = folder / END_FILE
    if os.path.lexists(end):
        delta.load_training_state_dict(read_weights([end]))
    else:
        delta.files.read(folder / BEST)


def described(rows: Sequence[Row]) -> dict[str, Any]:
    """What a command that writes with the run must know of its training rows, for config.yaml and training.json.

    `row_shape`: "messages", "tokens", "alpaca", "prompt" or "text", the commonest one. `prompt_ends_with`: the white
    space that every prompt ends in, "" where they share none. `row_system`, `row_tools`, `row_template_kwargs`: what
    all chats have before their first question, and give their template; absent where they differ. `row_answers`: the
    few labels that all rows are answered with, where that is so.
    """
    shapes = Counter(_shape(row) for row in rows)
    prompts = [row.prompt for row in rows if row.prompt is not None]
    ending = os.path.commonprefix([prompt[len(prompt.rstrip()) :][::-1] for prompt in prompts])[::-1]  # noqa: RUF071
    found: dict[str, Any] = {
        "row_shape": shapes.most_common(1)[0][0] if rows else "prompt", "prompt_ends_with": ending
    }  # fmt: skip
    chats = [row for row in rows if row.messages]
    systems = [m["content"] if (m := (row.messages or [{}])[0])["role"] == "system" else None for row in chats]
    for key, values in (
        ("row_system", systems), ("row_tools", [row.tools for row in chats]),
        ("row_template_kwargs", [row.template_kwargs for row in chats]),
    ):  # fmt: skip
        if values and values[0] is not None and all(value == values[0] for value in values):
            found[key] = values[0]
    if answers := common_answers(rows):
        found["row_answers"] = list(answers)
    return found


def _shape(row: Row) -> str:
    if row.messages:
        return "messages"
    if row.tokens is not None:
        return "tokens"
    return "text" if row.text is not None else "alpaca" if row.shape == "alpaca" else "prompt"


class RunFolder(Keeper):
    """What one run keeps; with `folder` None all of it in memory alone. Of several processes the first keeps it."""

    def __init__(
        self, folder: Path | None, run: RunState, best: dict[str, Tensor] | None, prepared: Prepared,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:  # fmt: skip
        self._leads = run.batches.world.leads
        self.folder, self.run, self.tokenizer = folder if self._leads else None, run, tokenizer
        #: the weights of the lowest validation loss so far; before the first validation those of the start
        self.best = best if best is not None and self._leads else self._copy()
        self.identity = prepared.identity
        kept = {"task_type", "separator", "train_on", "truncation", "template_date"}
        own = {"max_length": self.identity["max_length"], **run.config.model_dump(mode="json", include=kept)}
        self.training = {**own, **described(prepared.rows)}
        if prepared.labels is not None:
            self.training["row_labels"] = list(prepared.labels.names)
        self._log: RunLog | None = None
        self._whole = "" if self.folder is None else _whole_in(self.folder, run.progress.step)
        run.keeper = self

    def begin(self, encoded: Sequence[Encoded], machine: Mapping[str, Any], origin: Mapping[str, Any]) -> None:
        """Write what is known before training: settings, identity, machine, where every row went.

        A run that goes on keeps the settings it began with.
        """
        if self.folder is None:
            return
        folder, now = self.folder, self.run.progress
        board = board_class() if self.run.config.report_to == "tensorboard" else None
        with self._writing(folder), held_back():
            folder.mkdir(parents=True, exist_ok=True)
            if now.step == 0 or not (folder / IDENTITY_FILE).is_file():
                write_identity(folder, self.identity)
            if now.step == 0 or not (folder / "config.yaml").is_file():
                atomic_write_text(folder / "config.yaml", yaml_text(_settings_of(self, origin)))
            atomic_write_text(folder / "environment.json", strict_json(sealed(machine)) + "\n")
            report = {part: found.report.to_dict() for part, found in zip(("train", "valid"), encoded, strict=True)}
            atomic_write_text(folder / "data_report.json", strict_json(sealed(report)) + "\n")
            if now.best_step is not None:  # best/ may be that of a step that is taken back
                delta, here = self.run.delta, self._copy()
                with _holding(delta, self.best, here):
                    swap_best(folder, delta, now.best_step, self.tokenizer, self.training)
            drop_best(folder)
            drop_checkpoints(folder, now.step, later=False)
            self._log = RunLog(folder, now.step, board)

    @contextlib.contextmanager
    def _writing(self, folder: Path) -> Iterator[None]:
        """Around what is written. Raises WriteError, which says how to go on."""
        with disk_errors(folder, self._whole):
            yield

    def load_best(self) -> None:
        """Give the delta its best weights again."""
        if self._leads:
            self.run.delta.load_training_state_dict(self.best)
        self.run.batches.world.broadcast(self.run.delta.parameters())

    def go_back(self) -> None:
        """After a divergence: give the delta its best weights again, or its first ones, and keep those in `best/`."""
        self.load_best()
        if self.folder is not None and self.run.progress.best_step is None:
            with self._writing(self.folder), held_back():
                swap_best(self.folder, self.run.delta, 0, self.tokenizer, self.training)

    def keep_end(self) -> None:
        """Keep the weights as they are now, if those in `best/` are other ones or folded."""
        if self.folder is None:
            return
        now, end = self.run.progress, self.folder / END_FILE
        other = now.best_step != now.step and not self.run.config.load_best_at_end
        with self._writing(self.folder), held_back():
            if other or self.run.delta.method.as_stored() != self.run.delta.method:
                with atomic_file(end) as temporary:
                    write_tensors(temporary, self.run.delta.training_state_dict())
            else:
                end.unlink(missing_ok=True)  # of an earlier call
            drop_checkpoints(self.folder, now.step)

    def keep_result(self, result: RunResult) -> None:
        """Write the run's result, by which it counts as finished."""
        if self.folder is not None:
            with self._writing(self.folder):
                result.save(self.folder / RESULT_FILE, digests_of_run(self.folder))

    def close(self) -> None:
        if self.folder is not None and self._log is not None:
            with self._writing(self.folder):
                self._log.close()
        self.run.keeper = Keeper()  # no circle keeps the optimizer's memory

    def _copy(self) -> dict[str, Tensor]:
        state = self.run.delta.training_state_dict() if self._leads else {}
        return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def checkpoint(self) -> None:
        if self.folder is None:
            return
        run = self.run
        with run.observer.phases.of("save"), self._writing(self.folder), held_back(), run.drawing():
            if self._log is not None:
                self._log.sync()  # a kill after this goes on from here: what was logged so far is not logged again
            run.progress.seconds_by_phase = run.observer.phases.record()
            save_checkpoint(self.folder, run.progress, run.delta, run.optimizer, self.best, self.identity)
            self._whole = _whole_in(self.folder, run.progress.step)

    def keep_best(self) -> None:
        with self.run.observer.phases.of("save"):
            self.best = self._copy()
            if self.folder is not None:
                with self._writing(self.folder), held_back():
                    swap_best(self.folder, self.run.delta, self.run.progress.step, self.tokenizer, self.training)

    def log(self, entry: dict[str, Any]) -> None:
        if self.folder is not None and self._log is not None:
            with self._writing(self.folder):
                self._log.write(entry)

    @property
    def resume_hint(self) -> str:
        if self.run.config.output_dir is None:
            return "Nothing was written, because the run has no output_dir."
        return (
            f"A checkpoint is in {self.run.config.output_dir}. To go on: the same command with "
            f"{command_line('--output-dir', self.run.config.output_dir, '--resume')}"
        )

    @property
    def kept_word(self) -> str:
        return "" if self.folder is None else ", saved"

    def kept_state(self) -> str:
        where = f" in {self.folder / 'best'}" if self.folder is not None else ""
        if self.run.progress.best_step is None:
            return f"No validation had been passed: the weights of the start (step 0) are kept{where}."
        return f"The last good state, of step {self.run.progress.best_step}, is kept{where}."


def _settings_of(kept: RunFolder, origin: Mapping[str, Any]) -> dict[str, Any]:
    """For config.yaml: `--config` with that file repeats the run."""
    run = kept.run
    return {
        "model": str(run.delta.model.config._name_or_path),
        **origin,
        "method": run.delta.method.model_dump(mode="json"),
        **run.config.model_dump(mode="json", exclude={"resume", "output_dir"}),
        "learning_rate": kept.identity["learning_rate"],
        **kept.training,
    }


def stored_bytes(folder: Path | None) -> int | None:
    """Bytes of the delta's own files in a run's folder; None where nothing is written."""
    found = None if folder is None else read_json(folder / BEST / TRAINING_FILE)
    return None if found is None else int(found["stored_bytes"])


@contextlib.contextmanager
def _holding(delta: Delta, weights: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Iterator[None]:
    """A delta with other weights, for the duration; `after`: those that it has then."""
    delta.load_training_state_dict(weights)
    try:
        yield
    finally:
        delta.load_training_state_dict(after)


def _whole_in(folder: Path, step: int) -> str:
    """What can be relied on in a run's folder whatever the disk does, as a sentence."""
    go_on = f"With that mended, the same command with {command_line('--output-dir', folder, '--resume')}"
    found = [path.name for number, path in numbered(folder, PREFIX) if number <= step]
    if not found:
        return f"No checkpoint had been written yet. {go_on} starts again."
    return f"{found[-1]} there is whole. {go_on} goes on from it."
