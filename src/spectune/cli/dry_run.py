"""`--dry-run`: all data read, everything built, one real step on the longest batch; nothing is left on disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spectune.cli.console import note
from spectune.cli.heads import head_options, learned_by
from spectune.cli.input_rows import row_length, training_rows
from spectune.cli.runs import check_output_folder
from spectune.cli.settings import runs_together

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from spectune.cli.settings import Settings
    from spectune.comparing import Arm
    from spectune.data import Labels, Row, Rows
    from spectune.deltas import Delta
    from spectune.planning import Estimate
    from spectune.training import TrainingConfig


def dry_run(arms: Sequence[Arm], settings: Settings, label: str, out: Console) -> dict[str, Any]:
    """Train each arm's method for one step, executed as its run would be, without a folder.

    The longest batch comes first in an epoch, so one step shows whether memory suffices. Of the validation rows all are
    read and encoded, and the longest are evaluated. Raises SpectuneError: whatever the run itself would raise at its
    start.
    """
    wanted = settings.training()
    folder = check_output_folder(settings.text("output_dir"), label, resume=wanted.resume)
    rows, held_out, source = training_rows(settings)
    note(
        f"dry run: one step for each method on its longest batch, validated on the longest rows; nothing is written (a "
        f"run would go to {folder})\ndata: {source}"
    )

    from spectune import training
    from spectune.comparing.experiment import check_settings
    from spectune.comparing.measure import retained_passages
    from spectune.data import Encoded, encode, weighted
    from spectune.deltas import attach
    from spectune.families import vocabulary_rows
    from spectune.storage import load
    from spectune.training.prepare import dated, max_length

    if label == "compare":
        check_settings(**asked(settings))
    found, arms = [], learned_by(arms, settings, rows)
    plans: list[tuple[int, Estimate | None]] = []
    words = next((arm.labels for arm in arms if arm.labels is not None), None)
    for number, arm in enumerate(arms):
        method, labels = arm.method, arm.labels
        if labels is None and words is not None:  # a language model beside a head
            train_rows, valid_rows, own = _in_words(rows, held_out, wanted, words)
        else:
            train_rows, valid_rows, own = rows, held_out, wanted
        # a base for each: what full fine-tuning has trained is not the base any more
        model, tokenizer = load(settings.base, **settings.placement, **head_options(labels))
        if number == 0 and labels is None and (retain := settings.text("retain")) is not None:
            retained_passages(model, tokenizer, retain, wanted.seed)
        as_run = {**dated(own, tokenizer).encode_options, "vocab_size": vocabulary_rows(model), "labels": labels}
        if number == 0 and label == "compare":
            length = row_length(model, wanted.max_length)
            _check_judging(settings, train_rows, valid_rows, tokenizer, {**as_run, "max_length": length})
        delta = attach(model, method, arm.name, tokenizer=tokenizer, seed=wanted.seed)
        how: dict[str, Any] = {**as_run, "max_length": max_length(model, method, wanted)}
        train = weighted(encode(train_rows, tokenizer, **how), train_rows.weights, wanted.seed)
        judged = encode(valid_rows, tokenizer, **how)
        if runs_together(settings) is not None and not method.trains_base:
            plans.append(_planned(delta, (tokenizer, train, judged), own))
        # all validation rows are read; of these the longest are evaluated
        longest = sorted(judged.examples, key=lambda example: -example.length)
        few = Encoded(longest[: wanted.per_device_eval_batch_size], judged.report)
        step = own.model_copy(update={"output_dir": None, "resume": False, "max_steps": 1})
        result = training.train(model, tokenizer, delta, train, few, step, console=out, rehearsed=wanted)
        found.append(result.model_dump(mode="json", exclude={"folder", "stored_bytes"}))
        peak = result.peak_memory_bytes.get("train_allocated")
        note(f"  loss {result.train_loss:.4f}" + (f", {peak / 2**20:,.0f} MiB of tensors at the peak" if peak else ""))
    shared = {} if runs_together(settings) is None else {"together": _together(settings, plans, model, label)}
    return {"dry_run": True, "folder": str(folder), "data": source, "runs": found, **shared}


def _planned(delta: Delta, given: tuple[PreTrainedTokenizerBase, Any, Any], wanted: TrainingConfig) -> Any:
    """How many runs gain from a pass with this one, and its plan by itself."""
    from spectune.training.company import worth_sharing
    from spectune.training.distribution import World
    from spectune.training.prediction import predict
    from spectune.training.prepare import prepare

    tokenizer, train, judged = given
    config = wanted.model_copy(update={"output_dir": None, "resume": False})
    prepared = prepare(delta.model, tokenizer, delta.method, train, judged, config, delta.base_fingerprint)
    return worth_sharing(delta, prepared), predict(delta, prepared, World()).estimate


def _together(
    settings: Settings, plans: Sequence[tuple[int, Estimate | None]], model: PreTrainedModel, label: str
) -> dict[str, Any]:
    """How many of the runs share a pass, and what that takes; said too."""
    from spectune.planning.estimate import shown
    from spectune.planning.shared_pass import planned_together
    from spectune.training.company import MOST, most_together, room_of

    room, estimates, most = room_of(model), [estimate for _, estimate in plans], runs_together(settings) or "auto"
    if most == "auto" and label != "compare" and model.device.type != "cpu":
        most = MOST  # as `train_several` has it: there is nothing to do beside
    count = most_together(most, [worth for worth, _ in plans], estimates, room)
    known = [estimate for estimate in estimates[:count] if estimate is not None]
    needed = planned_together(known) if known and len(known) == count else None
    line = (
        f"together: {count} of {len(plans)} runs share a pass"
        if count > 1
        else "together: each run has passes of its own"
    )
    if needed is not None:
        line += f"; predicted {shown(needed)}, the base once among it" + (f", of {shown(room)}" if room else "")
    note(line)
    return {"runs_in_a_pass": count, "predicted_bytes": needed, "room_bytes": room}


def _in_words(
    rows: Rows, held_out: Sequence[Row], wanted: TrainingConfig, labels: Labels
) -> tuple[Rows, Sequence[Row], TrainingConfig]:
    """Rows of texts with labels as a language model beside a head has them, and its settings."""
    from spectune.comparing.inputs import Rows as Given
    from spectune.comparing.label_words import SEPARATOR

    found = Given(rows, held_out, None, None).in_words(labels)
    default = SEPARATOR if any(row.text is not None for row in rows) else ""
    return found.train, found.valid, wanted.model_copy(update={"separator": wanted.separator or default})


def asked(settings: Settings) -> dict[str, Any]:
    """A comparison's own settings, as `spectune.compare` takes them."""
    from spectune.comparing.experiment import GENERATE_ROWS

    rows = settings.whole("generate_rows")
    return {
        "preset": settings.text("preset") or "default", "seeds": settings.whole("seeds"),
        "fractions": settings.numbers("fractions"), "metric": settings.text("metric") or "auto",
        "generate_rows": GENERATE_ROWS if rows is None else rows,
        "choice_normalization": settings.text("choice_normalization") or "sum", "together": runs_together(settings),
    }  # fmt: skip


def _check_judging(
    settings: Settings, rows: Sequence[Row], held_out: Sequence[Row], tokenizer: PreTrainedTokenizerBase,
    as_run: dict[str, Any],
) -> None:  # fmt: skip
    """Read and encode the rows that final runs would be judged on, and find out whether they give the metrics.

    Args:
        as_run: how the runs encode rows, as `encode` takes it.
    """
    from spectune.data import encode, load_rows
    from spectune.evaluation import Task

    wanted, test = settings.training(), settings.rows("test")
    judged = held_out if test is None else load_rows(test, **wanted.row_options)
    encode(judged, tokenizer, **as_run)
    own = asked(settings)
    how = {name: own[name] for name in ("metric", "generate_rows", "choice_normalization")}
    how |= {"separator": wanted.separator, "labels": as_run["labels"]}
    Task.of(judged, train_rows=rows, max_length=as_run["max_length"], **how)
