"""The loop. There is one, and it knows no method: it trains whatever `delta.parameters()` gives.

On a CUDA device one step is in flight while the host prepares the next one: a device that waits for the host stands
still, for a fifth of a step of a small model. What a step gave is looked at before anything is done with it
(validation, checkpoints, the end of an epoch), so a run has the numbers of one that waits for every step.
"""

import contextlib
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectune.blocks.compile import can_compile_now
from spectune.blocks.execution import Execution
from spectune.compute.memory import PeakMemory, counts_tensors
from spectune.data import Example
from spectune.deltas import route
from spectune.errors import InterruptedRun, OutOfMemoryError, is_out_of_memory
from spectune.evaluation import RowLosses, row_losses
from spectune.inference import wait_for
from spectune.objectives import objective_of
from spectune.training.async_scalars import AsyncScalars
from spectune.training.display import Display
from spectune.training.distribution import World
from spectune.training.interrupt import Interrupts
from spectune.training.machine import Gauges
from spectune.training.peaks import MEMORY_STEPS, Peaks
from spectune.training.run_state import RunState
from spectune.training.shared_validation import shared_losses


@dataclass
class _Step:
    """An optimizer step in flight.

    Attributes:
        scalars: its loss sum, the gradient's norm, and how many processes had a signal.
        began: when the host was done with the data, and the CPU time by then.
        memory: what was allocated, where tensors are counted; None otherwise.
    """

    scalars: AsyncScalars
    targets: int
    tokens: int
    rate: float
    began: tuple[float, float]
    memory: PeakMemory | None


class Loop:
    """Drives a run from where its progress is, with its steps executed as `execution` says."""

    def __init__(self, run: RunState, execution: Execution) -> None:
        self.run, self.execution = run, execution
        self.model, self.batches = run.delta.model, run.batches
        self.interrupts = Interrupts(alone=self.world.size == 1)
        self.max_in_flight = steps_ahead(self.model.device)
        model, optimizer = self.model, run.optimizer  # not the loop itself: no circle keeps the optimizer's memory
        found = run.progress.peak_memory_bytes
        self.peaks = Peaks(model.device, lambda: [*model.parameters(), *optimizer.tensors()], found)
        self._first_step = run.progress.step
        self._in_flight: deque[_Step] = deque()
        #: carried to the next step in flight: 0 if the one before it was applied, NaN if it was skipped
        self._poison: Tensor | None = None
        self._gauges = Gauges.of(self.model.device.type)
        self._last_end = 0.0, 0.0

    @property
    def world(self) -> World:
        return self.run.batches.world

    def drive(self, display: Display) -> bool:
        """Train to the end. Returns whether it ended early because validation stopped improving.

        Raises:
            InterruptedRun: a signal came; a checkpoint was written after the step in flight.
            OutOfMemoryError: names batch and length.
            DivergedError: loss or gradient is not finite.
        """
        run, now = self.run, self.run.progress
        with self.interrupts as interrupts, self.running():
            self.peaks.resume()
            while now.step < run.total_steps:
                windows = self.batches.windows(now.epoch)
                for place, window in enumerate(windows[now.window :], now.window + 1):
                    self.begin(window)
                    step, epoch_ends = now.step + len(self._in_flight), place == len(windows)
                    last = step == run.total_steps
                    validates = _due(run.config.eval_steps, step, epoch_ends, last)
                    saves = _due(run.config.save_steps, step, epoch_ends, last)
                    waits = validates or saves or epoch_ends or last or interrupts.decided is not None
                    self._settle(0 if waits else self.max_in_flight, display)
                    stop = self.validate(display) if validates else False
                    if epoch_ends or last or stop:
                        run.end_epoch(whole=epoch_ends)
                    if saves and not (last or stop):
                        run.keeper.checkpoint()
                    if stop:
                        return True
                    if interrupts.decided:
                        self._settle(0, display)
                        run.keeper.checkpoint()
                        where = f"{interrupts.decided} after step {now.step} of {run.total_steps}"
                        raise InterruptedRun(f"{where}. {run.keeper.resume_hint}")
                    if last:
                        break
        return False

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Inside the `with`, the model trains this run's delta as the execution says."""
        delta = self.run.delta
        self.model.train()
        # by name: whatever else is attached, or active, this delta is what is trained and validated
        applied = self.execution.applied(delta, around_capture=self.peaks.set_aside)
        with route(self.model, delta.name), applied, self.batches.listening(self.model):
            yield

    def step(self, window: list[list[int]]) -> float:
        """One optimizer step over some batches, begun and finished. Returns the mean loss over their target tokens."""
        self.begin(window)
        return self.finish()

    def begin(self, window: list[list[int]]) -> None:
        """Launch one optimizer step over some batches. Nothing here waits for the device."""
        run, number = self.run, self.run.progress.step + len(self._in_flight)
        members = [self.batches.examples[i] for batch in window for i in batch]
        targets = sum(example.target_tokens for example in members)
        tokens = sum(example.length for example in members)
        # data are made ready before the clock starts: speed is that of computing
        collated = [self.batches.collate(packs) if packs else None for packs in self.batches.of_step(window)]
        for made in filter(None, collated):
            # on the host, where asking costs nothing: on the device it would wait for what runs there
            objective_of(self.model).precompute(made)
        measured = self.peaks.of_step(first=run.observer.memory and self._is_first(number))
        rate = run.rate_at(number)

        if not self._in_flight:
            wait_for(self.model.device)
        began = self._gauges.wall(), self._gauges.cpu()
        with measured as memory:
            self.world.seed_step(run.config.seed, number)
            run.optimizer.begin(rate)
            loss_sum = torch.zeros((), device=self.model.device)
            for batch in collated:
                # the gradient of a step is that of the sum over its target tokens divided by their number, however
                # they are spread over batches and processes
                loss_sum += self.backward(batch, targets)
            self.world.sum_gradients(run.delta.parameters())
            total, *requests = self.world.sum_of_step(loss_sum, self.interrupts.requested is not None)
            # a step behind one that was not taken is not taken either: 0 * inf is no number
            checked = total if self._poison is None else total + self._poison
            norm = run.optimizer.step(rate, run.config.max_grad_norm, checked)
            self._poison = 0.0 * (checked + norm.to(checked.device)) if self.max_in_flight else None
            scalars = AsyncScalars(total, norm, *requests)
        self._in_flight.append(_Step(scalars, targets, tokens, rate, began, memory))

    def finish(self) -> float:
        """Look at what the oldest step in flight gave. Returns its mean loss. Raises DivergedError where loss or
        gradient is not finite: it was not taken then, nor any after it."""
        run, now, step = self.run, self.run.progress, self._in_flight.popleft()
        total, norm, *requests = step.scalars.values()
        self.interrupts.agree(sum(requests))
        if not self._in_flight:
            wait_for(self.model.device)
        ended = self._gauges.wall(), self._gauges.cpu()
        # behind another step it began when that one ended
        seconds, cpu = (end - max(begun) for end, *begun in zip(ended, step.began, self._last_end, strict=True))
        self._last_end = ended
        loss = total / step.targets
        for what, value in (("loss", loss), ("gradient's norm", norm)):
            if not math.isfinite(value):
                raise run.diverged(f"the {what} is {value} in step {now.step + 1}")

        if not self._is_first(now.step):
            now.timed_tokens += step.tokens
            now.timed_seconds += seconds
            now.timed_cpu_seconds += cpu
        self.peaks.keep("train", step.memory)
        run.took_step(loss, norm, rate=step.rate, tokens=step.tokens, targets=step.targets, seconds=seconds)
        return loss

    def ahead(self, window: list[list[int]]) -> float | None:
        """One more step, as a run takes it: begin it, then finish what is more than may be in flight. Returns the loss
        of the last one that was finished, if any was."""
        self.begin(window)
        return self.finish() if len(self._in_flight) > self.max_in_flight else None

    def backward(self, batch: Mapping[str, Tensor] | None, targets: int) -> Tensor:
        """Add the gradient of this process's share of a batch, which may be none. Returns its loss sum, detached."""
        if batch is None:
            return torch.zeros((), device=self.model.device)
        try:
            with self.batches.placed(self.model, batch) as placed, self.execution.attention(placed):
                loss_sum, _ = objective_of(self.model).loss_sum(
                    self.model, placed, fuse=self.execution.compiled and can_compile_now()
                )
                torch.autograd.backward(loss_sum / targets)
                return loss_sum.detach()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise self._out_of_memory(*batch["input_ids"].shape) from error

    def validate(self, display: Display) -> bool:
        """Validation loss; keeps the best. Returns whether to stop early. Raises DivergedError: it is not finite."""
        with self.run.observer.phases.of("validation"):
            return self._validate(display)

    def _validate(self, display: Display) -> bool:
        run = self.run
        self.peaks.pause()
        if counts_tensors(self.model.device.type):
            if run.observer.memory and not any(name.startswith("valid_") for name in self.peaks.found):
                # its peak of memory is that of its first batch, the longest rows. They are run once for it, beside the
                # run's own validation, which counting tensors would slow down
                order = sorted(run.valid_examples, key=lambda example: -example.length)
                with self.peaks.of("valid"):
                    self.valid_losses(order[: run.config.per_device_eval_batch_size])
            losses = self.valid_losses()
        else:
            with self.peaks.of("valid"):
                losses = self.valid_losses()
        valid_loss = losses.mean_per_token
        self.peaks.resume()
        if not math.isfinite(valid_loss):
            raise run.diverged(f"the validation loss is {valid_loss} after step {run.progress.step}")
        sources = losses.by_source(run.valid_examples)
        display.say(run.validated(valid_loss, sources, self.batches.steps_per_epoch))
        if run.progress.best_step == run.progress.step or not run.config.load_best_at_end:
            run.observer.losses = losses
        return run.has_stopped_improving

    def valid_losses(self, examples: Sequence[Example] | None = None) -> RowLosses:
        """The loss of each validation row under the current route, of which each process takes a share; of these
        examples, if there are any, on this process alone."""
        batch = self.run.config.per_device_eval_batch_size

        def losses(rows: Sequence[Example]) -> RowLosses:
            return row_losses(self.model, rows, self.batches.pad_token_id, batch)

        if examples is not None:
            return losses(examples)
        return shared_losses(self.run.valid_examples, losses, self.world, self.model.device)

    def _settle(self, left: int, display: Display) -> None:
        """Finish steps until so many are left in flight."""
        now = self.run.progress
        while len(self._in_flight) > left:
            loss = self.finish()
            display.step(loss, now.timed_tokens / now.timed_seconds if now.timed_seconds else 0.0)

    def _is_first(self, step: int) -> bool:
        return step < self._first_step + MEMORY_STEPS

    def _out_of_memory(self, rows: int, length: int) -> OutOfMemoryError:
        config = self.run.config
        # a batch of packs has at most the tokens of so many of the longest rows
        what, size = ("packs", config.per_device_train_batch_size) if self.batches.packing.on else ("rows", rows)
        return OutOfMemoryError(
            f"out of memory in step {self.run.progress.step + len(self._in_flight) + 1} with a batch of {rows} {what} "
            f"of {length} tokens. Try per_device_train_batch_size={max(1, size // 2)} with gradient_accumulation_steps="
            f"{2 * config.gradient_accumulation_steps}, a smaller max_length, or gradient_checkpointing=true."
        )


def _due(every: int | None, step: int, epoch_ends: bool, last: bool) -> bool:
    return last or (epoch_ends if every is None else step % every == 0)


def steps_ahead(device: torch.device) -> int:
    """Steps that may be in flight on a device while the host prepares the next one."""
    return 1 if device.type == "cuda" else 0
