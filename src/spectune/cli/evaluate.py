"""`spectune eval`: a tuned model and its bare base on rows of one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectune.cli import options
from spectune.cli.console import note, print_answer, say, work
from spectune.cli.heads import as_learned
from spectune.cli.input_rows import note_losses, row_length, rows_of, rows_of_run, run_on
from spectune.cli.settings import Settings
from spectune.errors import ConfigError
from spectune.files.plain_text import command_line

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from spectune.cli.runs import Run
    from spectune.data import Row
    from spectune.evaluation import JudgedRow

    Measure = Callable[[PreTrainedModel, PreTrainedTokenizerBase], dict[str, float]]

#: settings of a comparison that its runs are measured by again, on the same rows
JUDGING = ("metric", "generate_rows", "choice_normalization")

GenerateRows = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Rows to generate completions for and compare with their references; 0: none.",
        show_default="64, or as the comparison had it",
    ),
]
Metric = Annotated[
    str | None,
    typer.Option(
        help="What to measure beside the loss: auto, or some of exact_match, rouge_l, bleu, chrf, accuracy, macro_f1, "
        "matthews (of a head also mse, pearson, span_f1, token_accuracy), and your own as package.module:function or "
        "file.py:function, comma-separated; loss alone: loss.",
        show_default="auto, or as the comparison had it",
    ),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        help="Rows to evaluate on. Repeatable: losses are by file, too.",
        show_default="the rows that the run was judged on",
    ),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Maximum number of new tokens for each row.",
        show_default="by the longest answer: a quarter more than it has, at most 256, or one more than it has",
    ),
]
LmEvalTasks = Annotated[
    str | None,
    typer.Option(help="Tasks of lm-eval-harness, comma-separated (needs the extra lm-eval).", show_default="none"),
]
LmEvalInclude = Annotated[
    Path | None, typer.Option(help="Folder with lm-eval-harness tasks of your own (YAML).", show_default="none")
]
LmEvalLimit = Annotated[
    int | None, typer.Option(min=1, help="Documents of each lm-eval-harness task.", show_default="all")
]


def evaluate(
    run: options.Run = None,
    model: options.BaseOfRun = None,
    data: Data = None,
    metric: Metric = None,
    generate_rows: GenerateRows = None,
    max_new_tokens: MaxNewTokens = None,
    choice_normalization: options.ChoiceNormalization = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a batch.")] = 16,
    lm_eval_tasks: LmEvalTasks = None,
    lm_eval_include: LmEvalInclude = None,
    lm_eval_limit: LmEvalLimit = None,
    skip_bad_rows: options.SkipBadRows = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    base_precision: options.BasePrecision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_missing_weights: options.AllowMissingWeights = False,
    as_json: options.Json = False,
) -> None:
    """Measure a run on rows: loss, perplexity, and, where rows have references or choices, text metrics and accuracy.

    The bare base is measured on the same rows, beside it. Without --data they are the rows that the run was judged on:
    the test rows of its comparison, else its validation rows. With --model and no --run that model is measured as it
    is: a base, a merged model, or a delta's folder on its own base.

    \b
    Examples:
      spectune eval
      spectune eval --run runs/2026-01-31-lora-1 --data test.jsonl
      spectune eval --data web.jsonl --data books.jsonl
      spectune eval --model out/merged --data test.jsonl
      spectune eval --metric rouge_l,my_metrics.py:shortness --json
    """
    found = run_on(run, model).allowing(trust_remote_code, allow_missing_weights)
    with work(as_json=as_json) as out:
        files = Settings.collect(None, None, {"data": data or None}).rows("data")
        if files is None:
            rows, source = rows_of_run(found)
        else:
            rows, source = rows_of(files, "test", {**found.row_options, "skip_bad_rows": skip_bad_rows})
        note(f"{found.name}; rows: {source}")

        if found.labels is not None and lm_eval_tasks is not None:
            raise ConfigError(
                "--lm-eval-tasks asks for texts, and this run has a head, which writes none: leave it out"
            )
        asked_of_it = _harness(lm_eval_tasks, batch_size, lm_eval_limit, lm_eval_include)
        flags = {"metric": metric, "generate_rows": generate_rows, "choice_normalization": choice_normalization}
        of_rows = _judging(None if files is not None else found, flags)
        of_rows |= {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
        loaded = found.load(device, dtype, base_precision)
        answer = {"run": found.folder_name, "base_model": found.base, "data": source}
        answer["task_type"] = "CAUSAL_LM" if found.labels is None else found.labels.task_type
        answer |= _measured(found, loaded, as_learned(found.config, rows), source, of_rows, asked_of_it)
        if not as_json:
            _print(out, answer)
    print_answer(answer, as_json=as_json)


def _judging(run: Run | None, flags: Mapping[str, Any]) -> dict[str, Any]:
    """How rows are measured: as a comparison measured this run's own, where no flag says otherwise. Raises ConfigError:
    by code that only the run's folder names."""
    if run is not None and flags["metric"] is None:
        refuse_recorded_code(run.config.get("metric"), run.folder)
    recorded = {} if run is None else {key: run.config.get(key) for key in JUDGING}
    return {key: value for of in (recorded, flags) for key, value in of.items() if value is not None}


def refuse_recorded_code(metric: Any, folder: Path) -> None:
    """Refuse a metric that is code and that only a folder's config.yaml names: whoever made the folder chose the code.
    Raises ConfigError, which says how to name it."""
    code = [word.strip() for word in metric.split(",") if ":" in word] if isinstance(metric, str) else []
    if code:
        raise ConfigError(
            f"{folder / 'config.yaml'} names the metric {', '.join(code)}, which is Python code, and code that a "
            f"folder names is not run. To run it, name it: {command_line('--metric', metric)}; or give another --metric"
        )


def _harness(tasks: str | None, batch_size: int, limit: int | None, include: Path | None) -> Measure | None:
    """What measures a model on tasks of lm-eval-harness, None where none is asked for."""
    if tasks is None:
        return None
    from spectune.evaluation import harness

    harness.check_installed()
    names = [word.strip() for word in tasks.split(",") if word.strip()]
    return partial(harness.harness_metrics, tasks=names, batch_size=batch_size, limit=limit, include=include)


def _measured(
    run: Run, loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase], rows: Sequence[Row], source: str,
    wanted: Mapping[str, Any], harness_metrics: Measure | None
) -> dict[str, Any]:  # fmt: skip
    """What is measured of the rows, under the run's delta and under the bare base.

    Args:
        wanted: arguments of `Task.of`.
        harness_metrics: measures a model on lm-eval-harness's tasks, too.
    """
    from spectune.data import encode
    from spectune.deltas import route
    from spectune.evaluation import Task, corpus_metrics, judge, judged_loss, perplexity
    from spectune.families import vocabulary_rows

    model, tokenizer = loaded
    max_length = row_length(model, run.config.get("max_length"))
    vocab_size = vocabulary_rows(model)
    labels = run.labels
    how = {"max_length": max_length, "labels": labels, **run.encode_options}
    encoded = encode(rows, tokenizer, vocab_size=vocab_size, **how)
    note_losses(encoded.report, source)
    # a row that encoding drops has nothing to be judged on
    answers = [str(answer) for answer in run.config.get("row_answers") or ()]
    task = Task.of(encoded.rows, answers=answers, **how, **wanted)
    note(task.describe())

    def measured() -> dict[str, Any]:
        """Of one model, under whatever route is current."""
        judged = judge(model, tokenizer, task)
        loss, metrics = judged_loss(judged), corpus_metrics(judged)
        if labels is not None:  # what a head has no meaning for is left out: perplexity, target tokens, texts
            return {f"loss_{labels.loss_unit.replace(' ', '_')}": loss, **metrics, **_by_source(judged)}
        found: dict[str, Any] = {"loss_nats_per_token": loss, "perplexity": perplexity(loss)}
        found["target_tokens"] = sum(row.target_tokens for row in judged)
        found |= {"choice_accuracy" if name == "accuracy" else name: value for name, value in metrics.items()}
        if task.to_write:
            found["generated_rows"] = len(task.to_write)
        found |= _by_source(judged)
        return found | (harness_metrics(model, tokenizer) if harness_metrics else {})

    tuned = measured() if run.delta_folder is not None else None
    with route(model, None) if tuned is not None else nullcontext():
        base = measured()
    return {"rows": len(task.rows), "tuned": tuned, "base": base, "data_report": encoded.report.to_dict()}


def _by_source(judged: Sequence[JudgedRow]) -> dict[str, Any]:
    from spectune.evaluation import loss_by_source

    sources = loss_by_source(judged)
    return {"loss_by_source": sources} if sources else {}


def _print(out: Console, answer: dict[str, Any]) -> None:
    from rich.table import Column, Table
    from rich.text import Text

    say(out, f"{answer['rows']:,} rows of {answer['data']}", style="italic")  # a table's title would be folded
    bare = "bare base" if answer["task_type"] == "CAUSAL_LM" else "untrained head"
    sides = {"tuned": answer["tuned"], bare: answer["base"]}
    if answer["tuned"] is None:  # a model as it is
        sides = {"": answer["base"]}
    columns = [Column(name, justify="right") for name in sides]
    table = Table("", *columns)
    for key in (key for key in answer["base"] if key != "loss_by_source"):
        table.add_row(key.replace("_", " "), *(_number(side.get(key)) for side in sides.values()))
    out.print(table)
    if sources := answer["base"].get("loss_by_source"):
        table = Table("loss by source", *(Column(name, justify="right") for name in sides))
        for name in sources:
            table.add_row(Text(name), *(_number(side.get("loss_by_source", {}).get(name)) for side in sides.values()))
        out.print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"
