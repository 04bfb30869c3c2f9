"""The route of a batch's steps: by the names of its rows' deltas, or by tables of many deltas' weights."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager

import torch
from transformers import PreTrainedModel

from spectune.deltas import Attachment, Kind, Route, SlotTables, TableRoute, gains_by_tables, route
from spectune.inference.decode_batch import DecodeBatch

#: deltas that tables are made for at least
LEAST_SLOTS = 4
#: mixtures of kinds that steps are recorded for by themselves; further ones are computed with all kinds
MOST_MIXTURES = 4


class Mixtures:
    """The sets of kinds that steps are recorded with: not every mixture of rows is to be a step of its own."""

    def __init__(self) -> None:
        self._known: set[frozenset[Kind]] = set()
        self._version: object = None
        #: no further ones
        self.complete = False

    def of(self, kinds: frozenset[Kind], version: object) -> frozenset[Kind] | None:
        """What a step is recorded with where these are to be computed; None is all that there are. `version`: of the
        tables that they are in."""
        if self._version != version:
            self._known, self._version = set(), version
        if kinds not in self._known and (self.complete or len(self._known) >= MOST_MIXTURES):
            return min((known for known in self._known if kinds <= known), key=len, default=None)
        self._known.add(kinds)
        return kinds


class RowDeltas:
    """Which delta each row of a batch has.

    Rows of one delta, or of none, need a route by its name alone. Those of several read tables, and so do those of one
    whose operands cost much to make, and a step that is recorded and has any delta: it serves any mixture of deltas of
    the same kinds then.
    """

    def __init__(self, model: PreTrainedModel, batch: DecodeBatch, *, always_tables: bool) -> None:
        """`always_tables`: any delta is read from tables."""
        self.model, self.batch = model, batch
        #: deltas that tables are made for at least
        self.least_slots = LEAST_SLOTS
        #: None: a step may read modules
        self.mixtures = Mixtures() if always_tables else None
        self.tables: SlotTables | None = None
        self._slots: dict[str, int] = {}
        self._by_tables = False
        self._made = 0
        self._row_slots: list[int] = []
        self._kinds: frozenset[Kind] | None = None
        self._route = Route.of(None)
        self._along: TableRoute | None = None

    @property
    def version(self) -> object:
        """The tables that steps read: another value where what was recorded is void."""
        return self._made, None if self.tables is None else self.tables.version

    @property
    def how(self) -> Hashable:
        """How steps read deltas, as what is recorded distinguishes it; None: they read modules of deltas, whose weights
        may go while a graph still reads them, so that none is recorded."""
        attachment = Attachment.of(self.model)
        if self._by_tables or attachment is None:
            return ("tables", self._kinds) if self._by_tables else "bare"
        if attachment.tuned is not None:
            return "tuned"
        return None if any(self._route.names) else "bare"

    def choose(self, names: Sequence[str | None], rows: int) -> Sequence[int]:
        """Set the delta of each row, and none for those behind them up to `rows`. Returns each one's slot in tables."""
        several, self._along = set(names), None
        behind = rows - len(names)
        if ((self.mixtures is not None and any(several)) or self._read_tables(several)) and self._holds(several):
            assert self.tables is not None, "they hold these"
            self._by_tables = True
            self._row_slots = [*self._slots_of(names), *[0] * behind]
            if self.mixtures is None:
                self._kinds = None
                return self._row_slots
            kinds = self.tables.kinds_of(several)
            if kinds:
                self._kinds = self.mixtures.of(kinds, self.version)
                return self._row_slots
            # what they have is in the cache: the step of a bare base
            self._by_tables, self._route = False, Route((None,), per_row=False, cached=True)
            return ()
        self._by_tables = False
        self._route = Route(
            [*names, *[None] * behind] if len(several) > 1 else names[:1], per_row=len(several) > 1, cached=True
        )
        return ()

    def entering(self, names: Sequence[str | None], running: Iterable[str | None]) -> AbstractContextManager[None]:
        """The route of a pass over whole texts, of a delta each. `running`: deltas of rows, which stay in tables."""
        if not self._read_tables(set(names)) or not self._holds({*names, *running}):
            return routed_as(self.model, names)
        assert self.tables is not None, "they hold these"
        slots = self._slots_of(names)
        index = torch.tensor(slots).to(self.model.device, non_blocking=True)
        return self.tables.along(TableRoute(names, index, cached=False, slots=slots))

    def make_room_for(self, name: str) -> None:
        """Tables as a delta needs them, which then leaves them again."""
        if self._holds({name, *self._slots}):
            self.keep([held for held in self._slots if held != name])

    def keep(self, names: Collection[str | None]) -> None:
        """Let go of the slots of all deltas but these: what is in no slot can be detached."""
        for name in [name for name in self._slots if name not in names]:
            del self._slots[name]
            if self.tables is not None:
                self.tables.take(name)

    def routed(self) -> AbstractContextManager[None]:
        """The route of a step."""
        attachment = Attachment.of(self.model)
        if attachment is None:
            return contextlib.nullcontext()
        if attachment.tuned is not None:
            return routed_as(self.model, self._route.names)
        if self._by_tables and self.tables is not None:
            if self._along is None:
                index, slots = self.batch.index, self._row_slots
                self._along = (
                    TableRoute(None, index, cached=True, one_token=True)
                    if self.mixtures is not None
                    # what is kept would take the room of a delta a row on a device
                    else TableRoute(
                        None, index[: len(slots)], cached=True, slots=slots, kept=self.model.device.type == "cpu"
                    )
                )
            return self.tables.along(self._along, self._kinds)
        return attachment.state.routed(self._route)

    def close(self) -> None:
        """Let go of the tables."""
        self.keep(())
        if self.tables is not None:
            self.tables.close()
            self.tables = None

    def _slots_of(self, names: Sequence[str | None]) -> list[int]:
        return [0 if name is None else self._slots[name] for name in names]

    def _read_tables(self, names: Collection[str | None]) -> bool:
        """Whether passes over rows of these deltas are best run over tables, recorded or not."""
        attachment = Attachment.of(self.model)
        if attachment is None:
            return False
        found = [attachment.deltas[name] for name in names if name in attachment.deltas]
        return len(names) > 1 or any(gains_by_tables(attachment, delta) for delta in found)

    def _holds(self, names: Collection[str | None]) -> bool:
        """Whether these are in tables now. Not where somebody else's tables of this model are in use, which one thread
        reads."""
        attachment = Attachment.of(self.model)
        if attachment is None or attachment.tuned is not None:
            return False
        self.keep(names)
        wanted = [name for name in names if name is not None]
        if self.tables is None or self.tables.slots < len(wanted):
            if any(tables is not self.tables for tables in list(attachment.state.tables)):
                return False
            self.close()
            self.tables = SlotTables(self.model, max(self.least_slots, 1 << (len(wanted) - 1).bit_length()))
            self._made += 1
        for name in wanted:
            if name not in self._slots:
                self._slots[name] = self.tables.put(name)
        return True


def routed_as(model: PreTrainedModel, names: Sequence[str | None]) -> AbstractContextManager[None]:
    """The route of passes over whole texts, of a delta each."""
    attachment = Attachment.of(model)
    current = None if attachment is None else attachment.state.current
    if current is None or (not current.per_row and set(current.names) == set(names)):
        return contextlib.nullcontext()
    return route(model, list(names) if len(set(names)) > 1 else names[0])
