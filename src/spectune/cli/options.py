"""The flags that commands share, each written once."""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import typer

#: flags of the command itself; all others are settings, of the same name
OWN = {"config", "assignments", "dry", "as_json"}


def flags(context: typer.Context, own: Collection[str] = ()) -> dict[str, Any]:
    """The command's flags as `Settings.collect` takes them: None where one was not given, a switch that is off too.

    Args:
        own: further flags that are no settings.
    """
    given = {name: value for name, value in context.params.items() if name not in OWN and name not in own}
    return {name: _single(value) for name, value in given.items()}


def _single(value: Any) -> Any:
    """A flag's value: None where it was not given, and the only one of a flag that may come several times."""
    if isinstance(value, list | tuple):  # a flag that may come several times is () where it was not given
        return None if not value else value[0] if len(value) == 1 else list(value)
    return None if value is False else value


Model = Annotated[
    str | None,
    typer.Option(help="Base: a hub id, a local folder, or spectune-tiny (embedded).", show_default="spectune-tiny"),
]
BaseOfRun = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="With --run: the base to put its delta on, which has to be the run's. Without: a base, a merged model, or "
        "the folder of a delta (PEFT's, too), taken as it is.",
        show_default="as the run says",
    ),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        help="Training rows: JSONL, JSON, CSV, Parquet, Arrow or text, also .gz or .zst; a folder, or a hub name. "
        "Repeatable; FILE=2 has each row twice an epoch, FILE=0.5 half of the rows.",
        show_default="the embedded task",
    ),
]
TaskType = Annotated[
    str | None,
    typer.Option(
        help="What is learned: auto, CAUSAL_LM (text), SEQ_CLS (a class or a number for a text) or TOKEN_CLS (a class "
        "for each word).",
        show_default="auto: by the rows; text + label is SEQ_CLS, tokens + tags is TOKEN_CLS",
    ),
]
TrainOn = Annotated[
    str | None,
    typer.Option(help="Turns of a chat to learn: all (of the assistant) or last.", show_default="all"),
]
Valid = Annotated[
    list[str] | None,
    typer.Option(help="Validation rows. Repeatable.", show_default="a seeded tenth of --data is held out"),
]
OutputDir = Annotated[Path | None, typer.Option(help="Folder of the run.", show_default="runs/<date>-<method>-<n>")]
Config = Annotated[
    Path | None,
    typer.Option(help="YAML file: training keys at the top, a `method:` block with `name`. Flags take precedence."),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set one key (repeatable): learning_rate=1e-3, method.r=8."),
]
DoSample = Annotated[bool, typer.Option("--do-sample", help="Sample tokens; else decoding is greedy.")]
Temperature = Annotated[float, typer.Option(min=0.01, help="Temperature for --do-sample.")]
TopP = Annotated[float, typer.Option(min=0.01, max=1.0, help="Nucleus probability for --do-sample.")]
Seed = Annotated[int | None, typer.Option(help="Seed of weights, data order and splits.", show_default="0")]
Resume = Annotated[bool, typer.Option("--resume", help="Resume in --output-dir; start there if nothing is saved.")]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Read all data, build everything, run one step on the longest batch, write nothing."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout, and nothing else.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.", show_default="auto")]
Dtype = Annotated[
    str | None, typer.Option(help="auto, float32, bfloat16 or float16: the base's compute dtype.", show_default="auto")
]
BasePrecision = Annotated[
    str | None,
    typer.Option(help="fp8, nf4 or int8: storage precision of the frozen base's weights.", show_default="as --dtype"),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Let Python code that comes with the base run, with your rights. Never asked, never taken from a run's "
        "folder.",
    ),
]
AllowMissingWeights = Annotated[
    bool,
    typer.Option(
        "--allow-missing-weights",
        help="Take a base whose files lack weights of its config, or have others: what is missing begins at random.",
    ),
]
ChoiceNormalization = Annotated[
    str | None,
    typer.Option(
        help="How choices of unlike length are compared: sum (log-likelihood), token or byte (its mean over a choice's "
        "tokens or UTF-8 bytes).",
        show_default="sum",
    ),
]
Together = Annotated[
    str | None,
    typer.Option(
        metavar="[auto|N]",
        help="Train runs in shared passes over the base: up to N of them, or as many as gain from it and have room.",
        show_default="each by itself",
    ),
]
SkipBadRows = Annotated[bool, typer.Option("--skip-bad-rows", help="Skip bad rows and count them in the report.")]
ComparedOn = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="Rows to prove on: what was written has to answer on them as the run does.",
        show_default="the rows that the run was judged on",
    ),
]
Check = Annotated[
    bool,
    typer.Option(
        "--check/--no-check", help="Run what was written; it is refused where it does not do what the run does."
    ),
]
Run = Annotated[
    Path | None,
    typer.Option("--run", help="A run's folder, or a saved delta's.", show_default="the newest under runs/"),
]
