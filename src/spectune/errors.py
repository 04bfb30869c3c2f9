"""The errors a user can meet, each with the exit code that the command line answers with."""

import difflib
import errno
from collections.abc import Iterable, Sequence

#: names given in a message; the others are counted
NAMED = 5
#: what libraries say where memory ran out
_NO_MEMORY = ("not enough memory", "can't allocate memory", "cannot allocate memory", "out of memory", "bad_alloc",
              "alloc_failed")  # fmt: skip


def first_line(error: BaseException) -> str:
    """The first line of an error that says something: libraries' messages may go on for pages."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")


def did_you_mean(given: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """` (did you mean 'lora'?)` with the known name that is most like the given one; empty where none is."""
    near = difflib.get_close_matches(given, list(known), n=1, cutoff=cutoff)
    return f" (did you mean {near[0]!r}?)" if near else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, a library or Python raised this error because the device's or the host's memory ran out."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # safetensors has an error of its own, which is of no other kind
    if isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError":
        return any(sign in str(error).lower() for sign in _NO_MEMORY)
    return isinstance(error, MemoryError)


class SpectuneError(Exception):
    """Something failed in a way that has one clear sentence for the user."""

    exit_code: int = 1


class ConfigError(SpectuneError, ValueError):
    """A setting, a flag or an argument is wrong: it names what was given and what was expected."""

    exit_code = 2


class BusyFolderError(ConfigError):
    """Another process works in the folder: it is named by its number, its machine, its command and since when."""


class DataError(SpectuneError, ValueError):
    """Data is missing or broken. `problems` holds one line each, `file:line: what is wrong; what was expected`."""

    exit_code = 3

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        self.problems = list(problems)
        super().__init__("\n".join([message, *self.problems]))


class WriteError(SpectuneError):
    """The disk is full, read-only or broken.

    Attributes:
        folder: what could not be written.
        reason: in words, of the disk.
        whole: what there is that can be relied on, as a sentence; empty where nothing is.
    """

    def __init__(self, folder: object, reason: str, whole: str = "") -> None:
        super().__init__(str(folder), reason, whole)
        self.folder, self.reason, self.whole = str(folder), reason, whole

    def __str__(self) -> str:
        return f"{self.folder} could not be written: {self.reason}. {self.whole}".rstrip()


class ExportError(SpectuneError):
    """What was exported does not do what the delta does, in the program that it was written for."""


class DoesNotFitError(SpectuneError):
    """The plan says that the run does not fit into memory."""

    exit_code = 4


class BankFullError(DoesNotFitError):
    """A bank's deltas do not fit on the device beside those that others hold now; later they may."""


class OutOfMemoryError(SpectuneError):
    """Memory ran out in a step; the message names batch and length."""

    exit_code = 5


class DivergedError(SpectuneError):
    """The loss or a gradient is not finite any more; the last good state was kept."""

    exit_code = 6


class InterruptedRun(SpectuneError):  # noqa: N818 - an interruption is not an error of the program
    """Ctrl-C, SIGTERM or SIGHUP: a checkpoint was written, the message says how to go on."""

    exit_code = 130


class PeerFailedError(SpectuneError):
    """Another process of the same run failed, and says why; this one ends with its exit code."""

    def __init__(self, rank: int, message: str, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(f"process {rank} failed: {message}")
