"""Checks in processes of their own, side by side, each with a time limit: none hangs or ends the command."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace

from spectune.health.machine_load import is_overloaded, usable_cores
from spectune.health.outcome import FAILED, NOT_HERE, Outcome


@dataclass(frozen=True)
class Check:
    """A check to be run in a process: its name, what it is told, its limit, and what to do where it breaks down."""

    name: str
    arguments: tuple[str, ...] = ()
    seconds: float = 30.0
    advice: str = ""


def checks(output: str, cache: str) -> list[Check]:
    """All that are run in processes, those that take longest first. `output`, `cache`: folders that runs write to."""
    return [
        Check("compile", seconds=45, advice="Train with --set torch_compile=false"),
        Check("processes", seconds=40, advice="Train in one process, without torchrun"),
        Check("attention", seconds=40, advice="Load bases with eager attention, or use another torch"),
        Check("graphs", advice="Train with --set cuda_graphs=false"),
        Check("int8-nf4", advice="Do not load bases with base_precision=int8 or nf4 here"),
        Check("fp8", advice="Do not load bases with base_precision=fp8 here"),
        Check("output-folder", (output,), advice="Choose another folder (--output-dir)"),
        Check("cache-folder", (cache,), advice="Choose another folder (HF_HOME)"),
    ]


def command_of(check: Check) -> list[str]:
    # -P: nothing that lies in the folder at hand is imported
    return [sys.executable, "-P", "-m", "spectune.health.child", check.name, *check.arguments]


class Checkup:
    """Checks that run.

    Args:
        seconds: in which all have to be done.
        command: of a check's process.
        overloaded: whether others leave so little of the machine that a check which takes too long says nothing.
    """

    def __init__(
        self, seconds: float, command: Callable[[Check], list[str]] = command_of,
        overloaded: Callable[[], bool] = is_overloaded,
    ) -> None:  # fmt: skip
        self.command, self.overloaded = command, overloaded
        self._until = time.monotonic() + seconds
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._ended = False

    @contextlib.contextmanager
    def started(self, wanted: Sequence[Check]) -> Iterator[Iterator[Outcome]]:
        """The outcomes as they come. Whatever ends the `with` ends all processes."""
        pool = ThreadPoolExecutor(max(2, min(len(wanted) or 1, usable_cores())))
        try:
            running = [pool.submit(self.outcome, check) for check in wanted]
            yield (future.result() for future in as_completed(running))
        finally:
            with self._lock:
                self._ended = True
                for process in self._running:
                    _kill(process)
            pool.shutdown(cancel_futures=True)

    def outcome(self, check: Check) -> Outcome:
        """What one check found, or how it broke down."""
        began = time.monotonic()
        limit = min(check.seconds, self._until - began)
        if limit < 1:
            return Outcome(check.name, NOT_HERE, "not looked at: the others took all of the time", "Run it again alone")
        with self._lock:
            if self._ended:
                return Outcome(check.name, NOT_HERE, "not looked at: interrupted")
            process = subprocess.Popen(
                self.command(check), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True, start_new_session=True,
            )  # fmt: skip
            self._running.add(process)
        try:
            out, errors = process.communicate(timeout=limit)
            found = _read(check, out, errors, process.returncode)
        except subprocess.TimeoutExpired:
            found = self._too_long(check, limit)
        finally:
            _kill(process)  # and what it has started
            with self._lock:
                self._running.discard(process)
            try:
                process.communicate(timeout=5)
            except subprocess.TimeoutExpired:  # a driver or a disk keeps it, and nobody is to wait for that
                threading.Thread(target=process.communicate, daemon=True).start()
        return replace(found, seconds=time.monotonic() - began)

    def _too_long(self, check: Check, limit: float) -> Outcome:
        says = f"did not end within {limit:.0f} s"
        if self.overloaded():
            return Outcome(
                check.name, NOT_HERE, f"{says} beside what others compute here, which says nothing; it was ended",
                "Run it again once the machine is quiet",
            )  # fmt: skip
        return Outcome(check.name, FAILED, f"{says}, and was ended", check.advice)


def _read(check: Check, out: str, errors: str, code: int) -> Outcome:
    lines = [line for line in out.splitlines() if line.startswith("{")]
    if code == 0 and lines:
        return Outcome(**json.loads(lines[-1]))
    told = next((line.strip() for line in reversed(errors.splitlines()) if line.strip()), "no word")
    how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return Outcome(check.name, FAILED, f"{how}: {told}", check.advice)


def _kill(process: subprocess.Popen[str]) -> None:
    """End a process and all that it has started: they are a session of their own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
