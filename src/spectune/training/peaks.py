"""Peaks of a run's memory, by phase: which steps are measured, and how."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from spectune.compute.memory import PeakMemory, counts_tensors

#: the first steps of a process do not count for speed; where memory is counted tensor by tensor, it is in these (they
#: hold the longest batch)
MEMORY_STEPS = 2


class Peaks:
    """Keeps the largest of each phase and kind in `found`, as `<phase>_<kind>`.

    CUDA's allocator keeps its peak at no cost, so there all steps are measured, from one validation to the next
    (`resume` to `pause`); elsewhere tensors are counted, which slows a small model down, so the first steps are.

    Args:
        baseline: tensors that are there before a step.
        found: bytes, from before a run was interrupted too.
    """

    def __init__(self, device: torch.device, baseline: Callable[[], Sequence[Tensor]], found: dict[str, int]) -> None:
        self.device, self.baseline, self.found = device, baseline, found
        self._stretch: PeakMemory | None = None

    def resume(self) -> None:
        """Training goes on."""
        if not counts_tensors(self.device.type):
            self._stretch = PeakMemory(self.device)
            self._stretch.__enter__()

    def pause(self) -> None:
        """Training stops, for a validation say."""
        if self._stretch is not None:
            self._stretch.__exit__(None, None, None)
            self.keep("train", self._stretch)
            self._stretch = None

    @contextlib.contextmanager
    def set_aside(self) -> Iterator[None]:
        """Around what is not to be counted as a step's."""
        measuring = self._stretch is not None
        self.pause()
        try:
            yield
        finally:  # what fails there need not end the run
            if measuring:
                self.resume()

    def of_step(self, first: bool) -> AbstractContextManager[PeakMemory | None]:
        """Around a step; `first`: it is one of the process's first. What it gives is for `keep`."""
        if first and self._stretch is None:
            return PeakMemory(self.device, baseline=self.baseline())
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Around a phase."""
        with PeakMemory(self.device, baseline=self.baseline()) as memory:
            yield
        self.keep(phase, memory)

    def keep(self, phase: str, memory: PeakMemory | None) -> None:
        """Keep what was measured, None for nothing."""
        for kind, size in ({} if memory is None else memory.result).items():
            name = f"{phase}_{kind}"
            self.found[name] = max(size, self.found.get(name, 0))


def largest(found: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """The largest of each phase and kind over several processes."""
    names = dict.fromkeys(name for peaks in found for name in peaks)
    return {name: max(peaks[name] for peaks in found if name in peaks) for name in names}
