"""A run among others that are trained beside it: its own random numbers, its own end."""

import contextlib
from collections.abc import Iterator

from spectune.deltas import route
from spectune.errors import InterruptedRun, SpectuneError
from spectune.results.run_result import RunResult
from spectune.training.display import Shows
from spectune.training.ending import end, until_its_end
from spectune.training.loop import Loop
from spectune.training.random_stream import RandomStream
from spectune.training.starting import Started


class Lane:
    """One of several runs, from its first step to its last.

    Args:
        started: the run; torch's random state is its own when this is made.
        loop: its steps.
        display: what it tells.

    Attributes:
        result: of a run that has ended.
        error: of one that has failed, or was interrupted.
    """

    def __init__(self, started: Started, loop: Loop, display: Shows) -> None:
        self.started, self.loop, self.display = started, loop, display
        self.result: RunResult | None = None
        self.error: SpectuneError | None = None
        self._stream = RandomStream(loop.model.device)
        self._course = loop.course(display)
        self._open = contextlib.ExitStack()

    @property
    def name(self) -> str:
        return self.started.run.delta.name

    def begin(self) -> bool:
        """What comes before the first step. Returns whether the run goes on."""
        with self._failing():
            self._open.enter_context(until_its_end(self.started))
        return self.error is None

    def next_window(self) -> list[list[int]] | None:
        """Do what is due after the last step. Returns the batches of the next one; None where the run has ended, well
        or badly."""
        with self._failing():
            window = next(self._course, None)
            if window is not None:
                return window
            self.close()
            self.result = end(self.started, stopped=self.loop.stopped)
        return None

    def step(self, window: list[list[int]]) -> bool:
        """Launch a step by itself, as a run alone does. Returns whether the run goes on."""
        with self._failing():
            self.loop.begin(window)
        return self.error is None

    def interrupt(self) -> None:
        """A signal came: write a checkpoint."""
        with self._failing():
            raise self.loop.interrupted(self.display)

    def close(self) -> None:
        """Let go of what the run holds open. What else is in flight is left."""
        self._open.close()

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Inside, what is done is the run's own: its delta, its random numbers. Where it fails it ends, alone."""
        try:
            with self._stream.entered(), route(self.loop.model, self.loop.run.delta.name):
                try:
                    yield
                except BaseException as error:
                    # what the run keeps of itself is written, or taken back, as the error says
                    self._open.__exit__(type(error), error, error.__traceback__)
                    raise
        except SpectuneError as error:
            self.error = error

    @property
    def was_interrupted(self) -> bool:
        return isinstance(self.error, InterruptedRun)
