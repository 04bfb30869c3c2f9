"""Writing that is either there whole or not at all: temporary name, fsync, rename."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from spectune.errors import ConfigError, some


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`; a reader sees the old file or the new one, never a part."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_bytes(path: str | Path, content: bytes) -> None:
    """Write `content` to `path`; a reader sees the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files that only the owner may read
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)


@contextlib.contextmanager
def atomic_folder(path: str | Path, replaces: Callable[[Path, Path], bool] = lambda *_: False) -> Iterator[Path]:
    """A temporary folder to fill; at the end of the `with` it becomes `path`, which is empty, new, or holds nothing but
    what `replaces` lets go. It is asked before anything is written, and again at the end.

    Renaming over a folder that is not empty fails, so the old one is moved aside first and removed last. After an
    exception the old folder is untouched.

    Args:
        replaces: of the old folder and one of its entries, whether an earlier call wrote it.

    Raises:
        ConfigError: the old folder holds anything else, which would be lost, under whatever name.
    """
    path = Path(path)
    _check_replaced(path, replaces)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync_file(file)
        os.chmod(temporary, 0o755)
        _check_replaced(path, replaces)
        aside = None
        if path.is_symlink():
            path.unlink()
        elif path.exists():
            aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            os.replace(path, aside)  # onto an empty folder: allowed
        os.replace(temporary, path)
        _sync_folder(path.parent)
        if aside is not None:
            shutil.rmtree(aside)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _check_replaced(path: Path, replaces: Callable[[Path, Path], bool]) -> None:
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file, expected a folder or nothing: choose another name")
    others = [old.name for old in sorted(path.iterdir()) if not replaces(path, old)] if path.is_dir() else []
    if others:
        raise ConfigError(
            f"{path} is not empty: it holds files that were not written by what is to be written now ({some(others)}), "
            "and that would be lost. Choose an empty or a new folder."
        )


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system lets a folder be synced
        _sync_file(path)
