"""What is written is there whole or not at all, whenever the writer dies and whatever the disk does."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from spectune.errors import WriteError
from spectune.files import atomic
from spectune.files.atomic import atomic_file, atomic_folder, atomic_write_text, remove_folder, sweep
from spectune.files.disk_errors import disk_errors
from tests.files.children import Child, files_of_at_most
from tests.support import make_tokenizer

#: what writing does to names; the child ends before one of them
CALLS = ("mkdir", "replace", "unlink", "rmdir", "chmod", "fsync")


def anything(*_: Path) -> bool:
    return True


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def dies_before(call: int, work: Callable[[], object], exchanges: bool) -> bool:
    """Whether a child that ends before that call, as if killed, came to it."""

    def doomed(_: Child) -> None:
        left = call

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def before(*args: Any, **given: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    os._exit(9)
                return real(*args, **given)

            return before

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        if not exchanges:
            atomic._exchange = lambda *_: False  # type: ignore[assignment]
        work()

    code = Child(doomed).join()
    assert code in (0, 9)
    return code == 9


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchanging", "two renames"])
def test_a_folder_that_is_replaced_is_the_old_or_the_new_one_whenever_its_writer_dies(
    exchanges: bool, tmp_path: Path
) -> None:
    def replaced() -> None:
        with atomic_folder(tmp_path / "task", replaces=anything) as folder:
            (folder / "content").write_text("new")
            (folder / "more").mkdir()
            (folder / "more" / "content").write_text("new")

    seen = set()
    for call in range(40):
        with atomic_folder(tmp_path / "task", replaces=anything) as folder:
            (folder / "content").write_text("old")
        died = dies_before(call, replaced, exchanges)
        assert not exchanges or (tmp_path / "task" / "content").exists(), "the name never lacks its folder"
        sweep(tmp_path)
        assert names(tmp_path) == ["task"]
        content = (tmp_path / "task" / "content").read_text()
        assert (tmp_path / "task" / "more" / "content").exists() == (content == "new")
        seen.add(content)
        if not died:
            break
    assert call > 8
    assert content == "new"
    assert seen == {"old", "new"}


def test_a_file_is_the_old_or_the_new_one_whenever_its_writer_dies(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "file", "old")
    for call in range(10):
        died = dies_before(call, lambda: atomic_write_text(tmp_path / "file", "new"), True)
        sweep(tmp_path)
        assert names(tmp_path) == ["file"]
        if not died:
            break
    assert call > 1
    assert (tmp_path / "file").read_text() == "new"


def test_a_folder_is_removed_whole_whenever_its_remover_dies(tmp_path: Path) -> None:
    for call in range(20):
        for path in (tmp_path / "old" / "a", tmp_path / "old" / "b" / "c"):
            path.mkdir(parents=True, exist_ok=True)
            (path / "content").touch()
        died = dies_before(call, lambda: remove_folder(tmp_path / "old"), True)
        whole = (tmp_path / "old").exists()
        assert not whole or names(tmp_path / "old") == ["a", "b"]
        sweep(tmp_path)
        assert names(tmp_path) == (["old"] if whole else [])
        if not died:
            break
    assert call > 4
    assert not whole


def test_the_next_writer_of_a_name_makes_good_what_was_left(tmp_path: Path) -> None:
    def killed(child: Child) -> None:
        with atomic_folder(tmp_path / "task") as folder:
            (folder / "large").touch()
            os._exit(0)

    Child(killed).join()
    Child(lambda _: killed_elsewhere(tmp_path / "other")).join()
    assert len(names(tmp_path)) == 4
    with atomic_folder(tmp_path / "task") as folder:
        (folder / "content").touch()
    assert [name for name in names(tmp_path) if "other" not in name] == ["task"]
    sweep(tmp_path)
    assert names(tmp_path) == ["task"]


def killed_elsewhere(path: Path) -> None:
    with atomic_folder(path):
        os._exit(0)


def test_what_a_living_writer_writes_is_not_swept(tmp_path: Path) -> None:
    def work(child: Child) -> None:
        with atomic_folder(tmp_path / "task") as folder, atomic_file(tmp_path / "file") as file:
            (folder / "content").touch()
            file.write_text("content")
            child.ready()
            child.wait()

    child = Child(work).wait_until_ready()
    with atomic_folder(tmp_path / "own") as folder, atomic_file(tmp_path / "too"):
        (folder / "content").touch()
        before = names(tmp_path)
        sweep(tmp_path)
        assert names(tmp_path) == before
    assert [name for name in names(tmp_path) if not name.startswith(".")] == ["own", "too"]
    assert len(names(tmp_path)) == 5
    child.kill()
    sweep(tmp_path)
    assert names(tmp_path) == ["own", "too"]


def test_a_sweep_and_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    def writes(_: Child) -> None:
        for number in range(30):
            with atomic_folder(tmp_path / f"{os.getpid()}-{number}") as folder:
                (folder / "content").touch()
            atomic_write_text(tmp_path / f"{os.getpid()}-{number}.txt", "x")

    def sweeps(_: Child) -> None:
        for _ in range(200):
            sweep(tmp_path)

    children = [Child(work) for work in (writes, writes, sweeps, sweeps)]
    assert [child.join() for child in children] == [0] * 4
    assert len(names(tmp_path)) == 2 * 30 * 2
    assert len(list(tmp_path.glob("*/content"))) == 2 * 30


def test_nothing_is_swept_but_what_has_a_temporary_name(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    for name in (
        ".task.0123456789ab.tmp",
        ".spectune-new",
        ".task.0123456789AB.spectune-new",
        "a.0123456789ab.spectune-new",
    ):
        (tmp_path / name).mkdir()
    before = names(tmp_path)
    (tmp_path / ".a.0123456789ab.spectune-gone").symlink_to(tmp_path / "outside")
    (tmp_path / ".b.0123456789ab.spectune-new").symlink_to(tmp_path / "outside")
    sweep(tmp_path)
    sweep(tmp_path / "nowhere")
    assert names(tmp_path) == before


def test_a_link_to_a_folder_is_replaced_and_removed_and_its_target_stays(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    for _ in range(2):
        (tmp_path / "link").symlink_to("target")
        with atomic_folder(tmp_path / "link") as folder:
            (folder / "content").touch()
        assert names(tmp_path / "link") == ["content"]
        shutil.rmtree(tmp_path / "link")
    (tmp_path / "target" / "mine").touch()
    (tmp_path / "link").symlink_to("target")
    remove_folder(tmp_path / "link")
    remove_folder(tmp_path / "nowhere")
    assert names(tmp_path) == ["target"]
    assert names(tmp_path / "target") == ["mine"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_permissions_are_the_umasks_whoever_wrote_the_file(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        with atomic_folder(tmp_path / "folder") as folder:
            save_file({"a": torch.ones(1)}, folder / "theirs.safetensors")
            (folder / "own").touch()
            make_tokenizer().save_pretrained(folder)
        with atomic_file(tmp_path / "file.safetensors") as file:
            save_file({"a": torch.ones(1)}, file)
        atomic_write_text(tmp_path / "text", "x")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {0o666 & ~mask}
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~mask


def text(folder: Path) -> None:
    (folder / "large").write_text("x" * 2**17)


def weights(folder: Path) -> None:
    save_file({"a": torch.ones(2**15)}, folder / "large")


def tokenizer(folder: Path) -> None:
    make_tokenizer().save_pretrained(folder)


def numbers(folder: Path) -> None:
    with (folder / "large").open("wb") as file:
        torch.ones(2**15).numpy().tofile(file)


@pytest.mark.parametrize("write", [text, weights, tokenizer, numbers])
def test_a_full_disk_names_the_folder_and_what_was_there_stays(write: Callable[[Path], None], tmp_path: Path) -> None:
    """Python's, safetensors', tokenizers' and numpy's own ways to say it."""
    (tmp_path / "run").mkdir()
    for path, what in ((tmp_path / "task", ""), (tmp_path / "task", "as it was")):
        whole = "checkpoint-7 is whole."
        with files_of_at_most(2**12), pytest.raises(WriteError) as refused, disk_errors(tmp_path / "run", whole):
            written(path, write)
        said = str(refused.value)
        assert said.startswith(f"{tmp_path / 'run'} could not be written: ")
        assert said.endswith(f"{what + '. ' if what else ''}checkpoint-7 is whole.")
        assert "spectune-new" not in said
        assert refused.value.exit_code == 1
        assert [name for name in names(tmp_path) if name != "run"] == (["task"] if what else [])
        with atomic_folder(path, anything) as folder:
            (folder / "old").touch()
    assert names(path) == ["old"]


@contextlib.contextmanager
def small_disk(folder: Path, options: str) -> Iterator[None]:
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "spectune", folder], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("no right to mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def many(folder: Path) -> None:
    for number in range(8):
        (folder / f"{number}").touch()


@pytest.mark.parametrize(("options", "write"), [("size=64k", text), ("size=64k", weights), ("nr_inodes=8", many)])
def test_a_disk_without_room_or_inodes_is_left_as_it_was(
    options: str, write: Callable[[Path], None], tmp_path: Path
) -> None:
    with small_disk(tmp_path, options):
        atomic_write_text(tmp_path / "task" / "old", "mine")
        with pytest.raises(WriteError, match="no space"):
            written(tmp_path / "task", write)
        assert (names(tmp_path), names(tmp_path / "task")) == (["task"], ["old"])


def written(path: Path, write: Callable[[Path], None]) -> None:
    with atomic_folder(path, anything) as folder:
        write(folder)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EDQUOT, "x"), "quota"),
        (OSError(errno.EROFS, "x"), "read-only"),
        (OSError(errno.EIO, "x"), "disk fails"),
        (Exception("Permission denied (os error 13)"), "permission is denied"),
        (RuntimeError("writing failed: No space left on device"), "no space"),
        (OSError("4096 requested and 12 written"), "no space"),
        (ValueError("x"), None),
        (OSError(errno.ENOENT, "x"), None),
        (PermissionError(errno.EACCES, "x"), None),
    ],
)
def test_what_the_disk_did_is_told_from_what_it_did_not(error: Exception, words: str | None) -> None:
    def fail() -> None:
        try:
            raise error
        except Exception as inner:
            raise RuntimeError("while writing") from inner

    expected = RuntimeError if words is None else WriteError
    with pytest.raises(expected, match=words), disk_errors("folder"):
        fail()


def test_an_error_of_before_is_not_an_error_of_the_disk_now() -> None:
    try:
        raise OSError(errno.ENOSPC, "x")
    except OSError:
        with pytest.raises(KeyError), disk_errors("folder"):
            raise KeyError("x")  # noqa: B904 - its context is what happened before


def test_an_interrupted_move_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.replace, []

    def interrupted(source: Path, target: Path) -> None:
        calls.append(source)
        if target == tmp_path / "task" and len(calls) == 2:
            raise KeyboardInterrupt
        real(source, target)

    with atomic_folder(tmp_path / "task") as folder:
        (folder / "old").touch()
    monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "task", anything) as folder:
        (folder / "new").touch()
    assert names(tmp_path) == ["task"]
    assert names(tmp_path / "task") == ["old"]
