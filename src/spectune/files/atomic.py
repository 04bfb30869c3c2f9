"""Writing that is either there whole or not at all: temporary name, fsync, rename; and what a kill leaves, swept.

What is being written to `NAME` stands beside it as `.NAME.TOKEN.spectune-new`, and its writer has a lock while it
lives: on the file itself, or for a folder on `.NAME.TOKEN.spectune-lock`, which is there before the folder and goes
after it. A temporary whose lock nobody has is a dead writer's. `-old` is what a folder replaces, for the moment between
two renames where the file system cannot exchange them in one; `-gone` is on its way out, whoever removes it.
"""

import contextlib
import ctypes
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from spectune.errors import ConfigError, some
from spectune.files.disk_errors import disk_errors
from spectune.files.lock import Claim, NoLocksError
from spectune.files.syncing import make_folder, sync_file, sync_folder, sync_tree

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<token>[0-9a-f]{12})\.spectune-(?P<kind>new|lock|old|gone)", re.DOTALL)
_KEPT = "What was there before is as it was."


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`; a reader sees the old file or the new one, never a part. Raises WriteError: the
    disk is full, read-only or broken; the old file is as it was then."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_bytes(path: str | Path, content: bytes) -> None:
    """Write `content` to `path`; a reader sees the old file or the new one, never a part. Raises WriteError: the disk
    is full, read-only or broken; the old file is as it was then."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """An empty temporary file to write; at the end of the `with` it becomes `path`. After an exception what was there
    is untouched.

    Raises:
        WriteError: the disk is full, read-only or broken, whichever library met it.
    """
    path = Path(path)
    with disk_errors(path, _KEPT if path.exists() else ""):
        make_folder(path.parent)
        place, claim = _begin(path, folder=False)
        try:
            mode = stat.S_IMODE(place.new.stat().st_mode)
            yield place.new
            if stat.S_IMODE(place.new.stat().st_mode) != mode:  # a library has put a file of its own there
                os.chmod(place.new, mode)
            sync_file(place.new)
            os.replace(place.new, path)
        finally:
            if place.is_ours:
                place.new.unlink(missing_ok=True)
            if claim is not None:
                claim.release(remove=False)
        sync_folder(path.parent)


@contextlib.contextmanager
def atomic_folder(path: str | Path, replaces: Callable[[Path, Path], bool] = lambda *_: False) -> Iterator[Path]:
    """A temporary folder to fill; at the end of the `with` it becomes `path`, which is empty, new, or holds nothing but
    what `replaces` lets go. It is asked before anything is written, and again at the end.

    The old folder and the new one are exchanged in one move where the file system can, so that the name never lacks its
    folder; else the old one is moved aside first, and put back by the next writer of the name, or by `sweep`, where a
    kill came between. After an exception the old folder is untouched. Permissions of all files are the umask's,
    whatever a library gave them.

    Args:
        replaces: of the old folder and one of its entries, whether an earlier call wrote it.

    Raises:
        ConfigError: the old folder holds anything else, which would be lost, under whatever name.
        WriteError: the disk is full, read-only or broken, whichever library met it.
    """
    path = Path(path)
    with disk_errors(path, _KEPT if path.exists() else ""):
        _sweep(path.parent, path.name)
        _check_replaced(path, replaces)
        make_folder(path.parent)
        place, claim = _begin(path, folder=True)
        try:
            place.new.mkdir()
            yield place.new
            _set_permissions(place.new)
            sync_tree(place.new)
            _check_replaced(path, replaces)
            _move_in(place)
            sync_folder(path.parent)
        finally:
            if place.is_ours:
                _settle(place)
                if claim is None:
                    place.lock.unlink(missing_ok=True)
            if claim is not None:
                claim.release(remove=not place.is_used)


def remove_folder(path: str | Path) -> None:
    """Remove a folder, or a link to one: its name is gone in one move, so that nobody ever sees a half of it. Nothing
    happens where there is none.

    Raises:
        WriteError: the disk is read-only or broken.
        OSError: it cannot be renamed, for want of permission, say.
    """
    path = Path(path)
    with disk_errors(path), contextlib.suppress(FileNotFoundError):
        _discard(path, _Place(path).gone)


def sweep(folder: str | Path) -> None:
    """Remove from a folder what writers left that are dead, and put back what one had moved aside. Nothing of a writer
    that lives, on whatever machine, is touched; nothing but what was being removed where the file system has no
    locks."""
    _sweep(Path(folder), None)


@dataclass(frozen=True)
class _Place:
    """The names that one writing of `path` uses."""

    path: Path
    token: str = field(default_factory=lambda: secrets.token_hex(6))
    process: int = field(default_factory=os.getpid)

    def _named(self, kind: str) -> Path:
        return self.path.with_name(f".{self.path.name}.{self.token}.spectune-{kind}")

    @property
    def new(self) -> Path:
        return self._named("new")

    @property
    def lock(self) -> Path:
        return self._named("lock")

    @property
    def old(self) -> Path:
        return self._named("old")

    @property
    def gone(self) -> Path:
        return self._named("gone")

    @property
    def is_used(self) -> bool:
        return os.path.lexists(self.new) or os.path.lexists(self.old)

    @property
    def is_ours(self) -> bool:
        """Not in a process that was forked off inside the `with`: the rest is its parent's to do."""
        return self.process == os.getpid()


def _begin(path: Path, *, folder: bool) -> tuple[_Place, Claim | None]:
    """Names for a new temporary, and the lock that says that its writer lives; None where there are no locks."""
    while True:
        place = _Place(path)
        locked = place.lock if folder else place.new
        try:
            claim = Claim.on(locked, make=True)
        except NoLocksError:
            locked.touch()
            return place, None
        if claim is not None:  # else a sweep was there between its making and its locking
            return place, claim


def _move_in(place: _Place) -> None:
    """Give the new folder its name. What had it is under one of the temporary names then."""
    if not os.path.lexists(place.path):
        os.replace(place.new, place.path)
    elif not _exchange(place.new, place.path):
        os.replace(place.path, place.old)
        os.replace(place.new, place.path)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one move; False where the system or the file system cannot."""
    try:
        exchange = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):  # Linux has it, with most C libraries
        return False
    at_cwd, both = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(exchange(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), both) == 0)


def _settle(place: _Place) -> None:
    """What was not finished has not happened: put back what had the name, and remove the rest."""
    with contextlib.suppress(OSError):  # what cannot be moved now stays for the next sweep
        if os.path.lexists(place.old) and not os.path.lexists(place.path):
            os.replace(place.old, place.path)
        for path in (place.new, place.old):
            with contextlib.suppress(FileNotFoundError):
                _discard(path, _Place(place.path).gone)


def _discard(path: Path, gone: Path) -> None:
    """Remove a folder, a file or a link. Raises FileNotFoundError."""
    if path.is_symlink() or path.is_file():
        path.unlink()
        return
    os.replace(path, gone)
    sync_folder(path.parent)
    shutil.rmtree(gone, ignore_errors=True)  # what resists is tried again by the next sweep


def _sweep(folder: Path, name: str | None) -> None:
    """`name`: only what was to become this."""
    try:
        entries = [entry.name for entry in os.scandir(folder)]
    except OSError:
        return
    found = [match for entry in entries if (match := _TEMPORARY.fullmatch(entry)) and name in (None, match["name"])]
    for gone in (folder / match.group() for match in found if match["kind"] == "gone"):
        with contextlib.suppress(OSError):
            gone.unlink() if gone.is_symlink() else shutil.rmtree(gone, ignore_errors=True)
    for own, token in sorted({(match["name"], match["token"]) for match in found if match["kind"] != "gone"}):
        _clear(_Place(folder / own, token))


def _clear(place: _Place) -> None:
    """Settle what a writer left, if it is dead."""
    is_file = place.new.is_file() and not place.new.is_symlink()
    try:
        claim = Claim.on(place.new if is_file else place.lock, make=False)
    except FileNotFoundError:  # a folder's lock is there before it and goes after it
        _settle(place)
        return
    except (OSError, NoLocksError, ConfigError):
        return
    if claim is not None:
        if not is_file:
            _settle(place)
        claim.release(remove=is_file or not place.is_used)


def _set_permissions(folder: Path) -> None:
    """Files as the umask wants them, which made the folder itself: libraries write some for the owner alone."""
    wanted = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink() and stat.S_IMODE(file.stat().st_mode) != wanted:
            os.chmod(file, wanted)


def _check_replaced(path: Path, replaces: Callable[[Path, Path], bool]) -> None:
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file, expected a folder or nothing: choose another name")
    others = [old.name for old in sorted(path.iterdir()) if not replaces(path, old)] if path.is_dir() else []
    if others:
        raise ConfigError(
            f"{path} is not empty: it holds files that were not written by what is to be written now ({some(others)}), "
            "and that would be lost. Choose an empty or a new folder."
        )
