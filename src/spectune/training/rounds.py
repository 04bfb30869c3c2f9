"""Steps that several runs take at the same time: one after the other, or in passes that they share."""

import time
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from spectune.blocks.execution import Execution
from spectune.objectives import objective_of
from spectune.training.interrupt import Interrupts
from spectune.training.joint_batches import Share, in_passes, joint_batch
from spectune.training.joint_pass import JointPasses
from spectune.training.joint_step import step_together
from spectune.training.lanes import Lane
from spectune.training.loop import ReadyStep


class Rounds:
    """Drives several runs to their ends, a step of each in turn.

    Args:
        execution: of the passes that runs share.
        mask_free: their padding needs no mask.
    """

    def __init__(
        self, model: PreTrainedModel, interrupts: Interrupts, execution: Execution, *, mask_free: bool
    ) -> None:
        self.model, self.interrupts, self.mask_free = model, interrupts, mask_free
        self.passes = JointPasses(model, execution)

    def drive(self, lanes: Sequence[Lane]) -> None:
        """All to their ends, which are in `Lane.result` and `Lane.error`. Raises OutOfMemoryError: a shared pass does
        not fit."""
        living = [lane for lane in lanes if lane.begin()]
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
                lane.step(window)
        if together:
            self._shared_step(together)

    def _shared_step(self, taking: Sequence[tuple[Lane, list[list[int]]]]) -> None:
        begun = time.perf_counter()
        lanes = [lane for lane, _ in taking]
        ready = [lane.loop.make_ready(window, collate=False) for lane, window in taking]
        made = [
            joint_batch(shares, objective_of(self.model), lanes[0].loop.batches.pad_token_id, mask_free=self.mask_free)
            for shares in in_passes(_shares(taking, ready))
        ]
        with lanes[0].loop.measured() as (span, memory):
            span.runs = len(lanes)
            for lane, step in zip(lanes, ready, strict=True):
                lane.loop.run.optimizer.begin(step.rate)
            sums = [torch.zeros((), device=self.model.device) for _ in lanes]
            for batch in made:
                for run, found in zip(batch.runs, self.passes.backward(batch), strict=True):
                    sums[run] += found
            steps = [lane.loop.gathered(*given) for lane, *given in zip(lanes, ready, sums, strict=True)]
            norms = step_together([step.optimizer for step in steps])
            for number, (lane, step, norm) in enumerate(zip(lanes, steps, norms, strict=True)):
                lane.loop.launched(step, norm, span, None if number else memory)
        seconds = (time.perf_counter() - begun) / len(lanes)
        for lane in lanes:
            lane.settle(seconds)


def _shares(taking: Sequence[tuple[Lane, list[list[int]]]], ready: Sequence[ReadyStep]) -> list[Share]:
    """The batches of one step of each run."""
    return [
        Share(number, lane.name, [lane.loop.batches.examples[row] for row in batch], step.targets)
        for number, ((lane, window), step) in enumerate(zip(taking, ready, strict=True))
        for batch in window
    ]
