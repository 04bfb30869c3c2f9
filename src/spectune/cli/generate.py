"""`spectune generate`: what a tuned model writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectune.cli import options
from spectune.cli.batch_flags import answer_file, wants_files
from spectune.cli.console import note, print_answer, say, work
from spectune.cli.heads import as_learned
from spectune.cli.input_rows import rows_of, rows_of_run, run_on
from spectune.cli.labelled_rows import labelled
from spectune.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from spectune.cli.runs import Run
    from spectune.data import Row

#: rows of --data, where nobody says
FEW = 5

Prompts = Annotated[
    list[str] | None,
    typer.Argument(help="Prompts.", show_default="a few of the rows that the run was judged on"),
]
Input = Annotated[Path | None, typer.Option("--input", help="File of requests: as --data, an answer may be missing.")]
Output = Annotated[Path | None, typer.Option(help="File of their answers: JSON, a line for each, in order.")]
Deltas = Annotated[
    Path | None, typer.Option(help="Folder of deltas and runs, or of a comparison, that requests may name.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on behind the whole lines that --output has.")]
DeviceMemory = Annotated[
    str | None, typer.Option(help="Memory for deltas on the device, such as 2GiB.", show_default="2GiB")
]


def generate(
    context: typer.Context,
    prompts: Prompts = None,
    run: options.Run = None,
    model: options.BaseOfRun = None,
    data: Annotated[str | None, typer.Option(help="Take the prompts from the rows of a file.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Number of rows of --data.", show_default="5")] = None,
    source: Input = None,
    output: Output = None,
    deltas: Deltas = None,
    resume: Resume = False,
    device_memory: DeviceMemory = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of new tokens for each prompt.")] = 64,
    do_sample: options.DoSample = False,
    temperature: options.Temperature = 1.0,
    top_p: options.TopP = 1.0,
    seed: options.Seed = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    base_precision: options.BasePrecision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_missing_weights: options.AllowMissingWeights = False,
    as_json: options.Json = False,
) -> None:
    """Generate a completion for each prompt, with the newest run or the one that --run names; with --model alone, by
    that model as it is. A run with a head (task_type SEQ_CLS or TOKEN_CLS) says the prompt's class, number or tags.

    With --input and --output all requests of a file are answered, in its order, a line each: rows of any shape, with
    or without an answer, and where they like with `delta` (a name in --deltas, or a run's folder), `max_new_tokens`,
    `temperature`, `top_p`, `top_k`, `seed`, `stop` and `id`. Rows of all deltas are written in one batch. A request
    that cannot be answered has a line with `error`, and the command ends with 1.

    A prompt goes to the model exactly as a training row's prompt did: with the run's separator and the line end that
    all its training prompts end with, in the form of an instruction, or as a user's message in the chat template.

    \b
    Examples:
      spectune generate
      spectune generate "name: Green Park Museum | type: museum | town: Oxford | built: 1979"
      spectune generate "Who are you?" --run runs/2026-01-31-lora-1
      spectune generate --data test.jsonl --rows 20 --json
      spectune generate --input requests.jsonl --output answers.jsonl --deltas deltas
    """
    if wants_files(context.params):
        return answer_file(context.params)
    if prompts and data is not None:
        raise ConfigError("prompts come from the command line or from --data, not from both")
    found = run_on(run, model).allowing(trust_remote_code, allow_missing_weights)
    sampling = {"temperature": temperature, "top_p": top_p, "seed": seed or 0} if do_sample else None
    with work(as_json=as_json) as out:
        asked = _asked(found, prompts, data, rows or FEW)
        if found.labels is not None:
            if sampling is not None:
                raise ConfigError("--do-sample: this run has a head, which gives one label and writes no text")
            written = labelled(found, asked, device, dtype, base_precision)
        else:
            texts = _written(found, asked, (device, dtype, base_precision), max_new_tokens, sampling)
            written = [_record(row, text) for row, text in zip(asked, texts, strict=True)]
        _show(out, [] if as_json else written)
    print_answer({"run": found.folder_name, "base": found.base, "outputs": written}, as_json=as_json)


def _asked(run: Run, prompts: list[str] | None, data: str | None, count: int) -> list[Row]:
    """The rows that are to be answered; says which they are."""
    if prompts:
        note(run.name)
        return _typed(prompts, run)
    read = rows_of_run(run) if data is None else rows_of(data, "test", run.row_options)
    given = as_learned(run.config, read[0])
    note(f"{run.name}; rows: {read[1]}")
    return given[:count] if run.labels is not None else _rows_with_prompts(given, count, data or run.name)


def _show(out: Console, written: Sequence[Mapping[str, Any]]) -> None:
    for record in written:
        say(out, record["prompt"], style="dim")
        say(out, record["completion"].strip())
        if record["references"]:
            say(out, f"reference: {record['references'][0]}", style="dim italic")
        out.print()


def _typed(prompts: list[str], run: Run) -> list[Row]:
    from spectune.data.asking import PromptForm

    form = PromptForm.of(run.config)
    return [form.prompt(text, f"prompt {number}", note) for number, text in enumerate(prompts, start=1)]


def _written(
    run: Run, asked: list[Row], place: tuple[str | None, str | None, str | None], new: int,
    sampling: dict[str, Any] | None,
) -> list[str]:  # fmt: skip
    """What the run's model writes for each row. `place`: device, dtype and precision of the base."""
    from spectune.data import prompts_ids
    from spectune.inference import Sampling, generate_texts

    model, tokenizer = run.load(*place)
    ids = prompts_ids(asked, tokenizer, **run.prompt_options)
    how = None if sampling is None else Sampling(**sampling)
    return generate_texts(model, tokenizer, ids, max_new_tokens=new, sampling=how)


def _rows_with_prompts(rows: list[Row], count: int, source: str) -> list[Row]:
    asked = [row for row in rows if row.prompt is not None or row.messages]
    if not asked:
        raise ConfigError(f"{source}: these rows have no prompts to go on from; expected `prompt` or `messages`")
    return asked[:count]


def _record(row: Row, completion: str) -> dict[str, Any]:
    from spectune.evaluation.references import answer_of, prompt_of

    answer = answer_of(row)
    references = row.references or ((answer,) if answer else ())
    return {"origin": row.origin, "prompt": prompt_of(row), "completion": completion, "references": list(references)}
