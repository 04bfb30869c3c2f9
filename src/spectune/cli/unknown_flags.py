"""A flag that a command has not: most are keys of `--set`, or have another name here."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

from spectune.cli import known_keys
from spectune.cli.synonyms import SYNONYMS, how_to_write, meant
from spectune.errors import ConfigError
from spectune.files.plain_text import command_line


class Command(TyperCommand):
    """A command that says what to write instead of a flag that it has not."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)
        if any("--together" in param.opts for param in ctx.command.params):
            args = _with_auto(args)
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # the parser's own, whose module differs between versions of typer
            if not hasattr(error, "possibilities"):
                raise
            raise ConfigError(_instead(ctx, str(getattr(error, "option_name", "")), given)) from error


def _with_auto(args: list[str]) -> list[str]:
    """`--together` without a value is `--together auto`."""
    values = [*args[1:], "--"]
    lone = [word == "--together" and value.startswith("-") for word, value in zip(args, values, strict=True)]
    return [f"{word}=auto" if alone else word for word, alone in zip(args, lone, strict=True)]


def _instead(ctx: Any, flag: str, given: list[str]) -> str:
    """What is wrong with the flag, and what to write."""
    word = flag.lstrip("-").lower().replace("-", "_")
    flags = {name.lstrip("-").replace("-", "_"): name for param in ctx.command.params for name in param.opts}
    flags = {word: name for word, name in flags.items() if name.startswith("--")}
    keys = _keys() if "--set" in flags.values() else set()
    other = SYNONYMS.get(word, word)
    start = f"spectune {ctx.command.name} has no flag {flag}"
    if other not in flags and other not in keys:
        other = meant(word, {*flags, *keys}) or ""
    if other in flags:
        return f"{start}; did you mean {flags[other]}?{how_to_write(word)}"
    if other in keys:
        return f"{start}: it is a key, {command_line('--set', f'{other}={_value(flag, given)}')}{how_to_write(word)}"
    return f"{start}; spectune {ctx.command.name} --help lists those there are"


def _keys() -> set[str]:
    """All that `--set` takes of training and of any method."""
    from spectune.training import TrainingConfig

    return set(TrainingConfig.model_fields).union(*map(known_keys.fields, known_keys.names()))


def _value(flag: str, given: list[str]) -> str:
    """The value that was given with the flag."""
    for place, word in enumerate(given):
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
        if word == flag and place + 1 < len(given) and not given[place + 1].startswith("--"):
            return given[place + 1]
    return "VALUE"
