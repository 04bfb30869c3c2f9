"""A run among others that are trained beside it: its own random numbers, its own time, its own end."""

import contextlib
from collections.abc import Hashable, Iterator, MutableMapping

from spectune.deltas import Attachment, route
from spectune.errors import SpectuneError
from spectune.results.run_result import RunResult
from spectune.training.display import Shows
from spectune.training.ending import end, until_its_end
from spectune.training.loop import Loop
from spectune.training.starting import Started


class Lane:
    """One of several runs, from its first step to its last. Where it fails it ends, alone.

    Args:
        shares: its rows may be in a pass with others.

    Attributes:
        beside: the most runs that took a step in turn or together with it, itself included.
        result: of a run that has ended.
        error: of one that has failed, or was interrupted.
    """

    def __init__(self, started: Started, loop: Loop, display: Shows, *, shares: bool) -> None:
        self.started, self.loop, self.display, self.shares = started, loop, display, shares
        self.beside = 1
        self.result: RunResult | None = None
        self.error: SpectuneError | None = None
        self._course = loop.course(display)
        self._open = contextlib.ExitStack()
        attachment = Attachment.of(loop.model)
        assert attachment is not None
        self._state = attachment.state
        with route(loop.model, self.name):  # the same in every step, as compiled and captured blocks look at it
            self._route = self._state.current

    @property
    def name(self) -> str:
        """Its delta's."""
        return self.started.run.delta.name

    @property
    def goes_on(self) -> bool:
        """Whether it has neither ended nor failed."""
        return self.result is None and self.error is None

    def begin(self, known: MutableMapping[Hashable, float]) -> bool:
        """What comes before the first step. `known`: losses of the bare base, by rows. Returns whether the run goes
        on."""
        run, prepared = self.started.run, self.started.prepared
        now, rows = run.progress, (prepared.encoded[1].sha256, run.config.per_device_eval_batch_size)
        if now.base_valid_loss is None and self.started.asked.base_valid_loss is None:
            now.base_valid_loss = known.get(rows)
        with self._own_part():
            self._open.enter_context(until_its_end(self.started))
            if now.base_valid_loss is not None:
                known[rows] = now.base_valid_loss
        return self.goes_on

    def next_window(self) -> list[list[int]] | None:
        """Do what is due after the last step. Returns the batches of the next one; None where the run has ended, well
        or badly."""
        with self._own_part():
            window = next(self._course, None)
            if window is not None:
                return window
            self.close()
            self.result = end(self.started, stopped=self.loop.stopped, beside=self.beside)
        return None

    def step(self, window: list[list[int]], of_all: int) -> None:
        """A step by itself, as a run alone takes it, of `of_all` runs that take one in turn."""
        with self._own_part(), self.loop.run.drawing(), self.loop.batches.listening(self.loop.model):
            # what is in flight ends when the next turn looks at it: those of the others have passed by then
            self.loop.begin(window, of_all if self.loop.max_in_flight else 1)
            self.loop.settle(self.loop.max_in_flight, self.display)

    def settle(self, seconds: float) -> None:
        """A step was launched together with others. `seconds`: the run's part of the time that it took."""
        with self._own_part(seconds):
            self.loop.settle(self.loop.max_in_flight, self.display)

    def interrupt(self) -> None:
        """A signal came: write a checkpoint."""
        with self._own_part():
            raise self.loop.interrupted(self.display)

    def close(self) -> None:
        """Let go of what the run holds open."""
        self._open.close()

    @contextlib.contextmanager
    def _own_part(self, worked: float = 0.0) -> Iterator[None]:
        """Inside, what is done is the run's own: its delta is on, and its time passes, with so many seconds of what
        others did meanwhile."""
        phases = self.started.asked.observer.phases
        phases.go_on(worked)
        try:
            with self._state.routed(self._route):
                try:
                    yield
                except BaseException as error:
                    # what the run keeps is written, or taken back, as the error says
                    self._open.__exit__(type(error), error, error.__traceback__)
                    raise
        except SpectuneError as error:
            self.error = error
        finally:
            phases.pause()
