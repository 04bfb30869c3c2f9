"""Faults put into a process before its command begins: at the n-th call that writes below a folder it is killed, a call
fails, or a signal comes.

What counts: opening for writing, a write that reaches the system (the files that Python opens are opened anew over a
raw file that tells of each), rename, link, unlink, mkdir, rmdir, truncate, chmod and fsync. Python's audit hook sees
all but writes and syncs, before they are done; these are wrapped. What libraries in other languages write is one call.
"""

from __future__ import annotations

import _io
import builtins
import errno
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_write, _pwrite, _open = os.write, os.pwrite, io.open
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
#: audit event -> places of paths and of the folders that they are relative to
_EVENTS: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.rename": ((0, 2), (1, 3)), "os.remove": ((0, 1),), "os.mkdir": ((0, 2),), "os.rmdir": ((0, 1),),
    "os.link": ((1, 3),), "os.symlink": ((1, 2),), "os.truncate": ((0, None),), "os.chmod": ((0, 2),),
}  # fmt: skip
#: what takes room
GROWING = ("open", "write", "os.mkdir", "os.symlink", "os.link", "library")


@dataclass
class Watch:
    """Counts the calls that write below a folder. `before(number, name, paths, size)` is asked before each; what it
    returns for a write is how many bytes of it are written before the process is killed; None: all, and it goes on."""

    root: str
    before: Callable[[int, str, list[str], int], int | None]
    count: int = 0
    inside: threading.local = field(default_factory=threading.local)

    def put(self) -> None:
        sys.addaudithook(self._audited)
        os.write, os.pwrite, os.fsync, os.fdatasync = self._os_write, self._os_pwrite, self._os_fsync, self._os_fsync
        for module in (builtins, io, _io):
            module.open = self._opened  # type: ignore[attr-defined]
        shutil._USE_CP_SENDFILE = False  # type: ignore[attr-defined]
        safetensors = sys.modules.get("safetensors.torch")
        if safetensors is not None:
            plain = safetensors.serialize_file

            def serialize_file(tensors: Any, filename: Any, *more: Any, **named: Any) -> Any:
                path = self.below(filename)
                if path is not None:
                    self.ask("library", [path])
                return plain(tensors, filename, *more, **named)

            safetensors.serialize_file = serialize_file  # type: ignore[attr-defined]

    def below(self, path: Any, folder: int = -1) -> str | None:
        """The whole path, where it is below the root."""
        if isinstance(path, int):
            try:
                whole = os.readlink(f"/proc/self/fd/{path}")
            except OSError:
                return None
        else:
            text = os.fsdecode(path)
            if not os.path.isabs(text) and folder >= 0:
                text = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), text)
            whole = os.path.abspath(text)
        return whole if whole == self.root or whole.startswith(self.root + os.sep) else None

    def ask(self, name: str, paths: list[str], size: int = 0) -> int | None:
        if getattr(self.inside, "on", False):
            return None
        self.inside.on = True
        try:
            number = self.count
            self.count += 1
            return self.before(number, name, paths, size)
        finally:
            self.inside.on = False

    def _audited(self, event: str, given: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = given
            if isinstance(path, int) or path is None or not isinstance(flags, int) or not flags & _WRITING:
                return
            places: tuple[tuple[int, int | None], ...] = ((0, None),)
        elif event in _EVENTS:
            places = _EVENTS[event]
        else:
            return
        found = [self.below(given[at], -1 if folder is None else given[folder]) for at, folder in places]
        if any(found):
            self.ask(event, [path or "" for path in found])

    def _os_write(self, descriptor: int, content: Any) -> int:
        path = self.below(descriptor)
        if path is None:
            return _write(descriptor, content)
        return self.written(path, content, lambda part: _write(descriptor, part))

    def _os_pwrite(self, descriptor: int, content: Any, offset: int) -> int:
        path = self.below(descriptor)
        if path is None:
            return _pwrite(descriptor, content, offset)
        return self.written(path, content, lambda part: _pwrite(descriptor, part, offset))

    def _os_fsync(self, descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        path = self.below(number)
        if path is not None:
            self.ask("fsync", [path])  # and not done: what a kill leaves is in the system's memory

    def written(self, path: str, content: Any, write: Callable[[Any], Any]) -> Any:
        part = self.ask("write", [path], memoryview(content).nbytes)
        if part is None:
            return write(content)
        write(bytes(memoryview(content).cast("B")[:part]))
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    def _opened(self, file: Any, mode: str = "r", buffering: int = -1, *more: Any, **named: Any) -> Any:
        writes = isinstance(mode, str) and any(letter in mode for letter in "wax+")
        path = self.below(file) if writes and isinstance(file, int | str | bytes | os.PathLike) else None
        if path is None:
            return _open(file, mode, buffering, *more, **named)
        watch = self

        class Told(io.FileIO):
            def write(self, content: Any) -> Any:
                return watch.written(path, content, super().write)

            def truncate(self, size: Any = None) -> Any:
                watch.ask("truncate", [path])
                return super().truncate(size)

        closefd = named.pop("closefd", True)
        opener = named.pop("opener", None)
        raw = Told(file, mode.replace("b", "").replace("t", ""), closefd=closefd, opener=opener)
        if buffering == 0:
            return raw
        size = buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE
        buffered: Any = io.BufferedRandom(raw, size) if "+" in mode else io.BufferedWriter(raw, size)
        if "b" in mode:
            return buffered
        text = io.TextIOWrapper(buffered, *more, line_buffering=buffering == 1, **named)
        text.mode = mode  # type: ignore[misc]
        return text


def count(root: str, log: str) -> None:
    """Write each call as a line of JSON: name, paths, size."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(number: int, name: str, paths: list[str], size: int) -> None:
        _write(
            descriptor,
            json.dumps([name, [os.path.relpath(p, root) if p else "" for p in paths], size]).encode() + b"\n",
        )

    Watch(root, note).put()


def kill(root: str, at: int, within: float | None = None) -> None:
    """Die before the call `at`; `within`: of a write, once so large a share of it is written."""

    def before(number: int, name: str, paths: list[str], size: int) -> int | None:
        if number == at:
            if name == "write" and within is not None:
                return int(size * within)
            os.kill(os.getpid(), signal.SIGKILL)
        return None

    Watch(root, before).put()


def cut_power(root: str, at: int, seed: float) -> None:
    """Die before the call `at`, and lose what was not synced: of each file the bytes written since its last sync (or
    some of them), and each rename since the last sync of its folder, by a coin."""
    power, rng = _Power(), random.Random(seed)

    def before(number: int, name: str, paths: list[str], size: int) -> None:
        if number == at:
            power.lose(rng)
            os.kill(os.getpid(), signal.SIGKILL)
        power.note(name, paths)

    Watch(root, before).put()


class _Power:
    """What would be left if the power went now."""

    def __init__(self) -> None:
        #: bytes that are safe, of files written since
        self.sizes: dict[str, int] = {}
        #: what was renamed and is not safe: from, to, and what it replaced, kept aside
        self.renamed: list[tuple[str, str, str | None]] = []
        self.aside = tempfile.mkdtemp(prefix="spectune-power-")

    def note(self, name: str, paths: list[str]) -> None:
        """What is about to be done."""
        path = paths[-1]
        if name in ("open", "write", "library", "truncate", "os.truncate"):
            self.sizes.setdefault(path, os.path.getsize(path) if os.path.isfile(path) and name != "library" else 0)
        elif name == "fsync" and os.path.isdir(path):
            self.renamed = [entry for entry in self.renamed if os.path.dirname(entry[1]) != path]
        elif name == "fsync":
            self.sizes.pop(path, None)
        elif name == "os.rename":
            self._rename(*paths)
        elif name in ("os.remove", "os.rmdir"):
            self.sizes.pop(path, None)
            self.renamed = [entry for entry in self.renamed if entry[1] != path]

    def _rename(self, old: str, new: str) -> None:
        kept = None
        if os.path.islink(new) or os.path.isfile(new):
            kept = os.path.join(self.aside, str(len(os.listdir(self.aside))))
            shutil.copy2(new, kept, follow_symlinks=False)
        for path in list(self.sizes):
            if path == old or path.startswith(old + os.sep):
                self.sizes[new + path[len(old) :]] = self.sizes.pop(path)
        if os.path.dirname(old) == os.path.dirname(new):
            self.renamed.append((old, new, kept))

    def lose(self, rng: random.Random) -> None:
        for path, safe in self.sizes.items():
            if os.path.isfile(path) and not os.path.islink(path):
                size = os.path.getsize(path)
                os.truncate(path, min(size, safe + int(rng.choice((0.0, rng.random())) * max(0, size - safe))))
        undone = len(self.renamed) if rng.random() < 0.5 else rng.randrange(len(self.renamed) + 1)
        for old, new, kept in self.renamed[len(self.renamed) - undone :][::-1]:
            if os.path.lexists(new) and not os.path.lexists(old):
                os.rename(new, old)
                if kept is not None:
                    shutil.move(kept, new)
        shutil.rmtree(self.aside)


def fail(root: str, at: int, code: str, lasting: bool = True) -> None:
    """The call `at` fails, and all behind it that take room; with `lasting` false it alone."""
    number_of = getattr(errno, code)

    def before(number: int, name: str, paths: list[str], size: int) -> None:
        if (number >= at if lasting else number == at) and name in (*GROWING, *(("fsync",) if code == "EIO" else ())):
            if name == "library":
                raise _library_error(number_of)
            raise OSError(number_of, os.strerror(number_of), paths[-1])

    Watch(root, before).put()


def _library_error(number: int) -> Exception:
    """As safetensors says it."""
    from safetensors import SafetensorError

    return SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")


def interrupt(root: str, at: int, number: int, again: float | None = None) -> None:
    """A signal comes before the call `at`; `again`: and a second one so many seconds later."""

    def before(place: int, name: str, paths: list[str], size: int) -> None:
        if place == at:
            if again is not None:
                threading.Thread(target=_later, args=(again, number), daemon=True).start()
            os.kill(os.getpid(), number)

    Watch(root, before).put()


def _later(seconds: float, number: int) -> None:
    time.sleep(seconds)
    os.kill(os.getpid(), number)


def short_measurements(page: bool) -> None:
    """A comparison measures few passages, once: what it measures is not what is looked at here. `page`: and makes its
    page and plots."""
    from spectune.comparing import comparison, measure

    if not page:
        comparison.write_reports = lambda content, folder: []  # type: ignore[attr-defined]

    measure.PASSAGES, measure.PASSAGE_TOKENS, measure.DECODE_TOKENS, measure.ROUNDS = 2, 8, 3, 1
