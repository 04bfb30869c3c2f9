"""Steps that several runs take at the same time: one after the other, or in passes that they share."""

import time
from collections.abc import Hashable, Sequence

import torch
from transformers import PreTrainedModel

from spectune.blocks.execution import Execution
from spectune.objectives import objective_of
from spectune.training.async_scalars import AsyncScalars
from spectune.training.interrupt import Interrupts
from spectune.training.joint_batches import JointBatch, in_passes, joint_batch, shares_of
from spectune.training.joint_pass import JointPasses
from spectune.training.joint_step import step_together
from spectune.training.lanes import Lane
from spectune.training.loop import ReadyStep


class Rounds:
    """Drives several runs to their ends, a step of each in turn.

    Args:
        execution: of the passes that runs share.
    """

    def __init__(self, model: PreTrainedModel, interrupts: Interrupts, execution: Execution) -> None:
        self.model, self.interrupts = model, interrupts
        self.passes = JointPasses(model, execution)

    def drive(self, lanes: Sequence[Lane]) -> None:
        """All to their ends, which are in `Lane.result` and `Lane.error`. Raises OutOfMemoryError: a shared pass does
        not fit."""
        known = dict[Hashable, float]()
        living = [lane for lane in lanes if lane.begin(known)]
        while living:
            self._round(living)
            living = [lane for lane in living if lane.goes_on]

    def _round(self, living: Sequence[Lane]) -> None:
        """What is due after the last step of each, and one more of each that has one."""
        windows = [(lane, window) for lane in living if (window := lane.next_window()) is not None]
        if self.interrupts.decided:
            for lane, _ in windows:
                lane.interrupt()
            return
        for lane, _ in windows:
            lane.beside = max(lane.beside, len(windows))
        together = [(lane, window) for lane, window in windows if lane.shares]
        if len(together) < 2:  # to the last bit what the run alone does
            together = []
        for lane, window in windows:
            if (lane, window) not in together:
                lane.step(window, len(windows))
        if together:
            self._shared_step(together, len(windows))

    def _shared_step(self, taking: Sequence[tuple[Lane, list[list[int]]]], of_all: int) -> None:
        """A step of each, in passes that they share; the optimizers' steps are taken at once. `of_all`: runs that take
        a step in this round."""
        begun = time.perf_counter()
        ready = [lane.loop.make_ready(window, collate=False) for lane, window in taking]
        self._launch([lane for lane, _ in taking], ready, self._batches(taking, ready), of_all)
        seconds = (time.perf_counter() - begun) / len(taking)
        for lane, _ in taking:
            lane.settle(seconds)

    def _launch(
        self, lanes: Sequence[Lane], ready: Sequence[ReadyStep], made: Sequence[JointBatch], of_all: int
    ) -> None:
        """Launch a step of each over these batches. Nothing here waits for the device."""
        with lanes[0].loop.measured() as (span, memory):
            # what is in flight ends when the next round looks at it: all of this one have passed by then
            span.runs = of_all if lanes[0].loop.max_in_flight else len(lanes)
            for lane, own in zip(lanes, ready, strict=True):
                lane.loop.run.optimizer.begin(own.rate)
            sums = [torch.zeros((), device=self.model.device) for _ in lanes]
            for batch in made:
                for run, found in zip(batch.runs, self.passes.backward(batch), strict=True):
                    sums[run] += found
            steps = [lane.loop.gathered(own, total) for lane, own, total in zip(lanes, ready, sums, strict=True)]
            norms = step_together([step.optimizer for step in steps])
            numbers = AsyncScalars.of_each([step.numbers(norm) for step, norm in zip(steps, norms, strict=True)])
            for n, (lane, step, norm) in enumerate(zip(lanes, steps, norms, strict=True)):
                lane.loop.launched(step, norm, numbers[n], span, None if n else memory)

    def _batches(self, taking: Sequence[tuple[Lane, list[list[int]]]], ready: Sequence[ReadyStep]) -> list[JointBatch]:
        """The batches of a step of several runs, on the host."""
        shares = [
            share
            for number, ((lane, window), step) in enumerate(zip(taking, ready, strict=True))
            for share in shares_of(number, lane.name, lane.loop.batches, window, step.targets)
        ]
        objective, padding = objective_of(self.model), taking[0][0].loop.batches.pad_token_id
        how = self.passes.execution.packing
        return [
            joint_batch(found, objective, padding, mask_free=how.mask_free, lengths=how.lengths)
            for found in in_passes(shares)
        ]
