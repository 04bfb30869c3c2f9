"""`train`: from rows and a method to a trained delta, a folder and a result."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectune.data import Encoded, Example, encode, load_rows, split_rows
from spectune.deltas import Delta, Method, attach, route
from spectune.errors import ConfigError, DivergedError
from spectune.evaluation import perplexity
from spectune.storage import atomic_write_text
from spectune.training.checkpoint import Progress, latest_checkpoint, read_state, restore, save_checkpoint, swap_best
from spectune.training.config import TrainingConfig
from spectune.training.display import Display
from spectune.training.distribution import World
from spectune.training.environment import environment
from spectune.training.loop import Keeper, Loop
from spectune.training.optimizer import MasterAdamW
from spectune.training.result import RunResult

#: tokens of a row where the user says nothing, if the base has room for them
DEFAULT_LENGTH = 1024
#: settings that may change between a checkpoint and its resumption
_FREE = {"output_dir", "resume", "logging_steps", "save_steps", "report_to"}


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method_or_delta: Method | Delta,
    train_rows: Any,
    valid_rows: Any = None,
    config: TrainingConfig | None = None,
    *,
    name: str = "default",
    console: Console | None = None,
) -> RunResult:
    """Train one method (attached as `name`) or an attached delta; the delta ends as the best of validation.

    Args:
        train_rows, valid_rows: what `spectune.data.load_rows` takes: paths, lists of dicts, `datasets` objects.
            Without `valid_rows` a seeded tenth of the training rows is held out.
        config: see `TrainingConfig`; with an `output_dir` everything is written there.
        console: where to print; default is standard output.

    Raises:
        ConfigError, DataError: bad settings or data; nothing was trained.
        InterruptedRun, OutOfMemoryError, DivergedError: see `spectune.errors`.
    """
    config = config or TrainingConfig()
    world = World()
    out = (console or Console()) if world.leads else Console(quiet=True)
    folder = config.output_dir
    finished = _check_folder(folder, config.resume)
    if finished is not None:
        out.print(f"the run in {folder} is finished already: nothing to do", soft_wrap=True, highlight=False)
        return finished

    torch.manual_seed(config.seed)
    if isinstance(method_or_delta, Delta):
        delta = method_or_delta
    else:
        delta = attach(model, method_or_delta, name, tokenizer=tokenizer, seed=config.seed)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]
    method = delta.method
    length = _max_length(model, method, config)
    rows = load_rows(train_rows, skip_bad_rows=config.skip_bad_rows)
    if valid_rows is None:
        rows, held_out = split_rows(rows, seed=config.seed)
    else:
        held_out = load_rows(valid_rows, skip_bad_rows=config.skip_bad_rows)
    encoded = [encode(part, tokenizer, max_length=length, separator=config.separator) for part in (rows, held_out)]
    examples, valid = encoded[0].examples, encoded[1].examples
    rate = config.learning_rate or method.default_learning_rate
    optimizer = MasterAdamW(list(delta.parameters()), config, rate)
    total = _total_steps(len(examples), config, world.size)
    identity = _identity(config, method, rate, length, examples, valid)

    progress, best = Progress(), None
    if folder is not None and config.resume and (checkpoint := latest_checkpoint(folder)) is not None:
        progress, recorded = read_state(checkpoint)
        _check_identity(recorded, identity, checkpoint)
        best = restore(checkpoint, delta, optimizer)
        out.print(f"going on from {checkpoint}", soft_wrap=True, highlight=False)

    run = _Run(folder if world.leads else None, delta, optimizer, progress, best, identity, config)
    run.begin(encoded, environment())
    _announce(out, delta, rate, total, len(examples), len(valid), config)
    loop = Loop(
        model=model,
        delta=delta,
        optimizer=optimizer,
        train_examples=examples,
        valid_examples=valid,
        pad_token_id=_pad(tokenizer),
        config=config,
        learning_rate=rate,
        total_steps=total,
        progress=progress,
        keeper=run.keeper(),
        world=world,
    )
    if progress.base_valid_loss is None:
        # full fine-tuning is at its base until the first step; all others leave the base as it is
        with nullcontext() if method.trains_base else route(model, None):
            progress.base_valid_loss = loop.valid_loss()
    try:
        with Display(out, method.label, total, progress.step) as display:
            stopped = loop.run(display)
    except DivergedError:
        if run.best is not None:
            delta.load_training_state_dict(run.best)
        raise
    finally:
        model.train(False)
        run.close()
    if config.load_best_at_end and run.best is not None and progress.best_step != progress.step:
        delta.load_training_state_dict(run.best)
    valid_loss = progress.best_loss if config.load_best_at_end else progress.valid_loss
    world.barrier()
    result = RunResult(
        method=method.name,
        name=delta.name,
        settings=method.model_dump(mode="json"),
        seed=config.seed,
        learning_rate=rate,
        trainable_parameters=delta.num_trained_parameters(),
        stored_parameters=delta.num_parameters(),
        total_parameters=delta.family.num_parameters,
        stored_bytes=run.stored_bytes(),
        steps=progress.step,
        best_step=progress.best_step,
        train_tokens=progress.tokens,
        target_tokens=progress.targets,
        train_loss=progress.last_epoch_loss if progress.last_epoch_loss is not None else math.nan,
        valid_loss=valid_loss,
        base_valid_loss=progress.base_valid_loss,
        valid_perplexity=None if valid_loss is None else perplexity(valid_loss),
        train_tokens_per_second=(progress.timed_tokens or progress.tokens)
        / (progress.timed_seconds or progress.seconds),
        train_seconds=progress.seconds,
        peak_memory_bytes=progress.peak_memory_bytes,
        stopped_early=stopped,
        folder=None if folder is None else str(folder),
    )
    if run.folder is not None:
        result.save(run.folder / "result.json")
    return result


class _Run:
    """A run's folder (or none) and its best weights."""

    def __init__(
        self,
        folder: Path | None,
        delta: Delta,
        optimizer: MasterAdamW,
        progress: Progress,
        best: dict[str, Tensor] | None,
        identity: dict[str, Any],
        config: TrainingConfig,
    ) -> None:
        self.folder = folder
        self.delta = delta
        self.optimizer = optimizer
        self.progress = progress
        self.best = best
        self.identity = identity
        self.config = config
        self._metrics: Any = None
        self._board: Any = None

    def begin(self, encoded: list[Encoded], machine: dict[str, Any]) -> None:
        """Write what is known before training: settings, machine, where every row went."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(
            self.folder / "config.yaml",
            yaml.safe_dump(
                {
                    "model": str(self.delta.model.config._name_or_path),
                    "method": self.delta.method.model_dump(mode="json"),
                    **self.config.model_dump(mode="json", exclude={"resume", "output_dir"}),
                    "learning_rate": self.identity["learning_rate"],
                    "max_length": self.identity["max_length"],
                },
                sort_keys=False,
            ),
        )
        atomic_write_text(self.folder / "environment.json", json.dumps(machine, indent=2) + "\n")
        report = {part: found.report.to_dict() for part, found in zip(("train", "valid"), encoded, strict=True)}
        atomic_write_text(self.folder / "data_report.json", json.dumps(report, indent=2) + "\n")
        self._open_metrics()
        if self.config.report_to == "tensorboard":
            self._board = _tensorboard(self.folder)

    def keeper(self) -> Keeper:
        return Keeper(self._checkpoint, self._keep_best, self._log, self._resume_hint(), self._kept_state)

    def stored_bytes(self) -> int | None:
        """Bytes of the stored delta's files."""
        if self.folder is None or not (self.folder / "best").exists():
            return None
        return sum(file.stat().st_size for file in (self.folder / "best").rglob("*") if file.is_file())

    def close(self) -> None:
        for file in (self._metrics, self._board):
            if file is not None:
                file.close()

    def _checkpoint(self) -> None:
        if self.folder is not None:
            save_checkpoint(self.folder, self.progress, self.delta, self.optimizer, self.best, self.identity)

    def _keep_best(self) -> None:
        self.best = {name: t.detach().cpu().clone() for name, t in self.delta.training_state_dict().items()}
        if self.folder is not None:
            swap_best(self.folder, self.delta, self.progress.step)

    def _log(self, entry: dict[str, Any]) -> None:
        if self._metrics is not None:
            self._metrics.write(json.dumps(entry) + "\n")
            self._metrics.flush()
        if self._board is not None:
            for key, value in entry.items():
                if key not in ("step", "epoch"):
                    self._board.add_scalar(key, value, entry["step"])

    def _open_metrics(self) -> None:
        """Append to metrics.jsonl; after a resumption, lines past the checkpoint are taken back first."""
        assert self.folder is not None
        path = self.folder / "metrics.jsonl"
        if path.is_file():
            lines = [
                line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= self.progress.step
            ]
            atomic_write_text(path, "".join(line + "\n" for line in lines))
        self._metrics = path.open("a", encoding="utf-8")

    def _resume_hint(self) -> str:
        if self.config.output_dir is None:
            return "Nothing was written, because the run has no output_dir."
        return (
            f"A checkpoint is in {self.config.output_dir}. To go on: the same command with "
            f"--output-dir {self.config.output_dir} --resume"
        )

    def _kept_state(self) -> str:
        if self.best is None:
            return "No validation had been reached, so no good state was kept."
        where = f" in {self.folder / 'best'}" if self.folder is not None else ""
        return f"The last good state, of step {self.progress.best_step}, is kept{where}."


def _check_folder(folder: Path | None, resume: bool) -> RunResult | None:
    """The result of a finished run that is asked to resume; None where there is something to do."""
    if folder is None:
        if resume:
            raise ConfigError("resume needs an output_dir: there is nothing to go on from")
        return None
    if not resume and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty: give another output_dir, or resume to go on there")
    done = folder / "result.json"
    return RunResult.load(done) if resume and done.is_file() else None


def _max_length(model: PreTrainedModel, method: Method, config: TrainingConfig) -> int:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = None if context is None else int(context) - method.virtual_tokens
    if config.max_length is None:
        return min(DEFAULT_LENGTH, room) if room is not None else DEFAULT_LENGTH
    if room is not None and config.max_length > room:
        raise ConfigError(
            f"max_length = {config.max_length}, but this base has {context} positions"
            + (f", {method.virtual_tokens} of which {method.label} takes" if method.virtual_tokens else "")
            + f": at most {room}"
        )
    return config.max_length


def _total_steps(rows: int, config: TrainingConfig, processes: int) -> int:
    if config.max_steps > 0:
        return config.max_steps
    batch_count = math.ceil(rows / (config.per_device_train_batch_size * processes))
    per_epoch = math.ceil(batch_count / config.gradient_accumulation_steps)
    return max(1, round(per_epoch * config.num_train_epochs))


def _identity(
    config: TrainingConfig, method: Method, rate: float, length: int, examples: list[Example], valid: list[Example]
) -> dict[str, Any]:
    """What must be the same when a run goes on."""
    digest = hashlib.sha256()
    for example in (*examples, *valid):
        digest.update(repr((example.input_ids, example.prompt_length)).encode())
    settings = config.model_dump(mode="json", exclude=_FREE)
    return {
        **settings,
        "learning_rate": rate,
        "max_length": length,
        "method": method.model_dump(mode="json"),
        "data_sha256": digest.hexdigest(),
    }


def _check_identity(recorded: dict[str, Any], wanted: dict[str, Any], checkpoint: Path) -> None:
    changed = [
        f"{key}: {recorded.get(key)!r} in the checkpoint, {wanted.get(key)!r} now"
        for key in wanted
        if recorded.get(key) != wanted[key]
    ]
    if changed:
        raise ConfigError(
            f"{checkpoint} is of a run with other settings; go on with the same, or start in a new folder:\n"
            + "\n".join(changed)
        )


def _announce(
    out: Console, delta: Delta, rate: float, total: int, rows: int, valid: int, config: TrainingConfig
) -> None:
    trained, base = delta.num_trained_parameters(), delta.family.num_parameters
    lines = [
        f"{delta.method.label}: {trained:,} trainable of {base:,} weights ({100 * trained / base:.4g}%)",
        f"{total} steps of {config.per_device_train_batch_size * config.gradient_accumulation_steps} rows, "
        f"{rows:,} rows to train on, {valid:,} to validate, learning rate {rate:g}"
        + ("" if config.learning_rate else f" (default; {delta.method.default_learning_rate_source})"),
    ]
    if (notice := delta.method.notice(delta.family)) is not None:
        lines.append(f"note: {notice}")
    for line in lines:
        out.print(line, soft_wrap=True, highlight=False, markup=False)


def _pad(tokenizer: PreTrainedTokenizerBase) -> int:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(pad or 0)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut short by a crash


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("report_to = tensorboard needs the package: pip install 'spectune[tensorboard]'") from error
    writer: Callable[..., Any] = SummaryWriter
    return writer(str(folder / "tensorboard"))
