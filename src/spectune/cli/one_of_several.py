"""A command as one of several processes that torchrun started: one of them prints, and all end with one exit code."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import NoReturn

import typer

from spectune.cli.console import complain
from spectune.errors import ConfigError, InterruptedRun, PeerFailedError
from spectune.torchrun import Place
from spectune.training.interrupt import stopping_signals

#: what runs in any number of processes; a machine is looked at by any of them
SHARED = ("train", "env", "doctor")


def refuse_several(command: str | None) -> None:
    """Raises ConfigError where torchrun started several processes of a command that runs in one."""
    place = Place.from_environment()
    if not place.alone and command not in SHARED:
        raise ConfigError(
            f"`spectune {command}` runs in one process, and torchrun started {place.size}: start it without torchrun. "
            "What several processes share is `spectune train`"
        )


@contextlib.contextmanager
def joined(device: str) -> Iterator[None]:
    """Inside, the processes that torchrun started are together, each on its own device. Alone this does nothing.

    Raises:
        ConfigError: this machine has fewer GPUs than processes.
    """
    if Place.from_environment().alone:
        yield
        return
    from spectune.storage import resolve_device
    from spectune.training.distribution import World
    from spectune.training.membership import membership

    if not Place.from_environment().leads:
        logging.getLogger("spectune").setLevel(logging.ERROR)
    with membership():
        World(resolve_device(device))  # before anything takes memory of a device
        yield


def of_first(text: str) -> str:
    """What the first process has, where several may have come to different answers: the name of a new folder, say."""
    if Place.from_environment().alone:
        return text
    from spectune.training.distribution import gathered

    return gathered(text)[0]


def stop(error: BaseException, message: str | None = None) -> NoReturn:
    """Say why the command ends, in one of its processes, and end with the error's exit code.

    Args:
        message: what is said instead of the error's own words.
    """
    place = Place.from_environment()
    if place.alone:
        label = "stopped" if _interrupts(error) else "error"
        complain(message or str(error), label=label)
        raise typer.Exit(_exit_code(error)) from error
    _stop_one_of_several(error, message, place)


def _stop_one_of_several(error: BaseException, message: str | None, place: Place) -> NoReturn:
    if threading.current_thread() is threading.main_thread():
        for number in stopping_signals():  # torchrun's, as soon as another process has ended
            signal.signal(number, signal.SIG_IGN)
    from spectune.training.membership import Board, described, leave, tell_torchrun

    own, code = described(error)
    text = message or own
    if not isinstance(error, PeerFailedError):
        notice = Board(place).post(text, code)
        if notice.rank == place.rank:
            who = "" if place.leads else f"process {place.rank}: "
            if code == 1 and not hasattr(error, "exit_code"):
                traceback.print_exception(error, file=sys.stderr)
            complain(who + text, label="stopped" if _interrupts(error) else "error")
        else:
            text, code = f"stopped: process {notice.rank} failed", notice.exit_code
    tell_torchrun(text)
    leave(code)


def _interrupts(error: BaseException) -> bool:
    return isinstance(error, InterruptedRun | KeyboardInterrupt)


def _exit_code(error: BaseException) -> int:
    return int(getattr(error, "exit_code", InterruptedRun.exit_code if _interrupts(error) else 1))
