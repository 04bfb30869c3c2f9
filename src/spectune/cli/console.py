"""Where output goes: results to stdout, everything else to stderr; with --json stdout has one object and no more.

All of it is plain text (`files.plain_text`), on a terminal and in a file alike, for a file is read on a terminal later;
--json has every character, escaped.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from spectune.compute import allocator_settings
from spectune.files import plain_text
from spectune.torchrun import Place

if TYPE_CHECKING:
    from rich.console import Console

#: Off a terminal rich would fold lines at 80 columns, and a folded `file:line` cannot be searched for.
WIDE = 240
#: they import all else that takes long
LIBRARIES = ("transformers.modeling_utils", "spectune.methods", "spectune.training.prediction")
#: transformers, datasets and tqdm read these when they are imported, which is when a command needs them
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "DATASETS_VERBOSITY": "error", "TQDM_MININTERVAL": "15",
}  # fmt: skip


def console(*, stderr: bool = False) -> Console:
    """A rich console on stdout or stderr that folds lines on a terminal only. Of several processes the first prints."""
    from spectune.files.plain_console import PlainConsole

    stream = sys.stderr if stderr else sys.stdout
    terminal = stream is not None and stream.isatty()
    return PlainConsole(file=stream, width=None if terminal else WIDE, quiet=not Place.from_environment().leads)


def say(out: Console, text: str, style: str | None = None) -> None:
    """Write a user's own text (rows, paths, what a model wrote): never folded, and nothing in it is rich's markup."""
    if out.is_terminal:
        out.print(plain_text.plain(text), style=style, markup=False, emoji=False, soft_wrap=True)
    elif not out.quiet:
        out.file.write(f"{plain_text.plain(text)}\n")  # rich would make spaces of tabs


def complain(message: str, label: str = "error") -> None:
    """Write `label: message` to stderr, never folded; red on a terminal."""
    shown = f"{label}:"
    if sys.stderr is not None and sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
        shown = f"\x1b[31m\x1b[1m{shown}\x1b[0m"
    _write(sys.stderr, f"{shown} {plain_text.message(message)}")


def note(message: str) -> None:
    """Write a line for the user to stderr, so that stdout stays the result's."""
    if Place.from_environment().leads:
        _write(sys.stderr, plain_text.message(message))


def answer(line: str) -> None:
    """Write a line of the result to stdout."""
    _write(sys.stdout, plain_text.plain(line))


def print_answer(content: Any, *, as_json: bool) -> None:
    """With `as_json` print one JSON object. Numbers that are not finite become null: JSON has no word for them."""
    from spectune.files.strict_json import finite

    if as_json and Place.from_environment().leads:
        _write(sys.stdout, plain_text.json_text(finite(content), getattr(sys.stdout, "encoding", None)))


def _write(stream: Any, text: str) -> None:
    """Text that is plain already, with colours of ours: below what would make it plain."""
    if stream is not None:
        below = getattr(stream, "rich_proxied_file", stream)
        below.write(f"{text}\n")
        below.flush()


def import_libraries(names: Sequence[str] = LIBRARIES) -> None:
    """Import torch, transformers and what trains, or what is named, once a command's words are checked, without the
    garbage collector: it would look again and again at what a hundred thousand lines of imports make, and find nothing
    to collect."""
    if "torch" in sys.modules:
        return
    gc.disable()
    try:
        for name in names:
            importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def work(*, as_json: bool = False) -> Iterator[Console]:
    """The console for progress and tables while a command works.

    With `as_json` all of it goes to stderr, and so does whatever a library prints, until the block ends. The chatter of
    transformers and datasets is silenced: what matters is said in the project's own words.
    """
    allocator_settings.use_expandable_segments()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if "transformers" in sys.modules:  # it has read them already
        import transformers

        transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield console(stderr=as_json)
