"""Thousands of deltas on one base: each loaded by its name when it is first wanted, as many on the device as fit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

from transformers import PreTrainedModel

from spectune.deltas import hold_base, route
from spectune.errors import ConfigError
from spectune.methods import METHODS
from spectune.sizes import bytes_of
from spectune.storage.bank_memory import BankMemory
from spectune.storage.delta_folder import StoredDelta, read_delta
from spectune.storage.delta_names import DeltaNames, key_of


class Bank(contextlib.AbstractContextManager["Bank"]):
    """The deltas of one base by name, loaded when they are first wanted.

    Those that were not wanted for longest leave the device for host memory, and that for the disk; what comes back is
    bit for bit what it was. Any thread may ask for any name: what is put on the model waits for passes that run, and
    holds back new ones meanwhile. Passes of compiled or recorded code are not seen: who runs these puts deltas on
    between them.

    Args:
        model: the base, on its device, in evaluation mode; a causal language model.
        folder: of folders, each a delta of that name. Other names are paths of folders, or hub ids.
        device_memory: for deltas' weights, and the tables of what decodes with them: "2GiB", "500MB", or bytes.
        host_memory: for deltas that are off the device; None sets no limit.

    Raises:
        ConfigError: no such folder, a size that is none, or a base that is fully tuned, has a head that deltas have
            copies of, or takes no deltas.
    """

    def __init__(
        self, model: PreTrainedModel, folder: str | Path | None = None, device_memory: int | str = "2GiB",
        host_memory: int | str | None = None,
    ) -> None:  # fmt: skip
        #: the limit of `device_bytes`
        self.device_memory = bytes_of(device_memory, "device_memory")
        host = None if host_memory is None else bytes_of(host_memory, "host_memory")
        self.model, self._names = model, DeltaNames(folder)
        self._attachment = hold_base(model, [kind.model_validate({}) for kind in METHODS if not kind.trains_base])

        def read(name: str) -> StoredDelta:
            return read_delta(model, self._names.folder_of(name), key_of(name))

        self._memory = BankMemory(self._attachment, read, self.device_memory, host)
        self._closed = False

    # -- what there is

    def names(self) -> list[str]:
        """The deltas of the folder as it is now, and what was loaded by path or hub id; sorted."""
        return sorted({*self._names.all(), *self._memory.names()})

    def __contains__(self, name: object) -> bool:
        """Whether `names` has it; another name may yet be a path or a hub id."""
        return isinstance(name, str) and (name in self._names or name in self._memory.names())

    def on_device(self) -> list[str]:
        """The deltas that are on the model now, the least recently wanted first."""
        return self._memory.names(on_device=True)

    def in_host_memory(self) -> list[str]:
        """The deltas that are in memory and off the device, the least recently wanted first."""
        return self._memory.names(on_device=False)

    @property
    def device_bytes(self) -> int:
        """Memory of the deltas on the device, and of the tables that are made of them."""
        return self._memory.nbytes(on_device=True)

    @property
    def host_bytes(self) -> int:
        """Memory of the deltas that are off the device."""
        return self._memory.nbytes(on_device=False)

    @property
    def loads(self) -> int:
        """How often a folder was read."""
        return self._memory.loads

    # -- what is done with it

    def prepare(self, name: str) -> None:
        """Read and check a delta's files, so that it is in memory when it is wanted. From any thread: the model is not
        touched.

        Raises:
            DataError: there is none of that name, or its folder is damaged, another base's, of a format that is not
                read, or a fully tuned model.
            ConfigError: the bank is closed, or something else is attached by that name.
        """
        self._memory.wanted(self._checked(name), hold=False)

    @contextlib.contextmanager
    def hold(self, names: Sequence[str | None]) -> Iterator[tuple[str | None, ...]]:
        """Have deltas on the model inside the `with`; gives what each is called there, for `spectune.route` and slot
        tables. None is the bare base.

        Raises:
            DataError, ConfigError: as `prepare` has it.
            DoesNotFitError: `device_memory` does not hold these deltas together; `BankFullError`, which is one: not
                beside those that others hold now.
            OutOfMemoryError: the device has less room than `device_memory` says.
        """
        wanted = dict.fromkeys(self._checked(name) for name in names if name is not None)
        held = {}
        try:
            for name in wanted:  # outside of the lock, so that nobody waits for another one's disk
                held[name] = self._memory.wanted(name, hold=True)
            self._memory.put_on(list(held.items()))
            yield tuple(None if name is None else held[name].key for name in names)
        finally:
            for entry in held.values():
                self._memory.release(entry)

    @contextlib.contextmanager
    def route(self, names: str | Sequence[str | None] | None) -> Iterator[None]:
        """`spectune.route` by the bank's names: one (or None) for all rows, or a list with one for each row. Deltas are
        put on the model where they are not there. Raises what `hold` and `spectune.route` raise."""
        if names is None or isinstance(names, str):
            with self.hold([names]) as (key,), route(self.model, key):
                yield
        else:
            with self.hold(names) as keys, route(self.model, keys):
                yield

    def forget(self, name: str) -> None:
        """Take a delta off and out of memory: its folder is read again when it is wanted next. Raises ConfigError: it
        is in use."""
        self._memory.forget(name)

    def close(self) -> None:
        """Take all deltas off, and leave the model as it was. Raises ConfigError: one is in use."""
        with self._memory.lock:
            for name in self._memory.names():
                self._memory.forget(name)
            if not self._closed:
                self._closed = True
                self._attachment.holders -= 1
                self._attachment.close_unused()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:  # fmt: skip
        self.close()

    def _checked(self, name: str) -> str:
        if self._closed:
            raise ConfigError("this bank is closed")
        if not isinstance(name, str) or not name:
            raise ConfigError(f"a delta's name is a text, or None for the bare base; got {name!r}")
        return name
