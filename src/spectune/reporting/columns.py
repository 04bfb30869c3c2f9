"""The columns of the tables: what each is called, how its cells read, and by which number it sorts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spectune.reporting import units
from spectune.results.arm_result import ArmResult, metric_names
from spectune.results.comparison_file import ComparisonResult

#: how the metrics that ship are written; a custom one keeps its own name
METRICS = {
    "rouge_l": "ROUGE-L", "bleu": "BLEU", "chrf": "chrF", "exact_match": "Exact match", "accuracy": "Accuracy",
    "macro_f1": "Macro F1", "matthews": "Matthews", "mse": "MSE", "pearson": "Pearson", "span_f1": "Span F1",
    "token_accuracy": "Token accuracy",
}  # fmt: skip


#: what an arm learns of the rows, in tables of arms that do not all learn the same
LEARNED = {"CAUSAL_LM": "label words", "SEQ_CLS": "a head", "TOKEN_CLS": "a head"}


@dataclass(frozen=True)
class Column:
    """One column of a table over arms.

    Attributes:
        title: its header.
        text: the cell as people read it.
        value: the number that the cell stands for, which it sorts by; None for words.
        optional: left out where no arm has the number.
    """

    title: str
    text: Callable[[ArmResult], str]
    value: Callable[[ArmResult], float | None] | None = None
    optional: bool = False

    @property
    def words(self) -> bool:
        return self.value is None


METHOD = Column("Method", lambda r: f"{r.label} (failed)" if r.failed else r.label)
TRAINABLE = Column("Trainable", lambda r: units.count(r.trainable_parameters), lambda r: r.trainable_parameters)
SHARE = Column("Share", lambda r: units.percent(r.trainable_share), lambda r: r.trainable_share)
PERPLEXITY = Column("Perplexity", lambda r: units.number(r.valid_perplexity, 2), lambda r: r.valid_perplexity)
VALID_LOSS = Column("Valid loss", lambda r: units.number(r.valid_loss), lambda r: r.valid_loss)
RELATIVE = Column("Relative perf.", lambda r: units.number(r.relative_performance, 1), lambda r: r.relative_performance)
FORGETTING = Column(
    "Forgetting",
    lambda r: units.with_interval(r.forgetting_kl_nats_per_token, r.forgetting_low, r.forgetting_high),
    lambda r: r.forgetting_kl_nats_per_token,
)
LEARNS = Column("Learns", lambda r: LEARNED.get(r.task_type, r.task_type))
LEARNING_RATE = Column("Learning rate", lambda r: units.rate(r.learning_rate), lambda r: r.learning_rate)
SEEDS = Column(
    "Seeds", lambda r: f"{r.seeds} of {r.seeds + r.seeds_failed}" if r.seeds_failed else str(r.seeds), lambda r: r.seeds
)
MEMORY = Column("Memory", lambda r: units.size(r.train_memory_bytes), lambda r: r.train_memory_bytes, optional=True)
PREDICTED = Column("Predicted", lambda r: _predicted(r), lambda r: r.predicted_memory_bytes, optional=True)
SPEED = Column("Training speed", lambda r: _speed(r), lambda r: r.train_tokens_per_second, optional=True)
TIME = Column(
    "Time", lambda r: doubtful(units.seconds(r.train_seconds), r.busy_in_training), lambda r: r.train_seconds,
    optional=True,
)  # fmt: skip
OVERHEAD = Column("Inference overhead", lambda r: _overhead(r, ""), lambda r: r.inference_overhead, optional=True)
OVERHEAD_16 = Column("At batch 16", lambda r: _overhead(r, "_16"), lambda r: r.inference_overhead_16, optional=True)
STORED = Column("Stored", lambda r: units.size(r.stored_bytes), lambda r: r.stored_bytes)
TEN_TASKS = Column("10 tasks", lambda r: units.size(r.bytes_for_ten_tasks), lambda r: r.bytes_for_ten_tasks)
SWAP = Column(
    "Swap", lambda r: doubtful(units.seconds(r.swap_seconds), r.busy_in_decoding), lambda r: r.swap_seconds,
    optional=True,
)  # fmt: skip


def loss_title(comparison: ComparisonResult) -> str:
    """What `ArmResult.loss` is measured on."""
    if not comparison.decided_by_loss:
        return "Own loss"  # of label words or of a head: not to be compared
    return "Test loss" if comparison.data.judged_on == "test" else "Valid loss"


@dataclass(frozen=True)
class Columns:
    """The columns of the tables over arms, after the method's own; those that no arm has a number for are left out."""

    quality: list[Column]
    metrics: list[Column]
    training: list[Column]
    overheads: list[Column]
    storage: list[Column]


def columns_of(comparison: ComparisonResult, rows: Sequence[ArmResult]) -> Columns:
    """With the learning rate, unless it was searched for: that has a table of its own."""
    title = loss_title(comparison)
    loss = Column(title, lambda r: units.with_interval(r.loss, r.loss_low, r.loss_high), lambda r: r.loss)
    # an interval takes the room of the perplexity, which says the same as the loss
    shown = comparison.has_text and comparison.decided_by_loss and not any(row.loss_low is not None for row in rows)
    perplexity = [PERPLEXITY] if shown else []
    # what has no meaning for what was learned is left out: the notes say so
    relative = [RELATIVE] if comparison.decided_by_loss else []
    forgetting = [FORGETTING] if comparison.has_text else []
    learns = [] if comparison.decided_by_loss else [LEARNS]
    rate = [] if comparison.searches else [LEARNING_RATE]
    return Columns(
        quality=[*learns, TRAINABLE, SHARE, loss, *perplexity, *relative, *forgetting],
        metrics=[_metric(name) for name in metric_names(rows)],
        training=_present([*rate, MEMORY, PREDICTED, SPEED, TIME], rows),
        overheads=_present([OVERHEAD, OVERHEAD_16], rows),
        storage=_present([STORED, TEN_TASKS, SWAP], rows),
    )


def metric_title(name: str) -> str:
    return METRICS.get(name, name)


def metric_text(name: str, value: float | None, interval: tuple[float, float] | None = None) -> str:
    """BLEU and chrF are out of 100, the others mostly out of 1."""
    low, high = interval or (None, None)
    return units.with_interval(value, low, high, 1 if name in ("bleu", "chrf") else 3)


def _metric(name: str) -> Column:
    def text(row: ArmResult) -> str:
        return metric_text(name, row.metrics.get(name), row.metric_intervals.get(name))

    return Column(metric_title(name), text, lambda r: r.metrics.get(name))


def _present(columns: list[Column], rows: Sequence[ArmResult]) -> list[Column]:
    def known(column: Column) -> bool:
        return column.value is None or any(column.value(row) is not None for row in rows)

    return [column for column in columns if not column.optional or known(column)]


def _predicted(row: ArmResult) -> str:
    text = units.size(row.predicted_memory_bytes)
    if row.predicted_memory_bytes is None or not row.train_memory_bytes:
        return text
    return f"{text} ({units.percent(row.predicted_memory_bytes / row.train_memory_bytes - 1, sign=True)})"


def _speed(row: ArmResult) -> str:
    if row.train_tokens_per_second is None:
        return units.MISSING
    ratio = "" if row.speed_to_full is None else f" ({row.speed_to_full:.2f}x full)"
    return doubtful(f"{units.count(row.train_tokens_per_second)} tok/s{ratio}", row.busy_in_training)


def _overhead(row: ArmResult, batch: str) -> str:
    """Unmerged / merged; of a batch of one row ("") or of sixteen ("_16")."""

    def of(kind: str) -> tuple[float | None, float | None]:
        name = f"inference_overhead{batch}{kind}"
        return getattr(row, name), getattr(row, f"{name}_noise")

    tuned, merged = of(""), of("_merged")
    if tuned[0] is None and (batch or merged[0] is None):
        return units.MISSING
    # a merged model runs the base's own operations: what was measured of it is the noise of measuring
    own = doubtful(with_noise(*tuned), row.busy_in_decoding)
    return f"{own} / {'not mergeable' if merged[0] is None else 'as the base'}"


def doubtful(text: str, busy: bool) -> str:
    """A time that was taken while the machine was busy with other work is marked."""
    return f"~{text}" if busy and text != units.MISSING else text


def with_noise(overhead: float | None, noise: float | None) -> str:
    """+25% ±3%; "within noise" where the rounds differ by more than there is to show."""
    if overhead is None or noise is None:
        return units.percent(overhead, sign=True)
    spread = f"±{100 * noise:.0f}%"
    return f"within noise ({spread})" if abs(overhead) <= noise else f"{units.percent(overhead, sign=True)} {spread}"
