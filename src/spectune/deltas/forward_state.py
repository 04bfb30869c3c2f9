"""What is in force on one model: the route of the running task, and the layout of the forward pass that runs.

A route belongs to the thread and the task (`contextvars`) that entered it: threads and coroutines that share a model do
not see each other's. A forward pass runs from beginning to end on one thread, so what is known of it is kept by thread.
Nothing here knows a delta or a hook.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from spectune.compute.pack_layout import Kernel, Pack
from spectune.deltas.frames import calling_generator, running_generators
from spectune.deltas.layout import BatchLayout, Route
from spectune.deltas.running_passes import RunningPasses
from spectune.deltas.stacking import Stacking
from spectune.deltas.table_route import KeepsDeltas


class TaskLocal:
    """A value of the running thread and task. While it is not set, `value` is this object itself.

    torch.compile cannot trace `ContextVar.get`. A property whose getter is a C function it takes to have no side
    effects: it reads the value, and reads it again whenever it checks its guards."""

    variable: ContextVar[Any]
    value: Any

    def __new__(cls) -> TaskLocal:
        variable: ContextVar[Any] = ContextVar("spectune")
        kind = type("TaskLocal", (TaskLocal,), {"variable": variable, "value": property(variable.get)})
        return object.__new__(kind)

    def __reduce__(self) -> tuple[Any, ...]:
        return TaskLocal, ()  # a copied model begins with nothing set

    @contextlib.contextmanager
    def entered(self, route: Route) -> Iterator[None]:
        """`value` is an `Entry` of this route inside the `with`, for this thread and task alone."""
        before = self.value
        entry = Entry(route, before if isinstance(before, Entry) else None)
        token = self.variable.set(entry)
        try:
            yield
        finally:
            # a generator may be closed by another task, or after another one that was entered later
            try:
                if self.value is not entry:
                    raise ValueError
                self.variable.reset(token)
            except ValueError:
                entry.over = True


class Entry:
    """A route that a `with` has set.

    Attributes:
        before: what was set before it in its task.
        over: its `with` has ended where it could not be taken back.
        generator: the generator that the `with` stands in, None where it stands in none.
        within: the generators that ran when it was entered.
    """

    def __init__(self, route: Route, before: Entry | None) -> None:
        self.route, self.before, self.over = route, before, False
        self.generator = calling_generator()
        self.within = frozenset() if self.generator is None else running_generators()

    def in_force(self) -> Route | None:
        """The route of the newest `with` that has not ended; of generators that take turns, that of the one which
        runs."""
        entry: Entry | None = self
        newest: Entry | None = None
        running: frozenset[int] | None = None
        while entry is not None:
            if not entry.over:
                if newest is None:
                    newest = entry
                    if entry.generator is None or torch.compiler.is_compiling():
                        return entry.route
                elif entry.generator is not None and entry.generator not in newest.within:
                    running = running_generators() if running is None else running
                    if newest.generator not in running and entry.generator in running:
                        return entry.route
            entry = entry.before
        return None if newest is None else newest.route


class ThreadState(threading.local):
    """What is known on one thread of the forward pass that runs there.

    Attributes:
        layout: how the route lies over its batch; None where all rows are alike and nothing stands before them.
        recomputed: the route and the layout of an earlier pass, while a part of that is computed again.
        pack_ahead: the documents of the packed batch that the next forward passes are of.
        copies: rows that generation makes of each row (beams, return sequences).
        attention_calls: keys and values of each attention call by the module's id, while a probe listens.
        kernel_calls: attention modules that a pack's kernel served, by id, while a probe listens.
        exit: what the decoder's exit does for the pass (`hooks.decoder`).
        outer_call: arguments of the call around the decoder's (`hooks.outer_call`).
    """

    # set for each thread by itself, where torch.compile finds them to guard
    def __init__(self) -> None:
        self.layout: BatchLayout | None = None
        self.recomputed: tuple[Route, BatchLayout | None] | None = None
        self.pack_ahead: Pack | None = None
        self.copies = 1
        self.attention_calls: dict[int, tuple[Tensor, Tensor]] | None = None
        self.kernel_calls: set[int] | None = None
        self.exit: Any = None
        self.outer_call: dict[str, Any] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return ThreadState, ()


class ForwardState:
    """Which delta each row uses on one model, now.

    Attributes:
        active: the route outside of any `with route`: the newest delta, alone.
        virtual_tokens: by delta, where it has any.
        packing: packed batches may come.
        kernel: attention over their documents; None uses masks.
        longest: tokens of the longest document of all packed batches (0: not known).
        tables: what keeps deltas' operands by slot (`slot_tables`).
        stacking: lays operands of several deltas together; captured blocks read what it keeps.
        passes: which threads run through the model.
        thread: of the pass that runs.
        forget: called where a route of unlike rows ends, on its thread: what is known of its passes holds modules.
    """

    def __init__(self) -> None:
        self.active = Route.of(None)
        self.virtual_tokens: dict[str | None, int] = {}
        self.packing = False
        self.kernel: Kernel | None = None
        self.longest = 0
        self.tables = WeakSet[KeepsDeltas]()
        self.stacking = Stacking()
        self.passes = RunningPasses()
        self.thread = ThreadState()
        self.forget: Callable[[None], None] | None = None
        self._task = TaskLocal()
        self._in_force: dict[object, Route] = {}  # of every thread and task

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if name not in ("tables", "stacking")}
        return {**kept, "_in_force": {}}  # a copied model begins with no route and no tables

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.tables = WeakSet[KeepsDeltas]()
        self.stacking = Stacking()

    @property
    def current(self) -> Route:
        """The route now: in a recomputation that of its pass, else the task's `with route`, else the active delta's."""
        if self.thread.recomputed is not None:
            return self.thread.recomputed[0]
        entry = self._task.value
        routed = entry.in_force() if isinstance(entry, Entry) else None
        return self.active if routed is None else routed

    @property
    def layout(self) -> BatchLayout | None:
        """The layout of the pass that runs, or is recomputed. What an earlier pass left behind, under another route,
        does not count."""
        if self.thread.recomputed is not None:
            return self.thread.recomputed[1]
        layout = self.thread.layout
        return layout if layout is not None and layout.route is self.current else None

    @property
    def pack(self) -> Pack | None:
        """The documents of the pass that runs, or is recomputed; None where it is not packed."""
        layout = self.layout
        return None if layout is None else layout.pack

    def layout_of(self, batch: int) -> BatchLayout:
        """The layout of the pass that runs; of `batch` rows where a part of the model was called by itself."""
        layout = self.layout
        if layout is not None:
            return layout
        return BatchLayout(self.current, self.current.over(batch, self.thread.copies))

    def count_of(self, name: str | None) -> int:
        """Virtual tokens of a delta; 0 for the bare base."""
        return self.virtual_tokens.get(name, 0)

    @property
    def most_virtual_tokens(self) -> int:
        """The most virtual tokens of any row's delta under the current route."""
        return max(self.count_of(name) for name in self.current.names)

    def begin_pass(self, layout: BatchLayout | None) -> None:
        """Note how the current route lies over the batch of the forward pass that begins on this thread."""
        self.thread.layout = layout

    @contextlib.contextmanager
    def routed(self, route: Route | str | None) -> Iterator[None]:
        """Set the route inside the `with`; a name, or None for the bare base, is for all rows."""
        chosen = route if isinstance(route, Route) else Route.of(route)
        entry = object()
        self._in_force[entry] = chosen
        try:
            with self._task.entered(chosen):
                yield
        finally:
            del self._in_force[entry]
            if chosen.mixed and self.forget is not None:
                self.forget(None)
                layout = self.thread.layout
                self.thread.layout = None if layout is not None and layout.route is chosen else layout

    def in_use(self, name: str) -> bool:
        """Whether a `with route` that names the delta is in force in any thread or task, or a slot is kept for it."""
        kept = any(tables.keeps(name) for tables in list(self.tables))
        return kept or any(name in route.names for route in list(self._in_force.values()))

    @contextlib.contextmanager
    def recomputing(self, captured: tuple[Route, BatchLayout | None]) -> Iterator[None]:
        """Inside, the route and layout of an earlier pass are in force on this thread."""
        before, self.thread.recomputed = self.thread.recomputed, captured
        try:
            yield
        finally:
            self.thread.recomputed = before
