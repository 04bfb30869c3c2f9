"""One process in a folder at a time, and no longer than it lives."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from spectune.errors import BusyFolderError, ConfigError, WriteError
from spectune.files.lock import LOCK_FILE, folder_lock
from tests.files.children import Child


def holds(folder: Path) -> Child:
    def work(child: Child) -> None:
        with folder_lock(folder, "spectune train"):
            child.ready()
            child.wait()

    return Child(work).wait_until_ready()


def is_free(folder: Path) -> bool:
    try:
        with folder_lock(folder, "a test"):
            return True
    except BusyFolderError:
        return False


def test_a_second_process_is_told_who_has_the_folder(tmp_path: Path) -> None:
    child = holds(tmp_path)
    with pytest.raises(BusyFolderError, match="spectune train has it") as refused, folder_lock(tmp_path, "x"):
        pytest.fail("two are in")
    assert f"process {child.pid} on" in str(refused.value)
    assert "since 20" in str(refused.value)
    assert isinstance(refused.value, ConfigError)
    child.kill()


def test_the_lock_of_a_dead_process_is_nobodys(tmp_path: Path) -> None:
    child = holds(tmp_path)
    child.kill()
    assert (tmp_path / LOCK_FILE).exists()
    assert is_free(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_of_many_processes_one_is_in_at_a_time(tmp_path: Path) -> None:
    """Each takes the lock, and with it its file, again and again: who is in finds nobody else's trace."""

    def work(_: Child) -> None:
        wins = 0
        while wins < 20:
            try:
                with folder_lock(tmp_path / "run", "x"):
                    trace = os.open(tmp_path / "run" / "trace", os.O_CREAT | os.O_EXCL)
                    os.close(trace)
                    os.unlink(tmp_path / "run" / "trace")
                    wins += 1
            except BusyFolderError:
                continue

    assert [child.join() for child in [Child(work) for _ in range(4)]] == [0] * 4


def test_a_folder_that_goes_while_it_is_looked_at_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mkdir finds it there, and who had it takes it away, empty, before anybody sees that it is a folder."""
    places = [tmp_path / "run"]

    def went(path: Path) -> None:
        if places:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(places.pop()))
        path.mkdir()

    monkeypatch.setattr("spectune.files.lock.make_folder", went)
    with folder_lock(tmp_path / "run", "x"):
        assert (tmp_path / "run" / LOCK_FILE).exists()


def test_inside_the_same_thread_may_lock_again_and_no_other(tmp_path: Path) -> None:
    seen: list[bool] = []
    (tmp_path / "link").symlink_to(tmp_path)
    with folder_lock(tmp_path, "spectune compare"):
        with folder_lock(tmp_path, "spectune train"), folder_lock(tmp_path / "link", "spectune train"):
            pass
        other = threading.Thread(target=lambda: seen.append(is_free(tmp_path)))
        other.start()
        other.join()
        assert (tmp_path / LOCK_FILE).exists()
    assert seen == [False]
    assert is_free(tmp_path)


def test_children_do_not_keep_a_dead_parents_lock(tmp_path: Path) -> None:
    """Neither one that was forked off nor a program that was started, which both live on."""

    def work(child: Child) -> None:
        with folder_lock(tmp_path / "run", "x"):
            Child(lambda living: (living.ready(), living.wait())).wait_until_ready()
            subprocess.Popen(["sleep", "60"])
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
            (tmp_path / "children").write_text(children)
            child.ready()
            child.wait()

    Child(work).wait_until_ready().kill()
    children = [int(pid) for pid in (tmp_path / "children").read_text().split()]
    assert len(children) == 2
    free = is_free(tmp_path / "run")
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    assert free


def test_a_child_that_leaves_the_block_leaves_its_parents_lock(tmp_path: Path) -> None:
    with contextlib.ExitStack() as block:
        block.enter_context(folder_lock(tmp_path, "x"))
        assert Child(lambda _: block.close()).join() == 0
        assert (tmp_path / LOCK_FILE).exists()
        assert Child(lambda _: os._exit(3 if is_free(tmp_path) else 0)).join() == 0
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_folder_that_stayed_empty_is_taken_away_again(tmp_path: Path) -> None:
    with folder_lock(tmp_path / "new" / "run", "x"):
        assert (tmp_path / "new" / "run" / LOCK_FILE).exists()
    assert not (tmp_path / "new" / "run").exists()
    with folder_lock(tmp_path / "kept", "x"):
        (tmp_path / "kept" / "result").touch()
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["result"]


@pytest.mark.parametrize("make", ["link", "pipe", "folder"])
def test_what_is_no_lock_is_neither_followed_nor_waited_for(make: str, tmp_path: Path) -> None:
    place, outside = tmp_path / "run" / LOCK_FILE, tmp_path / "outside"
    place.parent.mkdir()
    outside.write_text("mine")
    {"link": lambda: place.symlink_to(outside), "pipe": lambda: os.mkfifo(place), "folder": place.mkdir}[make]()
    with pytest.raises(ConfigError, match="no plain file"), folder_lock(tmp_path / "run", "x"):
        pytest.fail("it is locked")
    assert outside.read_text() == "mine"


@pytest.mark.parametrize(
    "said", ["", "{", "[1]", '{"pid": "\\u001b[2J", "host": 1, "doing": 2, "command": 3, "since": 4}']
)
def test_whatever_a_lock_says_is_plain_text(said: str, tmp_path: Path) -> None:
    lock = os.open(tmp_path / LOCK_FILE, os.O_RDWR | os.O_CREAT)
    os.write(lock, said.encode())
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(BusyFolderError, match="is in use") as refused, folder_lock(tmp_path, "x"):
        pytest.fail("two are in")
    assert str(refused.value).isprintable()
    os.close(lock)


def test_a_file_is_no_folder_to_lock(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match="is a file, or in one"), folder_lock(place, "x"):
            pytest.fail("it is locked")


def test_without_locks_it_is_said_once_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def without(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", without)
    with caplog.at_level(logging.WARNING, "spectune"):
        for _ in range(2):
            with folder_lock(tmp_path, "x"):
                pass
    assert [record.levelname for record in caplog.records if "no locks" in record.getMessage()] == ["WARNING"]


def test_a_disk_that_is_read_only_or_full_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for code, words in ((errno.EROFS, "mounted read-only"), (errno.ENOSPC, "no space")):

        def refused(*_: Any, code: int = code, **__: Any) -> int:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", refused)
            with pytest.raises(WriteError, match=words), folder_lock(tmp_path, "x"):
                pytest.fail("it is locked")


def test_a_lock_says_who_has_it(tmp_path: Path) -> None:
    with folder_lock(tmp_path, "spectune train"):
        owner = json.loads((tmp_path / LOCK_FILE).read_text())
    assert owner.keys() == {"pid", "host", "doing", "command", "since"}
    assert owner["pid"] == os.getpid()


def test_of_torchruns_processes_the_first_one_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with folder_lock(tmp_path, "x"):
        assert list(tmp_path.iterdir()) == []
