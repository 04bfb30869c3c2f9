"""Puts the commands together, and turns errors into a message and an exit code, in one place."""

import signal
import sys
import threading
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from spectune.cli.chat import chat
from spectune.cli.compare import compare
from spectune.cli.console import answer, complain
from spectune.cli.doctor import doctor
from spectune.cli.env import env
from spectune.cli.evaluate import evaluate
from spectune.cli.export import export
from spectune.cli.generate import generate
from spectune.cli.merge import merge
from spectune.cli.one_of_several import refuse_several, stop
from spectune.cli.plan import plan
from spectune.cli.recommend import recommend
from spectune.cli.report import report
from spectune.cli.serve import serve
from spectune.cli.standard_streams import StandardStreams
from spectune.cli.train import train
from spectune.cli.unknown_flags import Command
from spectune.cli.validate import validate
from spectune.errors import InterruptedRun, SpectuneError, first_line
from spectune.torchrun import Place
from spectune.training.interrupt import stopping_signals
from spectune.version import __version__

#: commands whose result is a folder: what they print without these flags tells of the work
WORKING, ANSWERING = ("train", "compare", "merge", "export"), ("--json", "--dry-run")


class Commands(TyperGroup):
    """The one place where a user's error becomes a message on stderr and an exit code: no traceback."""

    #: the command that was called
    named: str | None = None

    def main(
        self, args: Sequence[str] | None = None, prog_name: str | None = None, complete_var: str | None = None,
        standalone_mode: bool = True, windows_expand_args: bool = True, **extra: Any,
    ) -> Any:  # fmt: skip
        """Run a command, with streams that take plain text and stop nothing."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        given = sys.argv[1:] if args is None else list(args)
        with StandardStreams() as streams:
            code = self._ended(given, prog_name, complete_var, extra)
            results = self.named not in WORKING or any(flag in given for flag in ANSWERING)
            code = streams.exit_code(code, results=results)
        sys.exit(code)

    def _ended(self, args: list[str], prog_name: str | None, complete_var: str | None, extra: dict[str, Any]) -> int:
        """The exit code of a command."""
        try:
            found = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except (typer.Abort, KeyboardInterrupt):  # a second signal, while the first one was being answered
            complain("interrupted", label="stopped")
            return InterruptedRun.exit_code
        except Exception as error:  # a usage error, whose class differs between versions of typer
            if not hasattr(error, "show"):
                raise
            error.show(file=sys.stderr)
            return int(getattr(error, "exit_code", 2))
        return found if isinstance(found, int) else 0

    def invoke(self, ctx: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            # as Ctrl-C; the training loop has a handler of its own, which checkpoints
            for number in set(stopping_signals()) - {signal.SIGINT}:
                signal.signal(number, signal.default_int_handler)
        try:
            return super().invoke(ctx)
        except SpectuneError as error:
            stop(error)
        except KeyboardInterrupt as error:
            stop(error, "interrupted")
        except OSError as error:
            stop(error, f"{error.filename or 'input or output'}: {error.strerror or error}")
        except Exception as error:
            if Place.from_environment().alone or isinstance(error, typer.Exit | typer.Abort):
                raise
            stop(error)  # a usage error, or a fault of ours
        except BaseException as error:  # sys.exit and the panics of libraries: of code that the command has loaded
            text = f"code that this command loaded ended it: {type(error).__name__}: {first_line(error)}"
            stop(SpectuneError(text))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        found = super().resolve_command(ctx, args)
        self.named = found[0]
        refuse_several(found[0])
        return found


def build_app() -> typer.Typer:
    """The commands as a typer app. Help and usage errors are plain text: boxes would fold the examples."""
    app = typer.Typer(
        cls=Commands, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )  # fmt: skip
    app.callback(invoke_without_command=True)(_root)
    command = partial(app.command, cls=Command)
    command("compare", short_help="Train methods and measure them side by side.")(compare)
    command("train", short_help="Train one method.")(train)
    command("plan", short_help="Predict the memory that training needs, before anything is loaded.")(plan)
    command("recommend", short_help="Recommend a method, with the reasons.")(recommend)
    command("generate", short_help="Generate text with a tuned model.")(generate)
    command("serve", short_help="Serve a base and its deltas over HTTP, as OpenAI's API does.")(serve)
    command("chat", short_help="Talk to a tuned model in the terminal.")(chat)
    command("eval", short_help="Evaluate a tuned model on your own rows.")(evaluate)
    command("merge", short_help="Merge a run's delta into its base: a plain transformers folder.")(merge)
    command("export", short_help="Export a run's delta for PEFT, vLLM and other programs.")(export)
    command("report", short_help="Rebuild a comparison's page, table and plots from its runs.")(report)
    command("validate", short_help="Check a data file, and show what the model will be trained on.")(validate)
    command("env", short_help="Print versions, devices and methods.")(env)
    command("doctor", short_help="Check what of the fast paths works on this machine.")(doctor)
    return app


def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    """The whole fine-tuning spectrum on one base: train six methods, measure them side by side, keep the delta.

    Every command runs with no flag at all, on an embedded base and data:

    \b
      spectune compare --quick      six methods, trained and compared
      spectune train --method lora  one method
      spectune generate             what the newest run writes

    Exit codes: 0 ok, 1 failed, 2 usage or config, 3 bad or missing data, 4 predicted not to fit, 5 out of memory,
    6 diverged, 130 interrupted (go on with --resume).
    """
    if version:
        answer(f"spectune {__version__}")
    elif context.invoked_subcommand is None:
        answer(context.get_help())
