"""`spectune validate`: are the data good, and what will the loss be taken on?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectune.cli import options
from spectune.cli.console import print_answer, say, work
from spectune.cli.input_rows import note_losses, row_length, rows_of
from spectune.cli.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from spectune.data import Example


def validate(
    data: options.Data = None,
    model: options.Model = None,
    config: options.Config = None,
    assignments: options.Set = None,
    show: Annotated[int, typer.Option(min=0, help="Rows to show with their loss mask.")] = 3,
    skip_bad_rows: options.SkipBadRows = False,
    as_json: options.Json = False,
) -> None:
    """Check a data file against a base's tokenizer, report on every row, and show the loss mask of a few.

    The loss is computed on the text after `target`, which must end with the end-of-text token. All bad rows are listed
    at once with file:line; exit code 3.

    \b
    Examples:
      spectune validate --data train.jsonl --model gpt2
      spectune validate --data train.jsonl --set max_length=256 --set 'separator="\\n"'
    """
    settings = Settings.collect(config, assignments, {"data": data, "model": model})
    settings.methods([])
    with work(as_json=as_json) as out:
        from spectune.data import encode
        from spectune.storage import load

        chosen = settings.training()
        rows, source = rows_of(settings.rows("data"), "training", chosen.row_options)
        base, tokenizer = load(settings.base, device="cpu")
        length = row_length(base, chosen.max_length)
        encoded = encode(rows, tokenizer, max_length=length, **chosen.encode_options)
        report = encoded.report.to_dict()
        note_losses(encoded.report, source)
        shown = [_mask(example, tokenizer) for example in encoded.examples[:show]]
        if not as_json:
            _print(out, source, report, shown)
    print_answer({"data": source, "report": report, "rows": shown}, as_json=as_json)


def _mask(example: Example, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    ids, cut = example.input_ids, example.prompt_length
    return {
        "origin": example.row.origin, "tokens": len(ids), "target_tokens": example.target_tokens,
        "prompt": tokenizer.decode(ids[:cut]), "target": tokenizer.decode(ids[cut:]),
        "ends_with_eos": ids[-1] == tokenizer.eos_token_id,
    }  # fmt: skip


def _print(out: Console, source: str, report: dict[str, Any], shown: list[dict[str, Any]]) -> None:
    say(out, source, style="bold")
    for key, value in report.items():
        if isinstance(value, int):  # and no list of rows
            say(out, f"  {key.replace('_', ' '):<28} {value:,}")
    for row in shown:
        say(out, f"\n{row['origin']}: {row['tokens']} tokens, {row['target_tokens']} in the loss")
        say(out, f"  prompt  {row['prompt']!r}", style="dim")
        say(out, f"  target  {row['target']!r}", style="green")
