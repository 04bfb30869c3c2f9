"""`spectune chat`: a conversation with a run, or with a model as it is."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectune.cli import options
from spectune.cli.base_and_deltas import loader, what_is_asked
from spectune.cli.console import note, work
from spectune.errors import InterruptedRun, SpectuneError
from spectune.files.plain_text import plain

if TYPE_CHECKING:
    from spectune.cli.conversation import Conversation
    from spectune.data.requests import How

PROMPT = "> "
HELP = (
    "/reset          begin anew",
    "/system [TEXT]  begin anew, with this system message or with none",
    "/help           this",
    "/exit           end (as Ctrl-D does)",
    "Ctrl-C stops an answer; a line that begins with // is sent with one /.",
)
#: for the one delta that may be there: whatever it takes
_MEMORY = 2**40


def chat(
    context: typer.Context,
    run: options.Run = None,
    model: options.BaseOfRun = None,
    system: Annotated[str | None, typer.Option(help="System message.", show_default="the run's own")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of new tokens of an answer.")] = 256,
    do_sample: options.DoSample = False,
    temperature: options.Temperature = 1.0,
    top_p: options.TopP = 1.0,
    seed: options.Seed = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    base_precision: options.BasePrecision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_missing_weights: options.AllowMissingWeights = False,
) -> None:  # fmt: skip
    """Talk to the newest run, the one that --run names, or with --model alone to that model as it is.

    A conversation goes through the chat template, as every chat in training did. Of a run that was trained on prompts
    each line is a prompt of its own, as `spectune generate` has it. Lines may come from a pipe: each is answered.

    /reset begins anew, /system TEXT does so with a system message, /help lists these, /exit or Ctrl-D ends. Ctrl-C
    stops an answer.

    \b
    Examples:
      spectune chat
      spectune chat --run runs/2026-01-31-lora-1
      spectune chat --model Qwen/Qwen3-0.6B --do-sample --temperature 0.7
      echo "Who are you?" | spectune chat
    """
    with work():
        from spectune.cli.conversation import Conversation
        from spectune.data.requests import How

        what = what_is_asked(run, model, None)
        place = {
            "device": device or "auto", "dtype": dtype or "auto", "base_precision": base_precision,
            "trust_remote_code": trust_remote_code, "allow_missing_weights": allow_missing_weights,
        }  # fmt: skip
        catalogue = what.catalogue(None)
        entry = catalogue.find(next(iter(what.named), what.name))
        assert entry is not None, "it is one of its own"
        form = catalogue.form(entry)
        loaded = loader(what.base, place, 1, _MEMORY if entry.delta is not None else None)()
        with Conversation(loaded, entry.delta, form) as talk:
            if system is not None:
                talk.begin(system)
            note(f"{entry.name}: {talk.kind}. /help lists what else a line may be")
            _talk(talk, How.of(context.params))


def _talk(talk: Conversation, how: How) -> None:
    with _terminated():
        for line in _lines():
            if line.startswith("/") and not line.startswith("//"):
                if not _obeyed(talk, line):
                    return
                continue
            text = line[1:] if line.startswith("//") else line
            if text.strip():
                _answer(talk, text, how)
            if _nobody_reads():
                return


def _answer(talk: Conversation, text: str, how: How) -> None:
    pieces = talk.answer(text, how)
    try:
        for piece in pieces:
            _show(piece)
            if _nobody_reads():
                break
    except KeyboardInterrupt:
        note("(stopped)")
    except InterruptedRun:
        raise
    except SpectuneError as error:
        note(f"error: {error}")
    finally:
        with contextlib.suppress(RuntimeError):
            pieces.close()  # what was written of it stays in the conversation
    _show("\n")


def _obeyed(talk: Conversation, line: str) -> bool:
    """Do what a line with a slash says. Returns whether there is more to come."""
    word, _, rest = line.strip().partition(" ")
    if word in ("/exit", "/quit", "/bye"):
        return False
    if word == "/reset":
        talk.begin(talk.system)
        note("(a new conversation)")
    elif word == "/system":
        try:
            talk.begin(rest.strip() or None)
        except SpectuneError as error:
            note(f"error: {error}")
        else:
            note("(a new conversation, with this system message)" if rest.strip() else "(a new conversation)")
    elif word == "/help":
        for text in HELP:
            note(text)
    else:
        note(f"{word} is no command; /help lists them, and a line that begins with // is sent with one /")
    return True


def _lines() -> Iterator[str]:
    """What the user types, or what a pipe holds, without the ends of lines."""
    if sys.stdin is None:
        return
    if not sys.stdin.isatty():
        yield from (line.rstrip("\r\n") for line in _decoded())
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - input() then has a history and can be edited
    while True:
        try:
            yield input(PROMPT)
        except EOFError:
            _show("\n")
            return
        except KeyboardInterrupt:
            note("\n(Ctrl-D or /exit ends)")


def _decoded() -> Iterator[str]:
    """The lines of stdin, UTF-8 whatever the locale is; bytes that are none are shown as such."""
    for line in getattr(sys.stdin, "buffer", ()):
        yield line.decode("utf-8", errors="backslashreplace")


def _show(piece: str) -> None:
    """Put text out at once."""
    sys.stdout.write(plain(piece))
    sys.stdout.flush()


def _nobody_reads() -> bool:
    below: Any = getattr(sys.stdout, "rich_proxied_file", None)
    return below is not None and below.failure is not None


@contextlib.contextmanager
def _terminated() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP end the conversation; Ctrl-C is for its answers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: FrameType | None) -> None:
        raise InterruptedRun(f"{signal.Signals(number).name}")

    wanted = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    before = {number: signal.signal(number, end) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
