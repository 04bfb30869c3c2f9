"""The loop. There is one, and it knows no method: it trains whatever `delta.parameters()` gives.

On a CUDA device one step is under way while the host makes the next one ready: a device that waits for the host stands
still, for a fifth of a step of a small model. What a step gave is looked at before anything is done with it
(validation, checkpoints, the end of an epoch), so a run comes to the same as one that waits for every step.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers import PreTrainedModel

from spectune.compute.memory import PeakMemory
from spectune.data import Example, batches, by_length
from spectune.deltas import Delta
from spectune.errors import DivergedError, InterruptedRun, OutOfMemoryError
from spectune.evaluation import RowLosses, row_losses
from spectune.inference import is_out_of_memory, wait_for
from spectune.objectives import CAUSAL_LM
from spectune.training.answer import Answer
from spectune.training.checkpoint import Progress
from spectune.training.config import TrainingConfig
from spectune.training.display import Display
from spectune.training.distribution import World
from spectune.training.interrupt import Interrupts
from spectune.training.optimizer import MasterAdamW, learning_rate_at
from spectune.training.packing import Packing

#: the first steps of a process do not count for speed; where memory is counted tensor by tensor, it is in these (they
#: hold the longest batch)
MEMORY_STEPS = 2


@dataclass
class Keeper:
    """What a run keeps as it goes, in memory or on disk."""

    checkpoint: Callable[[], None]
    keep_best: Callable[[], None]
    log: Callable[[dict[str, Any]], None]
    resume_hint: str
    kept_state: Callable[[], str]


@dataclass
class _Step:
    """An optimizer step that the device was given.

    Attributes:
        answer: its loss sum and the gradient's norm.
        began: when the host was done with the data.
        memory: what was allocated, where tensors are counted; None otherwise.
    """

    answer: Answer
    targets: int
    tokens: int
    rate: float
    began: float
    memory: PeakMemory | None


@dataclass
class Loop:
    """One run of training."""

    model: PreTrainedModel
    delta: Delta
    optimizer: MasterAdamW
    train_examples: Sequence[Example]
    valid_examples: Sequence[Example]
    pad_token_id: int
    config: TrainingConfig
    learning_rate: float
    total_steps: int
    progress: Progress
    keeper: Keeper
    world: World
    packing: Packing = field(default_factory=Packing)
    #: the blocks are compiled: then the loss is, too
    compiled: bool = False
    _lengths: list[int] = field(default_factory=list, init=False)
    _under_way: deque[_Step] = field(default_factory=deque, init=False)
    #: steps that may be under way while the host goes on
    _ahead: int = field(default=0, init=False)
    #: 0 behind a step that was taken, NaN behind one that was not; None where none is begun behind another
    _behind: Tensor | None = field(default=None, init=False)
    _last_end: float = field(default=0.0, init=False)
    _validated_here: bool = field(default=False, init=False)
    _stretch: PeakMemory | None = field(default=None, init=False)

    def run(self, display: Display) -> bool:
        """Train to the end. Returns whether it ended early because validation stopped improving.

        Raises:
            InterruptedRun: a signal came; a checkpoint was written after the step under way.
            OutOfMemoryError: names batch and length.
            DivergedError: loss or gradient is not finite.
        """
        now, config = self.progress, self.config
        self.model.train()
        self._begin_stretch()
        with Interrupts() as interrupts, self.packing.listening(self.model):
            while now.step < self.total_steps:
                windows = self.windows(self._lengths, now.epoch)
                for place, window in enumerate(windows[now.window :], now.window + 1):
                    self.begin(window)
                    step, epoch_ends = now.step + len(self._under_way), place == len(windows)
                    last = step == self.total_steps
                    validates = self._due(config.eval_steps, step, epoch_ends or last)
                    saves = self._due(config.save_steps, step, epoch_ends or last)
                    asked = validates or saves or epoch_ends or last or interrupts.requested is not None
                    self._settle(0 if asked else self._ahead, display)
                    stop = self.validate(display) if validates else False
                    if epoch_ends or last or stop:
                        now.last_epoch_loss = now.epoch_loss / max(1, now.epoch_targets)
                    if epoch_ends:
                        now.epoch, now.window, now.epoch_loss, now.epoch_targets = now.epoch + 1, 0, 0.0, 0
                    if saves and not (last or stop):
                        self.keeper.checkpoint()
                    if stop:
                        return True
                    if interrupts.requested:
                        self._settle(0, display)
                        self.keeper.checkpoint()
                        raise InterruptedRun(
                            f"{interrupts.requested} after step {now.step} of {self.total_steps}. "
                            f"{self.keeper.resume_hint}"
                        )
                    if last:
                        break
        return False

    def windows(self, lengths: Sequence[int], epoch: int) -> list[list[list[int]]]:
        """The batches of an epoch, in groups of one optimizer step each."""
        config = self.config
        size = config.per_device_train_batch_size * self.world.size
        steps = batches(
            lengths,
            size * config.gradient_accumulation_steps,
            seed=config.seed,
            epoch=epoch,
            group_by_length=config.group_by_length,
        )
        return [by_length(rows, lengths, size) for rows in steps]

    def step(self, window: list[list[int]]) -> float:
        """One optimizer step over some batches, from its begin to its end. Returns the mean loss over their target
        tokens."""
        self.begin(window)
        return self.finish()

    def begin(self, window: list[list[int]]) -> None:
        """Give the device one optimizer step over some batches. Nothing here waits for it."""
        config, number = self.config, self.progress.step + len(self._under_way)
        members = [[self.train_examples[i] for i in batch] for batch in window]
        targets = sum(example.target_tokens for batch in members for example in batch)
        tokens = sum(len(example.input_ids) for batch in members for example in batch)
        # data are made ready before the clock starts: speed is that of computing
        shares = self.packing.of_step(window, self._lengths, config, self.world)
        collated = [self._collated(share) if share else None for share in shares]
        memory = self._memory() if self._is_first(number) and self._stretch is None else None
        rate = learning_rate_at(number, self.total_steps, self.learning_rate, config)

        if not self._under_way:
            wait_for(self.model.device)
        began = time.perf_counter()
        with memory or _nothing():
            self.optimizer.begin(rate)
            loss_sum = torch.zeros((), device=self.model.device)
            for batch in collated:
                # the gradient of a step is that of the sum over its target tokens divided by their number, however
                # they are spread over batches and processes
                loss_sum += self.backward(batch, targets)
            self.world.sum_gradients(self.delta.parameters())
            total = self.world.sum(loss_sum)
            # a step behind one that was not taken is not taken either: 0 * inf is no number
            asked = total if self._behind is None else total + self._behind
            norm = self.optimizer.step(rate, config.max_grad_norm, asked)
            self._behind = 0.0 * (asked + norm.to(asked.device)) if self._ahead else None
            answer = Answer(total, norm)
        self._under_way.append(_Step(answer, targets, tokens, rate, began, memory))

    def finish(self) -> float:
        """Look at what the oldest step under way gave. Returns its mean loss.

        Raises:
            DivergedError: its loss or gradient is not finite. It was not taken then, nor any after it.
        """
        now, step = self.progress, self._under_way.popleft()
        total, norm = step.answer.values()
        if not self._under_way:
            wait_for(self.model.device)
        ended = time.perf_counter()
        # behind another step it began when that one ended
        seconds, self._last_end = ended - max(step.began, self._last_end), ended
        loss = total / step.targets
        if not math.isfinite(loss):
            raise DivergedError(self._diverged(f"the loss is {loss} in step {now.step + 1}"))
        if not math.isfinite(norm):
            raise DivergedError(self._diverged(f"the gradient's norm is {norm} in step {now.step + 1}"))

        if not self._is_first(now.step):
            now.timed_tokens += step.tokens
            now.timed_seconds += seconds
        now.step += 1
        now.window += 1
        now.tokens += step.tokens
        now.targets += step.targets
        now.epoch_loss += loss * step.targets
        now.epoch_targets += step.targets
        now.seconds += seconds
        if step.memory is not None:
            self._keep_peak("train", step.memory)
        if now.step % (self.config.logging_steps or 1) == 0:
            entry = {"step": now.step, "epoch": now.epoch, "loss": loss, "learning_rate": step.rate, "grad_norm": norm}
            self.keeper.log({**entry, "tokens": now.tokens, "seconds": now.seconds})
        return loss

    def ahead(self, window: list[list[int]]) -> float | None:
        """One more step, as a run takes it: begin it, then finish what is more than may be under way. Returns the loss
        of the last one that was finished, if any was."""
        self.begin(window)
        return self.finish() if len(self._under_way) > self._ahead else None

    def _settle(self, left: int, display: Display) -> None:
        """Finish steps until so many are left under way."""
        now = self.progress
        while len(self._under_way) > left:
            loss = self.finish()
            display.step(loss, now.timed_tokens / now.timed_seconds if now.timed_seconds else 0.0)

    def _is_first(self, step: int) -> bool:
        return step < self._first_step + MEMORY_STEPS

    def _collated(self, packs: list[list[int]]) -> dict[str, Tensor]:
        batch = self.packing.collate([[self.train_examples[i] for i in pack] for pack in packs], self.pad_token_id)
        # made here, where asking costs nothing: on the device it would wait for what runs there
        CAUSAL_LM.precompute(batch)
        return batch

    def backward(self, batch: Mapping[str, Tensor] | None, targets: int) -> Tensor:
        """Add the gradient of this process's share of a batch, which may be none. Returns its loss sum, detached."""
        if batch is None:
            return torch.zeros((), device=self.model.device)
        try:
            with self.packing.placed(self.model, batch) as placed:
                return self._compute(placed, targets)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            rows, length = batch["input_ids"].shape
            # a batch of packs has at most the tokens of so many of the longest rows
            step = self.progress.step + len(self._under_way) + 1
            what, size = ("packs", self.config.per_device_train_batch_size) if self.packing.on else ("rows", rows)
            raise OutOfMemoryError(
                f"out of memory in step {step} with a batch of {rows} {what} of {length} tokens. Try "
                f"per_device_train_batch_size={max(1, size // 2)} with gradient_accumulation_steps="
                f"{2 * self.config.gradient_accumulation_steps}, a smaller max_length, or gradient_checkpointing=true."
            ) from error

    def _compute(self, placed: Mapping[str, Tensor], divisor: int) -> Tensor:
        # where tensors are counted one by one nothing can be compiled
        fuse = self.compiled and _get_current_dispatch_mode() is None
        loss_sum, _ = CAUSAL_LM.loss_sum(self.model, placed, fuse=fuse)
        torch.autograd.backward(loss_sum / divisor)
        return loss_sum.detach()

    def validate(self, display: Display) -> bool:
        """Validation loss; keeps the best. Returns whether to stop early. Raises DivergedError: it is not finite."""
        now = self.progress
        train_loss = now.epoch_loss / max(1, now.epoch_targets)
        self._end_stretch()
        if not self._validated_here:
            self._measure_validation()
            self._validated_here = True
        valid_loss = self.valid_loss()
        self._begin_stretch()
        if not math.isfinite(valid_loss):
            raise DivergedError(self._diverged(f"the validation loss is {valid_loss} after step {now.step}"))
        now.valid_loss = valid_loss
        best = now.best_loss is None or now.valid_loss < now.best_loss
        if best:
            now.best_loss, now.best_step, now.without_improvement = now.valid_loss, now.step, 0
            self.keeper.keep_best()
        else:
            now.without_improvement += 1
        self.keeper.log({"step": now.step, "epoch": now.epoch, "train_loss": train_loss, "valid_loss": now.valid_loss})
        display.say(
            f"step {now.step} of {self.total_steps} (epoch {now.epoch + now.window / self._windows_per_epoch:.2f}): "
            f"training loss {train_loss:.4f}, validation loss {now.valid_loss:.4f}, "
            + ("best so far, saved" if best else f"not better than {now.best_loss:.4f} of step {now.best_step}")
        )
        patience = self.config.early_stopping_patience
        return patience is not None and now.without_improvement >= patience

    def valid_loss(self) -> float:
        """Mean loss per target token of the validation rows, under the current route."""
        return self._losses(self.valid_examples).mean_per_token

    def _losses(self, examples: Sequence[Example]) -> RowLosses:
        return row_losses(self.model, examples, self.pad_token_id, self.config.per_device_eval_batch_size)

    def _measure_validation(self) -> None:
        """The peak of memory of validation, which is that of its first batch: the longest rows. They are run once for
        it, beside the run's own validation, which counting tensors would slow down."""
        order = sorted(self.valid_examples, key=lambda example: -len(example.input_ids))
        with self._memory() as memory:
            self._losses(order[: self.config.per_device_eval_batch_size])
        self._keep_peak("valid", memory)

    def _begin_stretch(self) -> None:
        """CUDA's allocator keeps its peak at no cost, so there all steps are measured, from one validation to the next;
        elsewhere tensors are counted, which slows a small model down, so the first steps are."""
        if _keeps_its_peak(self.model.device):
            self._stretch = PeakMemory(self.model.device)
            self._stretch.__enter__()

    def _end_stretch(self) -> None:
        if self._stretch is not None:
            self._stretch.__exit__(None, None, None)
            self._keep_peak("train", self._stretch)
            self._stretch = None

    def _keep_peak(self, phase: str, memory: PeakMemory) -> None:
        peaks = self.progress.peak_memory_bytes
        for kind, size in memory.result.items():
            peaks[f"{phase}_{kind}"] = max(size, peaks.get(f"{phase}_{kind}", 0))

    def _due(self, every: int | None, step: int, epoch_ends: bool) -> bool:
        return epoch_ends if every is None else step % every == 0 or step == self.total_steps

    def __post_init__(self) -> None:
        self._first_step = self.progress.step
        self._ahead = steps_ahead(self.model.device)
        self._lengths = [len(example.input_ids) for example in self.train_examples]
        per_step = self.config.per_device_train_batch_size * self.world.size * self.config.gradient_accumulation_steps
        self._windows_per_epoch = math.ceil(len(self.train_examples) / per_step)

    def _memory(self) -> PeakMemory:
        return PeakMemory(self.model.device, baseline=[*self.model.parameters(), *self.optimizer.tensors()])

    def _diverged(self, what: str) -> str:
        return (
            f"{what} (learning rate {self.learning_rate:g}). "
            f"{self.keeper.kept_state()} Try a smaller learning_rate, more warmup_steps or a smaller max_grad_norm."
        )


def steps_ahead(device: torch.device) -> int:
    """Steps that may be under way on a device while the host makes the next one ready."""
    return 1 if device.type == "cuda" else 0


def _keeps_its_peak(device: torch.device) -> bool:
    return device.type == "cuda"


class _nothing:  # noqa: N801 - a context that does nothing, written like one
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...
