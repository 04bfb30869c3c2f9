"""The loop. There is one, and it knows no method: it trains whatever `delta.parameters()` gives.

On a CUDA device one step is in flight while the host prepares the next one: a device that waits for the host stands
still, for a fifth of a step of a small model. What a step gave is looked at before anything is done with it
(validation, checkpoints, the end of an epoch), so a run has the numbers of one that waits for every step.
"""

import contextlib
import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spectune.blocks.compile import can_compile_now
from spectune.blocks.execution import Execution
from spectune.compute.memory import PeakMemory
from spectune.deltas import route
from spectune.errors import InterruptedRun, OutOfMemoryError, is_out_of_memory
from spectune.inference import wait_for
from spectune.objectives import objective_of
from spectune.training.async_scalars import AsyncScalars
from spectune.training.display import Shows
from spectune.training.interrupt import Interrupts
from spectune.training.joint_step import AskedStep
from spectune.training.machine import Gauges
from spectune.training.peaks import MEMORY_STEPS, Peaks
from spectune.training.run_state import RunState
from spectune.training.step_clock import Span, StepClock
from spectune.training.validating import measured_losses


@dataclass(frozen=True)
class ReadyStep:
    """An optimizer step that may be launched.

    Attributes:
        number: of the step, from 0.
        batches: on the host; None where a batch has nothing for this process. None at all where whoever takes the step
            makes them.
        targets, tokens: of all its rows, on all processes.
    """

    number: int
    batches: list[dict[str, Tensor] | None]
    targets: int
    tokens: int
    rate: float


@dataclass(frozen=True)
class Gathered:
    """An optimizer step whose gradient is there.

    Attributes:
        sums: its loss sum, and, of several processes, how many had a signal.
        optimizer: what the optimizer is to take.
    """

    ready: ReadyStep
    sums: tuple[Tensor, ...]
    optimizer: AskedStep

    def numbers(self, norm: Tensor) -> list[Tensor]:
        """What the host wants to know of the step, given the norm of its gradient."""
        total, *requests = self.sums
        return [total, norm, *requests]


@dataclass
class _Step:
    """An optimizer step in flight.

    Attributes:
        scalars: its loss sum, the gradient's norm, and how many processes had a signal.
        memory: what was allocated, where tensors are counted; None otherwise.
    """

    scalars: AsyncScalars
    ready: ReadyStep
    span: Span
    memory: PeakMemory | None


class Loop:
    """Drives a run from where its progress is, with its steps executed as `execution` says.

    Args:
        interrupts, peaks: where runs that are trained together share one of each.
    """

    def __init__(
        self, run: RunState, execution: Execution, interrupts: Interrupts | None = None, peaks: Peaks | None = None
    ) -> None:
        self.run, self.execution = run, execution
        self.model, self.batches = run.delta.model, run.batches
        self.interrupts = interrupts or Interrupts(alone=run.batches.world.size == 1)
        self.max_in_flight = steps_ahead(self.model.device)
        self.peaks = peaks or peaks_of(run)
        #: validation stopped improving, and so did the run
        self.stopped = False
        #: the step from which on steps count for speed
        self._timed_from = run.progress.step + MEMORY_STEPS
        self._in_flight: deque[_Step] = deque()
        #: carried to the next step in flight: 0 if the one before it was applied, NaN if it was skipped
        self._poison: Tensor | None = None
        self._clock = StepClock(Gauges.of(self.model.device.type))

    def drive(self, display: Shows) -> bool:
        """Train to the end. Returns whether it ended early because validation stopped improving.

        Raises:
            InterruptedRun: a signal came; a checkpoint was written after the step in flight.
            OutOfMemoryError: names batch and length.
            DivergedError: loss or gradient is not finite.
        """
        with self.interrupts, self.running():
            self.peaks.resume()
            for window in self.course(display):
                self.begin(window)
        return self.stopped

    def course(self, display: Shows) -> Iterator[list[list[int]]]:
        """The batches of each step, which whoever asks has begun when it asks for the next; what is due between two
        steps is done here: validation, checkpoints, the end of an epoch. Raises as `drive`."""
        run, now = self.run, self.run.progress
        while now.step < run.total_steps:
            windows = self.batches.windows(now.epoch)
            for place, window in enumerate(windows[now.window :], now.window + 1):
                yield window
                step, epoch_ends = now.step + len(self._in_flight), place == len(windows)
                last = step == run.total_steps
                validates = _due(run.config.eval_steps, step, epoch_ends, last)
                saves = _due(run.config.save_steps, step, epoch_ends, last)
                waits = validates or saves or epoch_ends or last or self.interrupts.decided is not None
                self.settle(0 if waits else self.max_in_flight, display)
                self.stopped = self.validate(display) if validates else False
                if epoch_ends or last or self.stopped:
                    run.end_epoch(whole=epoch_ends)
                if saves and not (last or self.stopped):
                    run.keeper.checkpoint()
                if self.stopped:
                    return
                if self.interrupts.decided:
                    raise self.interrupted(display)
                if last:
                    break

    def interrupted(self, display: Shows) -> InterruptedRun:
        """Finish what is in flight and write a checkpoint. Returns what there is to raise."""
        self.settle(0, display)
        self.run.keeper.checkpoint()
        where = f"{self.interrupts.decided} after step {self.run.progress.step} of {self.run.total_steps}"
        return InterruptedRun(f"{where}. {self.run.keeper.resume_hint}")

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

    def begin(self, window: list[list[int]], runs: int = 1) -> None:
        """Launch one optimizer step over some batches. Nothing here waits for the device. `runs`: whose steps pass by
        the time that this one ends."""
        made = self.make_ready(window)
        with self.measured() as (span, memory):
            span.runs = runs
            self.batches.world.seed_step(self.run.config.seed, made.number)
            self.run.optimizer.begin(made.rate)
            loss_sum = torch.zeros((), device=self.model.device)
            for batch in made.batches:
                # the gradient of a step is that of the sum over its target tokens divided by their number, however
                # they are spread over batches and processes
                loss_sum += self.backward(batch, made.targets)
            step = self.gathered(made, loss_sum)
            norm = step.optimizer.take()
            [scalars] = AsyncScalars.of_each([step.numbers(norm)])
            self.launched(step, norm, scalars, span, memory)

    def make_ready(self, window: list[list[int]], *, collate: bool = True) -> ReadyStep:
        """The next step over some batches, on the host. `collate`: make tensors of them."""
        number = self.run.progress.step + len(self._in_flight)
        members = [self.batches.examples[i] for batch in window for i in batch]
        targets = sum(example.target_tokens for example in members)
        tokens = sum(example.length for example in members)
        # data are made ready before the clock starts: speed is that of computing
        packs_of = self.batches.of_step(window) if collate else []
        collated = [self.batches.collate(packs) if packs else None for packs in packs_of]
        for made in filter(None, collated):
            # on the host, where asking costs nothing: on the device it would wait for what runs there
            objective_of(self.model).precompute(made)
        return ReadyStep(number, collated, targets, tokens, self.run.rate_at(number))

    @contextlib.contextmanager
    def measured(self) -> Iterator[tuple[Span, PeakMemory | None]]:
        """Around the launch of a step: when it begins, and, where tensors are counted for it, its memory."""
        first = self.run.observer.memory and self.run.progress.step + len(self._in_flight) < self._timed_from
        with self.peaks.of_step(first=first) as memory:
            if not self._in_flight:
                wait_for(self.model.device)
            yield self._clock.begin(), memory

    def gathered(self, made: ReadyStep, loss_sum: Tensor) -> Gathered:
        """A step whose gradient is there: sum it over processes. `loss_sum`: of this process's rows."""
        run, world = self.run, self.batches.world
        world.sum_gradients(run.delta.parameters())
        total, *requests = world.sum_of_step(loss_sum, self.interrupts.requested is not None)
        # a step behind one that was not taken is not taken either: 0 * inf is no number
        checked = total if self._poison is None else total + self._poison
        asked = AskedStep(run.optimizer, made.rate, run.config.max_grad_norm, checked)
        return Gathered(made, (total, *requests), asked)

    def launched(
        self, step: Gathered, norm: Tensor, scalars: AsyncScalars, span: Span, memory: PeakMemory | None
    ) -> None:
        """The optimizer was told to take a step: it is in flight. `scalars`: of the step's `numbers`."""
        checked = step.optimizer.loss
        assert checked is not None, "a step of training has a loss"
        self._poison = 0.0 * (checked + norm.to(checked.device)) if self.max_in_flight else None
        self._in_flight.append(_Step(scalars, step.ready, span, memory))

    def finish(self) -> float:
        """Look at what the oldest step in flight gave. Returns its mean loss. Raises DivergedError where loss or
        gradient is not finite: it was not taken then, nor any after it."""
        run, now, step = self.run, self.run.progress, self._in_flight.popleft()
        total, norm, *requests = step.scalars.values()
        self.interrupts.agree(sum(requests))
        if not self._in_flight:
            wait_for(self.model.device)
        seconds, cpu = self._clock.took(step.span)
        made = step.ready
        loss = total / made.targets
        for what, value in (("loss", loss), ("gradient's norm", norm)):
            if not math.isfinite(value):
                raise run.diverged(f"the {what} is {value} in step {now.step + 1}")

        if now.step >= self._timed_from:
            now.timed_tokens += made.tokens
            now.timed_seconds += seconds
            now.timed_cpu_seconds += cpu
        self.peaks.keep("train", step.memory)
        run.took_step(loss, norm, rate=made.rate, tokens=made.tokens, targets=made.targets, seconds=seconds)
        return loss

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
            step = self.run.progress.step + len(self._in_flight) + 1
            raise out_of_memory(self.run, step, *batch["input_ids"].shape) from error

    def validate(self, display: Shows) -> bool:
        """Validation loss; keeps the best. Returns whether to stop early. Raises DivergedError: it is not finite."""
        run = self.run
        with run.observer.phases.of("validation"):
            losses = measured_losses(run, self.peaks)
            valid_loss = losses.mean_per_token
            if not math.isfinite(valid_loss):
                raise run.diverged(f"the validation loss is {valid_loss} after step {run.progress.step}")
            sources = losses.by_source(run.valid_examples)
            display.say(run.validated(valid_loss, sources, self.batches.steps_per_epoch))
            if run.progress.best_step == run.progress.step or not run.config.load_best_at_end:
                run.observer.losses = losses
            return run.has_stopped_improving

    def settle(self, left: int, display: Shows) -> None:
        """Finish steps until so many are left in flight. Raises as `finish`."""
        now = self.run.progress
        while len(self._in_flight) > left:
            loss = self.finish()
            display.step(loss, now.timed_tokens / now.timed_seconds if now.timed_seconds else 0.0)


def out_of_memory(run: RunState, step: int, rows: int, length: int) -> OutOfMemoryError:
    """The error that says in which step, from 1, memory ran out, with which batch, and what to try."""
    config = run.config
    # a batch of packs has at most the tokens of so many of the longest rows
    what, size = ("packs", config.per_device_train_batch_size) if run.batches.packing.on else ("rows", rows)
    return OutOfMemoryError(
        f"out of memory in step {step} with a batch of {rows} {what} "
        f"of {length} tokens. Try per_device_train_batch_size={max(1, size // 2)} with gradient_accumulation_steps="
        f"{2 * config.gradient_accumulation_steps}, a smaller max_length, or gradient_checkpointing=true."
    )


def peaks_of(run: RunState) -> Peaks:
    """What measures a run's peaks of memory."""
    # not the run itself: no circle keeps the optimizer's memory
    model, optimizer = run.delta.model, run.optimizer
    found = run.progress.peak_memory_bytes
    return Peaks(model.device, lambda: [*model.parameters(), *optimizer.tensors()], found)


def _due(every: int | None, step: int, epoch_ends: bool, last: bool) -> bool:
    return last or (epoch_ends if every is None else step % every == 0)


def steps_ahead(device: torch.device) -> int:
    """Steps that may be in flight on a device while the host prepares the next one."""
    return 1 if device.type == "cuda" else 0
