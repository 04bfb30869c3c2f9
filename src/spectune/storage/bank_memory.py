"""What a bank has in memory: deltas on the device and off it, each within its limit."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spectune.deltas import Attachment, Delta, detach, is_aside, put_back, set_aside
from spectune.errors import (
    BankFullError,
    ConfigError,
    DataError,
    DoesNotFitError,
    OutOfMemoryError,
    first_line,
    is_out_of_memory,
    some,
)  # fmt: skip
from spectune.storage.delta_folder import StoredDelta
from spectune.storage.delta_names import key_of

log = logging.getLogger("spectune")

#: names that are read at the same time wait for each other only where they share one of so many locks
_LOCKS = 64


@dataclass(eq=False)
class Entry:
    """One delta in memory.

    Attributes:
        key: what it is called on the model.
        nbytes: of its weights, float32 as they act.
        stored: its folder, read and checked; None once it was on the model.
        delta: on the model, or set aside.
        holds: how many want it to stay.
    """

    key: str
    nbytes: int
    stored: StoredDelta | None
    delta: Delta | None = None
    holds: int = 0


class BankMemory:
    """The deltas of one base in memory; all of it is done under one lock but reading. `read`: a delta's folder, by its
    name. Limits in bytes."""

    def __init__(
        self, attachment: Attachment, read: Callable[[str], StoredDelta], device: int, host: int | None
    ) -> None:
        self.attachment, self.read, self.device, self.host = attachment, read, device, host
        self.lock = threading.RLock()
        self.loads = 0  # from disk
        self._said = False  # that tables leave no room
        self._entries: OrderedDict[str, Entry] = OrderedDict()  # the least recently wanted first
        self._reading = [threading.Lock() for _ in range(_LOCKS)]

    def names(self, *, on_device: bool | None = None) -> list[str]:
        """The deltas in memory, the least recently wanted first: all, those on the device, or those off it."""
        with self.lock:
            return [n for n, entry in self._entries.items() if on_device is None or self._is_on(entry) is on_device]

    def nbytes(self, *, on_device: bool) -> int:
        """Of the deltas' weights on the device, with the tables that are made of them; or off it."""
        with self.lock:
            weights = sum(entry.nbytes for entry in self._entries.values() if self._is_on(entry) is on_device)
            return weights + (sum(t.nbytes for t in list(self.attachment.state.tables)) if on_device else 0)

    def wanted(self, name: str, *, hold: bool) -> Entry:
        """The delta in memory, read where it is not there; `hold`: it stays until `release`. Raises DataError."""
        found = self._found(name, hold=hold)
        if found is not None:
            return found
        with self._reading[hash(name) % _LOCKS]:
            found = self._found(name, hold=hold)
            if found is not None:
                return found
            stored = self.read(name)
            with self.lock:
                self.loads += 1
                entry = self._entries[name] = Entry(key_of(name), stored.nbytes, stored, holds=int(hold))
                self._limit_host()
                return entry

    def release(self, entry: Entry) -> None:
        with self.lock:
            entry.holds -= 1

    def put_on(self, entries: Sequence[tuple[str, Entry]]) -> None:
        """Have deltas on the device, which are held. Raises DoesNotFitError, OutOfMemoryError and ConfigError."""
        with self.lock:
            missing = [(name, entry) for name, entry in entries if not self._is_on(entry)]
            if not missing:
                return
            with self.attachment.state.passes.none_running():
                self._make_room(entries, sum(entry.nbytes for _, entry in missing))
                for name, entry in missing:
                    self._put_one(name, entry)
                self._limit_host()

    def forget(self, name: str) -> None:
        """Take a delta off and out of memory. Raises ConfigError: it is in use."""
        with self.lock:
            entry = self._entries.get(name)
            if entry is None:
                return
            if self._is_used(entry):
                raise ConfigError(f"delta {name!r} is in use: wait until no route names it")
            if self._is_on(entry):
                with self.attachment.state.passes.none_running():
                    detach(self.attachment.model, entry.key)
            del self._entries[name]

    def _found(self, name: str, *, hold: bool) -> Entry | None:
        with self.lock:
            entry = self._entries.get(name)
            if entry is None:
                return None
            if entry.stored is None and not self._is_on(entry) and not _is_aside(entry):
                del self._entries[name]  # somebody else has detached it
                return None
            self._entries.move_to_end(name)
            entry.holds += int(hold)
            return entry

    def _is_on(self, entry: Entry) -> bool:
        return entry.delta is not None and self.attachment.deltas.get(entry.key) is entry.delta

    def _is_used(self, entry: Entry) -> bool:
        return entry.holds > 0 or (self._is_on(entry) and self.attachment.state.in_use(entry.key))

    def _make_room(self, wanted: Sequence[tuple[str, Entry]], needed: int) -> None:
        """Set deltas aside until so many bytes are free. Where tables leave too little room for any delta, they go
        beyond the limit, which is said: nobody would ever make that room."""
        while self.nbytes(on_device=True) + needed > self.device:
            if self._set_one_aside():
                continue
            names, all_of_them = some([name for name, _ in wanted]), sum(entry.nbytes for _, entry in wanted)
            what = f"{'delta' if len(wanted) == 1 else 'deltas'} {names} ({_mib(all_of_them)})"
            if all_of_them > self.device:
                raise DoesNotFitError(
                    f"{what} cannot fit: device_memory is {_mib(self.device)}. Give the bank more, or route fewer of "
                    "them in one batch"
                )
            others = [n for n in self.names(on_device=True) if n not in dict(wanted)]
            if others:
                raise BankFullError(
                    f"{what} cannot fit now: of device_memory, {_mib(self.device)}, {some(others)} in use and tables "
                    f"take {_mib(self.nbytes(on_device=True))}. Wait for those, or give the bank more"
                )
            if not self._said:
                self._said = True
                log.warning(
                    "device_memory is %s, of which tables for decoding take so much that deltas go beyond it: give the "
                    "bank more, or decode fewer rows at once", _mib(self.device),
                )  # fmt: skip
            return

    def _set_one_aside(self) -> bool:
        """Move the delta to host memory that was not wanted for longest; False where all are in use."""
        for entry in self._entries.values():
            if self._is_on(entry) and not self._is_used(entry):
                set_aside(self.attachment.model, entry.key)
                return True
        return False

    def _put_one(self, name: str, entry: Entry) -> None:
        while True:
            try:
                self._attach(name, entry)
                return
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if not self._set_one_aside():
                    device = self.attachment.model.device
                    raise OutOfMemoryError(
                        f"out of memory while delta {name!r} ({_mib(entry.nbytes)}) was put on {device}: "
                        f"{first_line(error)}. Give the bank less device_memory than there is"
                    ) from error

    def _attach(self, name: str, entry: Entry) -> None:
        if entry.delta is not None and not put_back(entry.delta):
            entry.delta, entry.stored = None, self.read(name)  # the base was rebuilt where it acts
        if entry.delta is None:
            assert entry.stored is not None, "it is read before it is held"
            try:
                entry.delta, entry.stored = entry.stored.attach(), None
            except (ConfigError, DataError):
                if self._entries.get(name) is entry:  # somebody may put it right: it is read again then
                    del self._entries[name]
                raise

    def _limit_host(self) -> None:
        """Drop deltas from host memory that were not wanted for longest; the newest may be larger than the limit."""
        off = [name for name in self.names(on_device=False) if not self._entries[name].holds]
        for name in off[:-1]:
            if self.host is None or self.nbytes(on_device=False) <= self.host:
                return
            del self._entries[name]


def _is_aside(entry: Entry) -> bool:
    return entry.delta is not None and is_aside(entry.delta)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
