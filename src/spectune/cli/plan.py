"""`spectune plan`: memory and operations of training, before anything is downloaded or loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectune.cli import options
from spectune.cli.console import complain, note, print_json, work
from spectune.cli.inputs import rows_to_train
from spectune.cli.plan_run import PlannedRun
from spectune.cli.settings import Settings
from spectune.errors import ConfigError, DoesNotFitError

if TYPE_CHECKING:
    from rich.console import Console

    from spectune.data import Example
    from spectune.deltas import Method
    from spectune.planning import Estimate
    from spectune.training import TrainingConfig

#: steps of a calibration: two that are not timed (they warm up), and those that are
CALIBRATION_STEPS = 6


def plan(
    model: options.Model = None,
    method: Annotated[
        str | None, typer.Option(help=f"One of {options.method_names()}.", show_default="all of them, as a table")
    ] = None,
    methods: Annotated[str | None, typer.Option(help="Some of them, parted by commas.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory of the device: 24GiB, 80GB.", show_default="what is free here")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Rows: per_device_train_batch_size.", show_default="8")
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a row: max_length.", show_default="the base's, at most 1,024")
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Recompute activations instead of keeping them.")
    ] = False,
    data: Annotated[
        str | None, typer.Option(help="Training rows: their longest batch is planned, their steps are counted.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Load the base and time a few steps here: seconds for an epoch.")
    ] = False,
    config: options.Config = None,
    assignments: options.Set = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda or mps; it need not be there.", show_default="cuda with --memory, else auto"),
    ] = None,
    dtype: options.Dtype = None,
    base_precision: options.BasePrecision = None,
    as_json: options.Json = False,
) -> None:
    """Say what training will take of memory, by term and at its peak, from the base's config alone.

    No weights are downloaded or read. Exit code 4 if what was asked for does not fit; the largest batch and length that
    do are then named. Terms are each one's own largest value; the peak is that of the moment where they are largest
    together. Whether blocks are compiled follows from the run's length, where --data or max_steps say it.

    \b
    Examples:
      spectune plan
      spectune plan --model meta-llama/Llama-3.1-8B --method lora --memory 24GiB --gradient-checkpointing
      spectune plan --model gpt2 --methods full,lora --batch 16 --length 512 --set lora.r=64 --json
      spectune plan --method lora --memory 80GiB --set torch_compile=true
      spectune plan --data train.jsonl --calibrate
    """
    flags = {
        "model": model,
        "data": data,
        "method": method,
        "methods": methods,
        "device": device,
        "dtype": dtype,
        "base_precision": base_precision,
        "per_device_train_batch_size": batch,
        "max_length": length,
        "gradient_checkpointing": gradient_checkpointing or None,
    }
    settings = Settings.collect(config, assignments, flags)
    with work(as_json=as_json) as out:
        from spectune.methods import BY_NAME

        if method is not None and methods is not None:
            raise ConfigError("--method and --methods: expected one of them, or neither")
        asked = settings.method_names([])
        chosen = settings.methods(asked or list(BY_NAME))
        answer, misfits = _plan(chosen, settings, memory, out, named=bool(asked), calibrate=calibrate)
    if as_json:
        print_json(answer)
    if misfits:
        complain("\n".join(misfits), label="does not fit")
        raise typer.Exit(DoesNotFitError.exit_code)


def _plan(
    methods: list[Method], settings: Settings, memory: str | None, out: Console, *, named: bool, calibrate: bool
) -> tuple[dict[str, Any], list[str]]:
    """What is printed, and a sentence for each method asked for that does not fit."""
    from spectune.planning.estimate import shown
    from spectune.planning.room import free_memory
    from spectune.planning.workload import context_of
    from spectune.sizes import bytes_of
    from spectune.storage.bases import load_config
    from spectune.storage.devices import resolve_device
    from spectune.training.prepare import DEFAULT_LENGTH, room_for_rows

    wanted = settings.training()
    name = settings.text("device") or ("cuda" if memory is not None else "auto")
    place = str(resolve_device(name)) if name == "auto" else name
    limit = free_memory(place) if memory is None else bytes_of(memory, "--memory")
    base = load_config(settings.base)
    examples = _examples(settings, wanted, base) if settings.text("data") is not None or calibrate else None
    # one length for all, which leaves room for the virtual tokens of each
    context = context_of(base)
    rooms = [] if context is None else [context - method.virtual_tokens for method in methods]
    most = min((room for room in rooms if room >= 2), default=None)
    longest = wanted.max_length or min(DEFAULT_LENGTH, most or DEFAULT_LENGTH)
    run = PlannedRun.of(wanted, base, place, longest, examples)
    estimates: list[tuple[Method, Estimate]] = []
    refused = []
    for method in methods:
        try:
            if context is not None:
                room_for_rows(context, method)
            estimates.append((method, _estimate(base, method, settings, run, most, examples, limit)))
        except ConfigError as error:
            if named:
                raise
            refused.append({"method": method.name, "reason": str(error)})
    estimates.sort(key=lambda pair: pair[1].trainable_parameters)
    entries, misfits = [], []
    for method, estimate in estimates:
        entry = {**estimate.to_dict(), "model": settings.base, "label": method.label, "fits": None,
                 "torch_compile": run.compiles(method)}  # fmt: skip
        if limit is not None:
            entry["fits"] = estimate.fits(limit)
            if not entry["fits"] and named:
                entry["largest_batch"] = estimate.largest_batch(limit)
                entry["largest_length"] = estimate.largest_length(limit)
                entry["advice"] = f"{estimate.advice(limit)} {estimate.most(limit)}"
                misfits.append(
                    f"{method.label} needs {shown(estimate.needed)}, there is {shown(limit)}. {entry['advice']}"
                )
        entries.append(entry)
    if not named and limit is not None and entries and not any(entry["fits"] for entry in entries):
        misfits.append(f"no method fits into {shown(limit)}; name one with --method for what would")
    answer: dict[str, Any] = {"model": settings.base, "device": place, "memory": limit, "steps": run.steps,
                              "methods": entries, "refused": refused}  # fmt: skip
    if examples is not None:
        answer["data"] = _described(examples, settings, wanted, [e for _, e in estimates], methods, base)
    if calibrate:
        answer["calibration"] = [_timed(method, settings, wanted, examples or []) for method, _ in estimates]
    _print(out, answer, [e for _, e in estimates])
    for line in run.said(estimates):
        note(line)
    return answer, misfits


def _estimate(
    base: Any,
    method: Method,
    settings: Settings,
    run: PlannedRun,
    most: int | None,
    examples: list[Example] | None,
    limit: int | None,
) -> Estimate:
    from spectune.planning import Shape
    from spectune.planning import plan as estimate_of

    wanted = run.config
    shape = Shape.whole(wanted.per_device_train_batch_size, run.longest)
    if examples is not None:
        from spectune.training.memory import shape_of

        longest = sorted(examples, key=lambda example: -len(example.input_ids))[: shape.rows]
        shape = shape_of([[row] for row in longest])
        shape = shape.cut(most or shape.length)
    mode = wanted.gradient_checkpointing
    return estimate_of(
        base,
        method,
        shape,
        validation=wanted.per_device_eval_batch_size,
        execution=run.execution(method),
        gradient_checkpointing=False if limit is None and mode == "auto" else mode,
        dtype=settings.text("dtype"),
        base_precision=settings.base_precision,
        device=run.place,
        memory=limit,
        optim=wanted.optim,
        gradient_accumulation_steps=wanted.gradient_accumulation_steps,
    )


def _examples(settings: Settings, wanted: TrainingConfig, base: Any) -> list[Example]:
    from spectune.data import encode
    from spectune.planning.workload import context_of
    from spectune.storage.bases import load_tokenizer
    from spectune.training.prepare import DEFAULT_LENGTH

    rows, _ = rows_to_train(settings.text("data"), skip_bad_rows=wanted.skip_bad_rows)
    longest = wanted.max_length or min(DEFAULT_LENGTH, context_of(base) or DEFAULT_LENGTH)
    tokenizer = load_tokenizer(settings.base)
    return encode(rows, tokenizer, max_length=longest, separator=wanted.separator).examples


def _described(
    examples: list[Example],
    settings: Settings,
    wanted: TrainingConfig,
    estimates: list[Estimate],
    methods: list[Method],
    base: Any,
) -> dict[str, Any]:
    """Rows, tokens, steps and operations of an epoch."""
    from spectune.families import family_from_config
    from spectune.planning.flops import flops_per_token

    tokens = sum(len(example.input_ids) for example in examples)
    rows = wanted.per_device_train_batch_size * wanted.gradient_accumulation_steps
    family = family_from_config(base)
    by_name = {method.name: method for method in methods}
    mean = max(1, tokens // len(examples))
    work_of = {
        estimate.method: tokens
        * flops_per_token(
            family, by_name[estimate.method], mean, checkpointing=estimate.gradient_checkpointing in (True, "offload")
        )
        for estimate in estimates
    }
    return {
        "source": settings.text("data") or "the embedded training rows",
        "rows": len(examples),
        "tokens": tokens,
        "longest_row_tokens": max(len(example.input_ids) for example in examples),
        "steps_per_epoch": -(-len(examples) // rows),
        "flops_per_epoch": work_of,
    }


def _timed(method: Method, settings: Settings, wanted: TrainingConfig, examples: list[Example]) -> dict[str, Any]:
    """A few real steps of the training loop on this machine: seconds for an epoch of the data, without validation."""
    from rich.console import Console

    from spectune.storage import attach, load
    from spectune.training import train

    # of an epoch the longest batch comes first, among the steps that are not timed
    rows = [example.row for example in examples]
    model, tokenizer = load(settings.base, device="auto", dtype=settings.dtype, base_precision=settings.base_precision)
    delta = attach(model, method, "calibration", tokenizer=tokenizer)
    config = wanted.model_copy(
        update={"output_dir": None, "resume": False, "max_steps": CALIBRATION_STEPS, "report_to": "none"}
    )
    result = train(model, tokenizer, delta, rows, rows[:1], config, console=Console(quiet=True))
    tokens = sum(len(example.input_ids) for example in examples)
    return {
        "method": method.name,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "timed_steps": CALIBRATION_STEPS - 2,
        "tokens_per_second": result.train_tokens_per_second,
        "seconds_per_epoch": tokens / result.train_tokens_per_second,
        "measured_train_allocated": result.peak_memory_bytes.get("train_allocated"),
    }


def _shown_mode(mode: bool | str) -> str:
    return mode if isinstance(mode, str) else "every block" if mode else "none"


def _print(out: Console, answer: dict[str, Any], estimates: list[Estimate]) -> None:
    from rich.table import Table

    from spectune.planning.estimate import shown
    from spectune.planning.moments import TERMS

    if estimates:
        first = estimates[0]
        title = f"{answer['model']}, {first.batch} rows of {first.length} tokens, {first.dtype} on {answer['device']}"
        title += f", base in {first.base_precision}" if first.base_precision is not None else ""
        table = Table(title=title)
        table.add_column("method")
        recomputes = any(estimate.gradient_checkpointing for estimate in estimates)
        if recomputes:
            table.add_column("checkpointing")
        compiled = [bool(entry["torch_compile"]) for entry in answer["methods"]]
        if any(compiled):
            table.add_column("compiled")
        for column in ("trainable", "share", *TERMS, "peak", "reserved"):
            table.add_column(column, justify="right")
        table.add_column("at the peak")
        table.add_column("fits" if answer["memory"] is None else f"fits {shown(answer['memory'])}")
        for estimate, entry in zip(estimates, answer["methods"], strict=True):
            share = estimate.trainable_parameters / estimate.total_parameters
            table.add_row(
                estimate.method,
                *([_shown_mode(estimate.gradient_checkpointing)] if recomputes else []),
                *(["yes" if entry["torch_compile"] else "no"] if any(compiled) else []),
                f"{estimate.trainable_parameters:,}",
                f"{100 * share:.3g}%",
                *(shown(getattr(estimate, term)) for term in TERMS),
                shown(estimate.peak_allocated),
                shown(estimate.peak_reserved),
                estimate.peak_moment.name,
                "?" if entry["fits"] is None else "yes" if entry["fits"] else "no",
            )
        out.print(table)
        if first.context:
            note(f"reserved leaves out what the process takes of a CUDA device by itself, about {shown(first.context)}")
        if any(estimate.host for estimate in estimates):
            note(f"offload takes up to {shown(max(e.host for e in estimates))} of host memory for blocks' inputs")
        if first.validation is not None and any((e.validation or 0) > e.peak_reserved for e in estimates):
            note(f"validation takes up to {shown(max(e.validation or 0 for e in estimates))}, more than training: "
                 "per_device_eval_batch_size")  # fmt: skip
    for refusal in answer["refused"]:
        note(f"{refusal['method']}: {refusal['reason']}")
    if (data := answer.get("data")) is not None:
        note(f"data: {data['source']}: {data['rows']:,} rows, {data['tokens']:,} tokens, the longest row has "
             f"{data['longest_row_tokens']:,}; {data['steps_per_epoch']:,} steps an epoch")  # fmt: skip
        for name, flops in data["flops_per_epoch"].items():
            note(f"  {name}: {flops / 1e12:,.3g} TFLOP an epoch")
    for timed in answer.get("calibration", ()):
        note(f"{timed['method']}: {timed['seconds_per_epoch']:,.1f} s an epoch without validation, by "
             f"{timed['timed_steps']} steps here on {timed['device']} in {timed['dtype']} "
             f"({timed['tokens_per_second']:,.0f} tokens/s)")  # fmt: skip
