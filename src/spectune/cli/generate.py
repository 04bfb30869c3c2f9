"""`spectune generate`: what a tuned model writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectune.cli import options
from spectune.cli.console import note, print_json, work
from spectune.cli.inputs import rows_to_judge
from spectune.cli.runs import find_run
from spectune.errors import ConfigError

if TYPE_CHECKING:
    from spectune.data import Row


def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts.", show_default="a few test rows")] = None,
    run: options.Run = None,
    data: Annotated[str | None, typer.Option(help="Take the prompts from a file's rows.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows of --data.")] = 5,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens a row may get.")] = 64,
    do_sample: Annotated[bool, typer.Option("--do-sample", help="Draw tokens; without it the likeliest.")] = False,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of --do-sample.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="Of --do-sample.")] = 1.0,
    seed: options.Seed = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
) -> None:
    """Write a completion for each prompt, with the newest run or the one that --run names.

    A prompt goes to the model exactly as a training row's prompt did: with the run's
    separator, or in the chat template.

    \b
    Examples:
      spectune generate
      spectune generate "name: The Punter | food: Indian | area: riverside" --run runs/2026-01-31-lora-1
      spectune generate --data test.jsonl --rows 20 --json
    """
    if prompts and data is not None:
        raise ConfigError("prompts come from the command line or from --data, not from both")
    found = find_run(run)
    with work(as_json=as_json) as out:
        from spectune.data import prompt_ids
        from spectune.inference import generate_texts

        if prompts:
            asked = [_row_of(text, number) for number, text in enumerate(prompts, start=1)]
        else:
            asked = _rows_with_prompts(rows_to_judge(data)[0], rows)
        note(f"run: {found.folder}")
        model, tokenizer = found.load(device or "auto", dtype or "auto")
        separator = str(found.config.get("separator", ""))
        texts = generate_texts(
            model,
            tokenizer,
            [prompt_ids(row, tokenizer, separator) for row in asked],
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            temperature=temperature,
            top_p=top_p,
            seed=seed or 0,
        )
        written = [_record(row, text) for row, text in zip(asked, texts, strict=True)]
        if not as_json:
            for record in written:
                out.print(record["prompt"], style="dim", markup=False)
                out.print(record["completion"].strip(), markup=False)
                if record["references"]:
                    out.print(f"reference: {record['references'][0]}", style="dim italic", markup=False)
                out.print()
    if as_json:
        print_json({"run": str(found.folder), "base": found.base, "outputs": written})


def _row_of(prompt: str, number: int) -> Row:
    from spectune.data import Row

    return Row(f"prompt {number}", prompt=prompt, completion="")


def _rows_with_prompts(rows: list[Row], count: int) -> list[Row]:
    asked = [row for row in rows if row.prompt is not None or row.messages]
    if not asked:
        raise ConfigError("these rows have no prompts to go on from: expected `prompt` or `messages`")
    return asked[:count]


def _record(row: Row, completion: str) -> dict[str, Any]:
    if row.prompt is not None:
        prompt = row.prompt
    else:
        prompt = "\n".join(f"{message['role']}: {message['content']}" for message in row.messages or ())
    references = row.references or ((row.completion,) if row.completion else ())
    return {"origin": row.origin, "prompt": prompt, "completion": completion, "references": list(references)}
