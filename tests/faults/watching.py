"""What a case's process does to the world: run code of the case's, start programs, use the network, write elsewhere.

`watch` is called inside of the process, before the command. It stops what it can and writes down what it sees.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
#: events of Python's audit hooks whose first argument is a path that is written
PATHS = {"os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.rename", "os.link", "os.symlink",
         "shutil.rmtree", "shutil.move"}  # fmt: skip
#: of these the second is written, too, or alone
TARGETS = {"os.rename", "os.link", "os.symlink", "shutil.move"}
NETWORK = {"socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.gethostbyname", "socket.bind"}
PROGRAMS = {
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "pty.spawn",
}
#: what torch and Python look at a machine with
HARMLESS = {("g++", "--version"), ("uname", "-p")}
#: what the harness itself writes, and the folder that torch makes as it is imported
OURS = re.compile(r"/spectune-faults-\w+/|/torchinductor_\w+$")
#: modules whose names no pickle of ours has a reason to look for
DANGEROUS = {"os", "posix", "subprocess", "builtins", "sys", "shutil", "runpy", "socket"}


class Watcher:
    """An audit hook. What it sees goes to a file, a line each, at most `MOST`."""

    MOST = 50

    def __init__(self, root: str, log: str) -> None:
        self.root = os.path.realpath(root)
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.busy, self.seen = False, 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.busy:
            return
        self.busy = True
        try:
            found = self._found(event, arguments)
            if found is not None and self.seen < self.MOST:
                self.seen += 1
                os.write(self.log, f"{found[:300]!r}\n".encode(errors="replace"))
        finally:
            self.busy = False
        if found is not None and (event in NETWORK or event in PROGRAMS):
            raise ConnectionRefusedError(f"{event} is not allowed here")

    def _found(self, event: str, arguments: tuple[Any, ...]) -> str | None:
        if event == "open":
            path, _, flags = arguments
            return self._written("open", path) if isinstance(flags, int) and flags & WRITES else None
        if event in PATHS:
            places = arguments[1:2] if event in TARGETS - {"os.rename", "shutil.move"} else arguments[:1]
            places += arguments[1:2] if event in ("os.rename", "shutil.move") else ()
            return next((found for place in places if (found := self._written(event, place))), None)
        if event in NETWORK:
            return f"network: {event} {arguments[1:]}"
        if event in PROGRAMS and not self._harmless(arguments):
            return f"program: {event} {arguments[:2]}"
        if event == "exec":
            name = getattr(arguments[0], "co_filename", "")
            return f"code: {name}" if self._inside(name) else None
        if event == "pickle.find_class" and arguments[0].split(".")[0] in DANGEROUS:
            return f"code: pickle of {arguments[0]}.{arguments[1]}"
        return None

    @staticmethod
    def _harmless(arguments: tuple[Any, ...]) -> bool:
        if len(arguments) < 2 or not isinstance(arguments[1], list) or not arguments[1]:
            return False
        program, *given = arguments[1]
        return (os.path.basename(str(program)), *given) in HARMLESS

    def _inside(self, path: Any) -> bool:
        if not isinstance(path, str) or path.startswith("<"):
            return False
        return os.path.realpath(path).startswith(self.root + os.sep)

    def _written(self, event: str, path: Any) -> str | None:
        """What is said of a path outside of the case's folder."""
        if isinstance(path, int):
            return None
        text = os.fsdecode(path)
        # the target of a link is what is written
        full = os.path.join(os.path.realpath(os.path.dirname(text) or "."), os.path.basename(text))
        full = os.path.realpath(full) if event == "open" else full
        if full.startswith((self.root + os.sep, "/proc/", "/dev/null")) or full == self.root or OURS.search(full):
            return None
        return f"written: {event} {full}"


def watch(root: str, log: str) -> None:
    """Begin to watch this process. Temporary files belong into the case's folder; the hub may be asked, and is not
    there."""
    import huggingface_hub.constants

    sys.dont_write_bytecode = True
    tempfile.tempdir = str(Path(root) / "tmp")
    Path(tempfile.tempdir).mkdir(exist_ok=True)
    huggingface_hub.constants.HF_HUB_OFFLINE = False
    sys.addaudithook(Watcher(root, log))
