"""`spectune plan`: memory and operations of training, before anything is downloaded or loaded."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectune.cli import options
from spectune.cli.console import complain, import_libraries, note, print_answer, work
from spectune.cli.heads import decided, head_options
from spectune.cli.input_rows import check_inputs, named, rows_of, training_rows
from spectune.cli.known_keys import method_names
from spectune.cli.planned_text import Arm, decisions, print_plan
from spectune.cli.settings import Settings, own_code
from spectune.errors import ConfigError, DoesNotFitError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from spectune.data import Encoded, Example, Labels, Rows
    from spectune.deltas import Method
    from spectune.families import Family
    from spectune.training import TrainingConfig

#: steps of a calibration: two that are not timed (they warm up), and those that are
CALIBRATION_STEPS = 6

OneMethod = Annotated[
    str | None, typer.Option(help=f"One of {method_names()}.", show_default="all of them, as a table")
]
Memory = Annotated[
    str | None, typer.Option(help="Memory of the device: 24GiB, 80GB.", show_default="what is free here")
]
Batch = Annotated[int | None, typer.Option(min=1, help="Rows: per_device_train_batch_size.", show_default="8")]
Length = Annotated[
    int | None, typer.Option(min=2, help="Tokens of a row: max_length.", show_default="the base's, at most 1,024")
]
Recompute = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Recompute activations instead of keeping them.")
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        help="Training rows: their longest batch is planned, their steps are counted. Repeatable; FILE=WEIGHT."
    ),
]
Calibrate = Annotated[
    bool, typer.Option("--calibrate", help="Load the base and time a few steps here: seconds for an epoch.")
]
AnyDevice = Annotated[
    str | None,
    typer.Option(help="cpu, cuda or mps; it need not be there.", show_default="cuda with --memory, else auto"),
]


def plan(
    context: typer.Context,
    model: options.Model = None,
    method: OneMethod = None,
    methods: Annotated[str | None, typer.Option(help="Some of them, comma-separated.")] = None,
    memory: Memory = None,
    batch: Batch = None,
    length: Length = None,
    gradient_checkpointing: Recompute = False,
    data: Data = None,
    calibrate: Calibrate = False,
    task_type: options.TaskType = None,
    config: options.Config = None,
    assignments: options.Set = None,
    device: AnyDevice = None,
    dtype: options.Dtype = None,
    base_precision: options.BasePrecision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_missing_weights: options.AllowMissingWeights = False,
    as_json: options.Json = False,
) -> None:
    """Predict the memory that training needs, by term and at its peak, from the base's config alone.

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
    flags = options.flags(context, {"memory", "batch", "length", "calibrate"})
    flags |= {"per_device_train_batch_size": batch, "max_length": length}
    settings = Settings.collect(config, assignments, flags)
    if method is not None and methods is not None:
        raise ConfigError("--method and --methods: expected one of them, or neither")
    named = bool(settings.method_names([]))
    with work(as_json=as_json) as out:
        check_inputs(settings, settings.method_names([]))
        import_libraries()
        from spectune.methods import BY_NAME

        chosen = settings.methods(settings.method_names(list(BY_NAME)))
        answer, misfits = _plan(chosen, settings, memory, out, named=named, calibrate=calibrate)
    print_answer(answer, as_json=as_json)
    if misfits:
        complain("\n".join(misfits), label="does not fit")
        raise typer.Exit(DoesNotFitError.exit_code)


@dataclass
class Plans:
    """What is the same for the plans of all methods.

    Attributes:
        positions: of the base; None where there is no limit.
        device: kind of device.
        limit: bytes of it; None where nobody knows.
        length: tokens of a row, where there are no rows; it leaves room for the virtual tokens of every method.
        rows: training and validation rows; None where there are none.
        labels: what a head learns of them; None of a language model.
    """

    settings: Settings
    config: TrainingConfig
    base: Any
    positions: int | None
    device: str
    limit: int | None
    length: int
    rows: tuple[Rows, Rows] | None
    labels: Labels | None = None
    _encoded: dict[int, tuple[Encoded, Encoded]] = field(default_factory=dict)

    @classmethod
    def of(cls, methods: Sequence[Method], settings: Settings, memory: str | None, *, needs_rows: bool) -> Plans:
        """From the command's flags; `needs_rows`: the embedded rows are taken where there is no --data."""
        from spectune.data import Labels
        from spectune.data.head_labels import classes_of_checkpoint
        from spectune.planning.device_memory import free_memory
        from spectune.sizes import bytes_of
        from spectune.storage.descriptions import load_config, positions_of
        from spectune.storage.devices import resolve_device
        from spectune.training.config import DEFAULT_LENGTH

        config = settings.training()
        name = settings.text("device") or ("cuda" if memory is not None else "auto")
        device = str(resolve_device(name)) if name == "auto" else name
        limit = free_memory(device) if memory is None else bytes_of(memory, "--memory")
        base = load_config(settings.base, **own_code(settings))
        positions = positions_of(base)
        rooms = [] if positions is None else [positions - method.virtual_tokens for method in methods]
        most = min((room for room in rooms if room >= 2), default=positions or DEFAULT_LENGTH)
        length = config.max_length or min(DEFAULT_LENGTH, most)
        rows = _rows(settings, config) if needs_rows or settings.get("data") is not None else None
        labels = None if rows is None else decided(settings, rows[0], base)
        if rows is None and config.task_type not in ("auto", "CAUSAL_LM"):  # the classes are the checkpoint's, or two
            known = classes_of_checkpoint(base, config.task_type)
            labels = Labels(config.task_type, tuple(known[place] for place in sorted(known)) or ("0", "1"))
        return cls(settings, config, base, positions, device, limit, length, rows, labels)

    def arm(self, method: Method) -> Arm:
        """The plan of a run with this method, as the run itself would plan it. Raises ConfigError: there is no room for
        rows, or the method or a setting does not go with the base."""
        from spectune.planning.workload import Workload
        from spectune.training.prediction import plan_unloaded
        from spectune.training.prepare import row_tokens

        settings, config = self.settings, self.config
        train, valid = self.encoded(row_tokens(self.positions, method, config))
        workload = Workload.of(
            self.base, method, settings.text("dtype"), self.device, base_precision=settings.text("base_precision"),
            optim=config.optim, accumulates=config.gradient_accumulation_steps > 1, **self._head(),
        )  # fmt: skip
        found = plan_unloaded(workload, config, train, valid, length=self.length, limit=self.limit)
        assert found.estimate is not None
        return Arm(method, found.execution, found.estimate, found.memory)

    def _head(self) -> dict[str, Any]:
        """Arguments of `Workload.of`."""
        labels = self.labels
        return {} if labels is None else {"task_type": labels.task_type, "num_labels": labels.num_labels}

    def family(self) -> Family:
        """The base's parts, with the head of what its rows are for."""
        from spectune.families import family_from_config
        from spectune.objectives import objective_for

        if self.labels is None:
            return family_from_config(self.base)
        config = copy.deepcopy(self.base)
        config.num_labels = self.labels.num_labels
        return family_from_config(config, objective_for(self.labels.task_type, config))

    def encoded(self, length: int) -> tuple[list[Example], list[Example]]:
        """Training and validation rows of at most so many tokens; empty where there are none."""
        found = self._reported(length)
        return ([], []) if found is None else (found[0].examples, found[1].examples)

    def mixture(self) -> str:
        """What an epoch has of each source, where there are several."""
        from spectune.data import mixture

        found = self._reported(self.length)
        return "" if found is None else mixture(found[0].report)

    def _reported(self, length: int) -> tuple[Encoded, Encoded] | None:
        from spectune.data import encode, weighted
        from spectune.storage.bases import load_tokenizer

        if self.rows is None:
            return None
        if length not in self._encoded:
            tokenizer = load_tokenizer(self.settings.base, **own_code(self.settings))
            how = {**self.config.encode_options, "labels": self.labels}
            how["vocab_size"] = getattr(self.base.get_text_config(), "vocab_size", None)
            train, valid = (encode(part, tokenizer, max_length=length, **how) for part in self.rows)
            self._encoded[length] = weighted(train, self.rows[0].weights, self.config.seed), valid
        return self._encoded[length]

    def examples(self) -> list[Example]:
        """Rows to train on."""
        return self.encoded(self.length)[0]


def _plan(
    methods: list[Method], settings: Settings, memory: str | None, out: Console, *, named: bool, calibrate: bool
) -> tuple[dict[str, Any], list[str]]:
    """What is printed, and a sentence for each method asked for that does not fit."""
    from spectune.planning.estimate import shown
    from spectune.training.prepare import steps_of_run

    plans = Plans.of(methods, settings, memory, needs_rows=calibrate)
    limit, arms, refused = plans.limit, list[Arm](), []
    for method in methods:
        try:
            arms.append(plans.arm(method))
        except ConfigError as error:
            if named:
                raise
            refused.append({"method": method.name, "reason": str(error)})
    arms.sort(key=lambda arm: arm.estimate.trainable_parameters)
    entries = [arm.entry(settings.base, limit, named=named) for arm in arms]
    misfits = [
        f"{entry['label']} needs {shown(entry['needed'])}, there is {shown(limit or 0)}. {entry['advice']}"
        for entry in entries
        if "advice" in entry
    ]
    if not named and limit is not None and entries and not any(entry["fits"] for entry in entries):
        misfits.append(f"no method fits into {shown(limit)}; name one with --method for what would")
    steps = steps_of_run(plans.examples(), plans.config)
    answer: dict[str, Any] = {"model": settings.base, "device": plans.device, "memory": limit, "steps": steps,
                              "methods": entries, "refused": refused}  # fmt: skip
    if plans.rows is not None:
        answer["data"] = _described(plans, arms)
    if calibrate:
        answer["calibration"] = [_timed(arm.method, plans) for arm in arms]
    print_plan(out, answer, [arm.estimate for arm in arms])
    for line in decisions(plans.config, arms, steps, plans.device):
        note(line)
    return answer, misfits


def _rows(settings: Settings, config: TrainingConfig) -> tuple[Rows, Rows]:
    """Rows to train on and to validate on, as a run takes them; none of the latter where there is but one."""
    from spectune.data import Rows

    data = settings.rows("data")
    if settings.rows("valid") is None and data is not None:
        rows, _ = rows_of(data, "training", config.row_options)
        if len(rows) < 2:
            return rows, Rows([], [])
    return training_rows(settings)[:2]


def _described(plans: Plans, arms: Sequence[Arm]) -> dict[str, Any]:
    """Rows, tokens, steps and operations of an epoch."""
    from spectune.planning.flops import flops_per_token

    config, family, data = plans.config, plans.family(), plans.settings.rows("data")
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    lengths = [example.length for example in plans.examples()]
    mean, flops = max(1, sum(lengths) // len(lengths)), {}
    for arm in arms:
        again = arm.execution.recomputation in (True, "offload")
        flops[arm.method.name] = sum(lengths) * flops_per_token(family, arm.method, mean, checkpointing=again)
    return {
        "source": "the embedded training rows" if data is None else named(data), "rows": len(lengths),
        "held_out": len(plans.encoded(plans.length)[1]),
        "mixture": plans.mixture(),
        "tokens": sum(lengths), "longest_row_tokens": max(lengths),
        "steps_per_epoch": math.ceil(len(lengths) / rows), "flops_per_epoch": flops,
    }  # fmt: skip


def _timed(method: Method, plans: Plans) -> dict[str, Any]:
    """A few real steps of the training loop on this machine: seconds for an epoch of the data, without validation."""
    from rich.console import Console

    from spectune.deltas import attach
    from spectune.storage import load
    from spectune.training import train

    settings, examples = plans.settings, plans.examples()
    # of an epoch the longest batch comes first, among the steps that are not timed
    rows = [example.row for example in examples]
    head = head_options(plans.labels)
    model, tokenizer = load(settings.base, **settings.placement | {"device": "auto"}, **head)
    delta = attach(model, method, "calibration", tokenizer=tokenizer)
    few = {"output_dir": None, "resume": False, "max_steps": CALIBRATION_STEPS, "report_to": "none"}
    config = plans.config.model_copy(update=few)
    result = train(model, tokenizer, delta, rows, rows[:1], config, console=Console(quiet=True))
    tokens, speed = sum(example.length for example in examples), result.train_tokens_per_second
    return {
        "method": method.name, "device": str(model.device), "dtype": str(model.dtype).removeprefix("torch."),
        "timed_steps": CALIBRATION_STEPS - 2, "tokens_per_second": speed, "seconds_per_epoch": tokens / speed,
        "measured_train_allocated": result.peak_memory_bytes.get("train_allocated"),
    }  # fmt: skip
