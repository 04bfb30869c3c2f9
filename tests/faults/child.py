"""A fork server: the command, or any function, in a limited process of its own that costs a fork and not an import.

    with Forks.started() as forks:
        outcome = forks.run(Case(("train", "--output-dir", "out"), cwd=tmp_path))

`python -m tests.faults.child SOCKET` imports all that commands import, runs no torch operation and has one thread. Each
connection gets a fork of it that serves it, and each case a fork of that: in a process group of its own, with its
address space and its time bounded and its streams in files. Faults are put into that process alone, before the command
begins: `Case.faults` names functions of modules here, with what they are given as JSON.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import json
import os
import queue
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]
#: what commands import when they run: nobody waits for it twice
IMPORTED = (
    "spectune.cli.app", "transformers.modeling_utils", "spectune.methods", "spectune.training.prediction",
    "transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama", "spectune.training.trainer",
    "spectune.comparing.comparison", "spectune.storage.bases", "spectune.storage.export", "spectune.inference",
    "spectune.reporting.write", "spectune.reporting.plots", "matplotlib.backends.backend_agg",
)  # fmt: skip
#: one thread, nothing from the hub, no device
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "NO_COLOR": "1", "PYTHONHASHSEED": "0", "MPLBACKEND": "agg",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONFAULTHANDLER": "",
}  # fmt: skip
ROOM, SECONDS = 2 * 2**30, 20.0
CLOSED = "closed"
TRACEBACK = "Traceback (most recent call last)"


@dataclass(frozen=True)
class Case:
    """What runs in a process of its own.

    Attributes:
        argv: of the command, without its name; with `call` what that function finds in `sys.argv`.
        call: `module:function`, called with `given` instead of the command; what it returns, JSON, is the outcome's
            `value`.
        faults: of each `module:function` and its arguments, called before.
        limit_s: seconds after which the process is killed; the outcome is `hung` then.
        room: bytes of address space beyond the server's own; None: no limit.
        stdin, stdout, stderr: a path to open, or CLOSED; None: nothing to read, and files that the outcome has read.
    """

    argv: tuple[str, ...] = ()
    cwd: Path = Path()
    call: str | None = None
    given: Mapping[str, Any] = field(default_factory=dict)
    faults: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    limit_s: float = SECONDS
    room: int | None = ROOM
    stdin: str | None = None
    stdout: str | None = None
    stderr: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How a process ended.

    Attributes:
        rc: exit code; of a process that a signal ended, minus its number.
        memory: bytes that it held at most, beyond what the server holds.
        hung: it took longer than its limit, and was killed for it.
        left_over: it left processes behind, which were killed.
    """

    rc: int
    stdout: str
    stderr: str
    seconds: float
    memory: int
    hung: bool = False
    left_over: bool = False
    value: Any = None

    @property
    def killed(self) -> bool:
        """By a signal, its own or another's."""
        return self.rc < 0

    @property
    def traceback(self) -> bool:
        return TRACEBACK in self.stderr or TRACEBACK in self.stdout

    def __str__(self) -> str:
        end = "hung" if self.hung else f"exit {self.rc}"
        return f"{end} after {self.seconds:.1f} s: {self.stderr.strip()[-600:]}"


class Child:
    """A case that runs."""

    def __init__(self, forks: Forks, number: int, case: Case) -> None:
        self._forks, self._number, self.case = forks, number, case
        self._answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._outcome: Outcome | None = None
        self.pid = 0

    def answer(self, message: dict[str, Any]) -> None:
        self._answers.put(message)

    def started(self) -> Child:
        message = self._answers.get()
        if "error" in message:
            raise RuntimeError(f"the fork server: {message['error']}")
        self.pid = int(message["pid"])
        return self

    def signal(self, number: int) -> bool:
        """Send a signal. Returns whether the process was still there."""
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True

    def wait(self) -> Outcome:
        if self._outcome is None:
            message = self._answers.get()
            if "error" in message:
                raise RuntimeError(f"the fork server: {message['error']}")
            texts = [self._forks.take(self._number, kind) for kind in ("stdout", "stderr", "value")]
            self._outcome = Outcome(
                rc=os.waitstatus_to_exitcode(message["status"]), stdout=texts[0], stderr=texts[1],
                seconds=message["seconds"], memory=message["memory"], hung=message["hung"],
                left_over=message["left_over"], value=json.loads(texts[2]) if texts[2] else None,
            )  # fmt: skip
        return self._outcome


class Forks:
    """A connection to a fork server. Any number of threads may use one, and any number of cases run at once."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(address)
        self._lines = self._socket.makefile("rb")
        self._streams = Path(tempfile.mkdtemp(prefix="spectune-faults-"))
        self._numbers, self._lock = itertools.count(), threading.Lock()
        self._running: dict[int, Child] = {}
        threading.Thread(target=self._read, daemon=True).start()

    @classmethod
    @contextlib.contextmanager
    def started(cls) -> Iterator[Forks]:
        """A server of one's own, which ends with the `with`."""
        with server() as address, cls(address) as forks:
            yield forks

    def start(self, case: Case) -> Child:
        """Begin a case. It runs while other things are done."""
        with self._lock:
            number = next(self._numbers)
            child = self._running[number] = Child(self, number, case)
            request = {
                **asdict(case), "cwd": str(case.cwd.absolute()), "number": number, "streams": str(self._streams)
            }  # fmt: skip
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        return child.started()

    def run(self, case: Case) -> Outcome:
        return self.start(case).wait()

    def take(self, number: int, kind: str) -> str:
        """What a case left in a stream."""
        path = self._streams / f"{number}.{kind}"
        try:
            with open(path, "rb") as file:
                text = file.read(2**24).decode("utf-8", errors="backslashreplace")
            path.unlink()
        except FileNotFoundError:
            return ""
        return text

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # its lines are still being read: closing it alone would wait
        self._socket.close()
        shutil.rmtree(self._streams, ignore_errors=True)

    def _read(self) -> None:
        try:
            for line in self._lines:
                message = json.loads(line)
                child = self._running[message["number"]]
                if "pid" not in message:
                    del self._running[message["number"]]
                child.answer(message)
        except (OSError, ValueError):
            pass  # closed
        for child in list(self._running.values()):
            child.answer({"error": "is gone"})


@contextlib.contextmanager
def server() -> Iterator[str]:
    """A server's address. It ends after the `with`, once nobody is connected any more."""
    folder = tempfile.mkdtemp(prefix="spectune-forks-")
    address = str(Path(folder) / "socket")
    paths = [*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT / "src"), str(ROOT)]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "tests.faults.child", address]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if process.stdout.readline().strip() != "ready":
            raise RuntimeError(f"the fork server did not begin: exit {process.wait()}")
        yield address
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


# The server's side.


def _native_threads() -> list[str]:
    """What the system calls the threads beside the first one."""
    tasks = sorted(Path("/proc/self/task").glob("*/comm"), key=lambda path: int(path.parent.name))
    return [path.read_text().strip() for path in tasks[1:]]


def serve(address: str) -> None:
    """Import everything, then fork for each connection. Ends with who started it, once nobody is connected."""
    gc.disable()
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    gc.enable()
    assert threading.active_count() == 1, "a fork has one thread, and waits for ever for what the others hold"
    if others := _native_threads():  # of an allocator, say, which sees to its forks
        print(f"threads that Python does not know: {', '.join(others)}", file=sys.stderr, flush=True)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen(64)
    print("ready", flush=True)
    sessions, wanted = set[int](), True
    while wanted or sessions:
        readable, _, _ = select.select([listening, *([0] if wanted else [])], [], [], 0.2)
        if 0 in readable:
            wanted = bool(os.read(0, 1))
        if listening in readable:
            connection, _ = listening.accept()
            if pid := os.fork():
                sessions.add(pid)
                connection.close()
            else:
                listening.close()
                Session(connection).serve()
                os._exit(0)
        for pid in list(sessions):
            if os.waitpid(pid, os.WNOHANG)[0]:
                sessions.remove(pid)


class Session:
    """Serves one connection: forks, watches the clocks, and tells how processes ended."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._running: dict[int, dict[str, Any]] = {}
        self._rest = b""

    def serve(self) -> None:
        try:
            while True:
                readable, _, _ = select.select([self.connection], [], [], 0.004 if self._running else None)
                if readable and not self._read():
                    break
                self._look()
        except OSError:
            pass  # who asked is gone
        for pid in self._running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

    def _read(self) -> bool:
        found = self.connection.recv(2**20)
        *lines, self._rest = (self._rest + found).split(b"\n")
        for line in lines:
            self._fork(json.loads(line))
        return bool(found)

    def _fork(self, request: dict[str, Any]) -> None:
        held, begin = resident(), time.monotonic()
        pid = os.fork()
        if pid == 0:
            self.connection.close()
            run(request)
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)  # the child does so, too: whoever comes first
        until = begin + request["limit_s"]
        self._running[pid] = {"number": request["number"], "held": held, "begin": begin, "until": until, "hung": False}
        self._say({"number": request["number"], "pid": pid})

    def _look(self) -> None:
        for pid, case in list(self._running.items()):
            ended, status, used = os.wait4(pid, os.WNOHANG)
            if not ended:
                if time.monotonic() > case["until"]:
                    case["hung"] = True
                    os.killpg(pid, signal.SIGKILL)
                continue
            left_over = True
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:
                left_over = False
            del self._running[pid]
            self._say({
                "number": case["number"], "status": status, "seconds": time.monotonic() - case["begin"],
                "memory": max(0, used.ru_maxrss * 1024 - case["held"]), "hung": case["hung"], "left_over": left_over,
            })  # fmt: skip

    def _say(self, message: dict[str, Any]) -> None:
        self.connection.sendall(json.dumps(message).encode() + b"\n")


def resident() -> int:
    """Bytes that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def run(request: dict[str, Any]) -> NoReturn:
    """A case, in the process that was made for it, to its end."""
    code = 1
    try:
        _prepare(request)
        code = _called(request)
    except BaseException:
        with contextlib.suppress(BaseException):
            traceback.print_exc()
    finally:
        os._exit(_finished(code))


def _prepare(request: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    for number, handler in (
        (signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL), (signal.SIGHUP, signal.SIG_DFL)
    ):  # fmt: skip
        signal.signal(number, handler)
    own = Path(request["streams"]) / str(request["number"])
    _open(0, request["stdin"] or os.devnull, os.O_RDONLY)
    _open(1, request["stdout"] or f"{own}.stdout", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    _open(2, request["stderr"] or f"{own}.stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    if request["room"] is not None:
        bound = address_space() + request["room"]
        resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.argv = ["spectune", *request["argv"]]
    for name, given in request["faults"]:
        named(name)(**given)


def _open(descriptor: int, path: str, flags: int) -> None:
    if path == CLOSED:
        os.close(descriptor)
        setattr(sys, ("stdin", "stdout", "stderr")[descriptor], None)  # as the interpreter finds it
        return
    opened = os.open(path, flags, 0o600)
    if opened != descriptor:
        os.dup2(opened, descriptor)
        os.close(opened)


def _called(request: dict[str, Any]) -> int:
    """Run the command or the function. Returns the code that the interpreter would end with."""
    try:
        if request["call"] is None:
            from spectune.cli import main

            main()
        else:
            function, given = named(request["call"]), request["given"]
            value = function(*given.values()) if function is exec else function(**given)  # it takes no keywords
            Path(request["streams"], f"{request['number']}.value").write_text(json.dumps(value))
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _finished(code: int) -> int:
    """What the interpreter does at its end: waits for threads, flushes the streams, and says where it cannot."""
    import atexit

    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except BaseException as error:
            if stream is sys.stdout:
                with contextlib.suppress(BaseException):
                    print(f"Exception ignored while flushing sys.stdout:\n{error!r}", file=sys.stderr, flush=True)
                code = 120
    return code & 0xFF


def named(name: str) -> Any:
    """The function that `module:function` names."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


if __name__ == "__main__":
    serve(sys.argv[1])
