"""One run: what it trains, on what, by which schedule, where it stands, and what it keeps."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from spectune.blocks.execution import Packing
from spectune.data import Example
from spectune.deltas import Delta
from spectune.errors import ConfigError, DivergedError
from spectune.training.config import TrainingConfig
from spectune.training.distribution import World
from spectune.training.observer import Observer
from spectune.training.optimizer import MasterAdamW, learning_rate_at
from spectune.training.optimizers import make_optimizer
from spectune.training.prepare import Prepared, total_steps
from spectune.training.progress import Progress
from spectune.training.random_stream import RandomStream
from spectune.training.step_batches import Batches


class Keeper:
    """What a run keeps as it goes, in memory or on disk; this one nothing."""

    @property
    def resume_hint(self) -> str:
        """A sentence on how to go on after an interruption."""
        return ""

    @property
    def kept_word(self) -> str:
        """What becomes of the best weights, behind a comma; empty where nothing does that lasts."""
        return ""

    def checkpoint(self) -> None: ...

    def keep_best(self) -> None: ...

    def log(self, entry: dict[str, Any]) -> None: ...

    def kept_state(self) -> str:
        """A sentence on which weights are kept."""
        return "Nothing is kept."


@dataclass
class RunState:
    """A run between two steps.

    Attributes:
        batches: the training rows, in batches.
        total_steps: optimizer steps of the whole run.
        observer: what sees where its time goes, and more.
        stream: the random numbers of a run among others; None where torch's own are the run's.
    """

    delta: Delta
    optimizer: MasterAdamW
    batches: Batches
    valid_examples: Sequence[Example]
    config: TrainingConfig
    learning_rate: float
    total_steps: int
    progress: Progress = field(default_factory=Progress)
    keeper: Keeper = field(default_factory=Keeper)
    observer: Observer = field(default_factory=Observer)
    stream: RandomStream | None = None

    @classmethod
    def of(cls, delta: Delta, prepared: Prepared, packing: Packing, world: World) -> RunState:
        """A run at its start. Raises ConfigError where nothing of the delta may be trained, or the optimizer cannot do
        what is configured."""
        config, rate, trained = prepared.config, prepared.learning_rate, trained_parameters(delta)
        batches = Batches(prepared.examples, config, packing, world, prepared.pad_token_id)
        optimizer = make_optimizer(trained, config, rate, world.size, rate_factors(delta, trained))
        total = total_steps(len(prepared.examples), config, world.size)
        return cls(delta, optimizer, batches, prepared.valid, config, rate, total)

    def drawing(self) -> AbstractContextManager[None]:
        """Inside, random numbers are the run's own."""
        return contextlib.nullcontext() if self.stream is None else self.stream.entered()

    def rate_at(self, step: int) -> float:
        """The learning rate of step `step`, from 0."""
        return learning_rate_at(step, self.total_steps, self.learning_rate, self.config)

    def took_step(self, loss: float, norm: float, *, rate: float, tokens: int, targets: int, seconds: float) -> None:
        """Count a step, and log it."""
        now = self.progress
        now.step += 1
        now.window += 1
        now.tokens += tokens
        now.targets += targets
        now.epoch_loss += loss * targets
        now.epoch_targets += targets
        now.seconds += seconds
        if now.step % (self.config.logging_steps or 1) == 0:
            entry = {"step": now.step, "epoch": now.epoch, "loss": loss, "learning_rate": rate, "grad_norm": norm}
            self.keeper.log({**entry, "tokens": now.tokens, "seconds": now.seconds})

    def validated(self, valid_loss: float, by_source: dict[str, float], steps_per_epoch: int) -> str:
        """Keep the best. Returns a line that says what was found. `by_source`: the same of each source's rows."""
        now = self.progress
        train_loss = now.epoch_loss / max(1, now.epoch_targets)
        now.valid_loss, now.valid_loss_by_source = valid_loss, by_source
        best = now.best_loss is None or valid_loss < now.best_loss
        if best:
            now.best_loss, now.best_step, now.without_improvement = valid_loss, now.step, 0
            now.best_loss_by_source = by_source
            self.keeper.keep_best()
        else:
            now.without_improvement += 1
        sources = {f"valid_loss[{name}]": loss for name, loss in by_source.items()}
        found = {"train_loss": train_loss, "valid_loss": valid_loss, **sources}
        self.keeper.log({"step": now.step, "epoch": now.epoch, **found})
        return (
            f"step {now.step} of {self.total_steps} (epoch {now.epoch + now.window / steps_per_epoch:.2f}): "
            f"training loss {train_loss:.4f}, validation loss {valid_loss:.4f}, "
            + (
                f"best so far{self.keeper.kept_word}"
                if best
                else f"not better than {now.best_loss:.4f} of step {now.best_step}"
            )
        )

    @property
    def has_stopped_improving(self) -> bool:
        """Whether so many validations as the config says brought nothing better."""
        patience = self.config.early_stopping_patience
        return patience is not None and self.progress.without_improvement >= patience

    def end_epoch(self, *, whole: bool) -> None:
        """Keep the mean loss of the epoch, or of what there was of it; `whole`: and begin the next."""
        now = self.progress
        now.last_epoch_loss = now.epoch_loss / max(1, now.epoch_targets)
        if whole:
            now.epoch, now.window, now.epoch_loss, now.epoch_targets = now.epoch + 1, 0, 0.0, 0

    def diverged(self, what: str) -> DivergedError:
        """The error that says what is not finite, what is kept, and what to try."""
        return DivergedError(
            f"{what} (learning rate {self.learning_rate:g}). "
            f"{self.keeper.kept_state()} Try a smaller learning_rate, more warmup_steps or a smaller max_grad_norm."
        )


def rate_factors(delta: Delta, trained: Sequence[nn.Parameter]) -> list[float]:
    """What the learning rate of each of the trained weights is multiplied with."""
    own = {id(p): module.rate_factor(name) for _, module in delta.sites for name, p in module.named_parameters()}
    return [own.get(id(parameter), 1.0) for parameter in trained]


def trained_parameters(delta: Delta) -> list[nn.Parameter]:
    """The weights that a run trains. Raises ConfigError where there is none."""
    trained = [parameter for parameter in delta.parameters() if parameter.requires_grad]
    if not trained:
        raise ConfigError(
            f"delta {delta.name!r} has no weight that may be trained: load it with "
            "spectune.load_delta(..., trainable=True), or set requires_grad on its parameters()"
        )
    return trained
