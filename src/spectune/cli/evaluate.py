"""`spectune eval`: a tuned model and its bare base on rows of one's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectune.cli import options
from spectune.cli.console import note, print_json, say, work
from spectune.cli.inputs import note_losses, row_length, rows_to_judge, run_on

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from spectune.data import Example, Row


def evaluate(
    run: options.Run = None,
    model: options.BaseOfRun = None,
    data: Annotated[str | None, typer.Option(help="Rows to judge on.", show_default="the embedded test rows")] = None,
    generate_rows: Annotated[
        int, typer.Option(min=0, help="Rows to write a completion for, to compare with their references; 0: none.")
    ] = 100,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens a written row may get.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at a time.")] = 16,
    skip_bad_rows: options.SkipBadRows = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
) -> None:
    """Measure a run on rows: loss, perplexity, and, where rows have references or choices, text metrics and accuracy.

    The bare base is measured on the same rows, beside it.

    \b
    Examples:
      spectune eval
      spectune eval --run runs/2026-01-31-lora-1 --data test.jsonl
      spectune eval --generate-rows 0 --json
    """
    found = run_on(run, model)
    with work(as_json=as_json) as out:
        from spectune.data import encode
        from spectune.deltas import route

        rows, source = rows_to_judge(data, skip_bad_rows=skip_bad_rows)
        note(f"run: {found.folder}; rows: {source}")
        base_model, tokenizer = found.load(device or "auto", dtype or "auto")
        separator = str(found.config.get("separator", ""))
        max_length = row_length(base_model, found.config.get("max_length"))
        encoded = encode(rows, tokenizer, max_length=max_length, separator=separator)
        note_losses(encoded.report, source, "--json names each")
        judge = _Judge(tokenizer, separator, max_length, max_new_tokens, batch_size)
        # a long text is several examples of one row
        kept = list({id(example.row): example.row for example in encoded.examples}.values())
        tuned = judge(base_model, encoded.examples, kept, generate_rows)
        with route(base_model, None):
            base = judge(base_model, encoded.examples, kept, generate_rows)
        answer = {
            "run": str(found.folder),
            "base_model": found.base,
            "data": source,
            "rows": len(kept),
            "tuned": tuned,
            "base": base,
            "data_report": encoded.report.to_dict(),
        }
        if not as_json:
            _print(out, answer)
    if as_json:
        print_json(answer)


class _Judge:
    """The measurements of one model, under whatever route is current."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        separator: str,
        max_length: int,
        max_new_tokens: int,
        batch_size: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.separator = separator
        self.max_length = max_length
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size

    def __call__(
        self, model: PreTrainedModel, examples: list[Example], rows: list[Row], generate_rows: int
    ) -> dict[str, float]:
        from spectune.evaluation import accuracy_over_choices, row_losses, text_metrics
        from spectune.inference import choice_log_likelihoods

        pad = self.tokenizer.pad_token_id
        losses = row_losses(model, examples, pad if isinstance(pad, int) else 0, self.batch_size)
        measured: dict[str, float] = {
            "loss_nats_per_token": losses.mean_per_token,
            "perplexity": losses.perplexity,
            "target_tokens": losses.total_target_tokens,
        }
        to_choose = [row for row in rows if row.choices and row.label is not None]
        if to_choose:
            scores = choice_log_likelihoods(
                model,
                self.tokenizer,
                to_choose,
                max_length=self.max_length,
                separator=self.separator,
                batch_size=self.batch_size,
            )
            measured["choice_accuracy"] = accuracy_over_choices(
                scores, [row.choices for row in to_choose], [row.label for row in to_choose]
            )
        to_write = [row for row in rows if _references(row) and (row.prompt or row.messages)][:generate_rows]
        if to_write:
            texts = self._write(model, to_write)
            measured |= text_metrics([text.strip() for text in texts], [_references(row) for row in to_write])
            measured["generated_rows"] = len(to_write)
        return measured

    def _write(self, model: PreTrainedModel, rows: list[Row]) -> list[str]:
        from spectune.data import prompt_ids
        from spectune.inference import generate_texts

        prompts = [prompt_ids(row, self.tokenizer, self.separator) for row in rows]
        return generate_texts(
            model, self.tokenizer, prompts, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size
        )


def _references(row: Row) -> tuple[str, ...]:
    """What a written completion is compared with: the row's references, else its own answer."""
    answer = row.messages[-1]["content"] if row.messages else row.completion
    return row.references or ((answer.strip(),) if answer else ())


def _print(out: Console, answer: dict[str, Any]) -> None:
    from rich.table import Table

    say(out, f"{answer['rows']:,} rows of {answer['data']}", style="italic")  # a table's title would be folded
    table = Table()
    for column in ("", "tuned", "bare base"):
        table.add_column(column, justify="left" if column == "" else "right")
    for key, value in answer["tuned"].items():
        other = answer["base"].get(key)
        table.add_row(key.replace("_", " "), _number(value), _number(other))
    out.print(table)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"
