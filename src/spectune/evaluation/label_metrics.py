"""Which metrics labels give: of classes by likelihood or by a head, of numbers, and of words."""

from collections.abc import Sequence

from spectune.data import Labels, Row
from spectune.data.head_labels import TOKEN_CLS
from spectune.errors import ConfigError, did_you_mean
from spectune.evaluation.spans import are_spans

#: of a class for each row, by likelihood or by a head; of a number; of a class for each word
OF_CLASSES = ("accuracy", "macro_f1", "matthews")
OF_NUMBERS = ("mse", "pearson")
OF_WORDS = ("span_f1", "token_accuracy")
LABEL_METRICS = (*OF_CLASSES, *OF_NUMBERS, *OF_WORDS)
#: less of these is better
LOWER_IS_BETTER = ("mse",)


def common_choices(rows: Sequence[Row]) -> tuple[str, ...]:
    """The choices of rows that all have the same ones, sorted: their classes. () where each has its own."""
    first = sorted(rows[0].choices) if rows else []
    return tuple(first) if all(sorted(row.choices) == first for row in rows) else ()


def metrics_of_head(labels: Labels, metric: str | None) -> tuple[str, ...]:
    """The metrics that a head's rows will have, out of those that `metric` names. Raises ConfigError: it names one that
    such a head does not give."""
    there: tuple[str, ...]
    if labels.task_type == TOKEN_CLS:
        there = OF_WORDS if are_spans(labels.names) else OF_WORDS[1:]
    else:
        there = OF_NUMBERS if labels.regression else OF_CLASSES
    words = [word.strip() for word in (metric or "auto").split(",") if word.strip()]
    if words == ["auto"]:
        return there
    if wrong := [word for word in words if word not in ("loss", *there)]:
        head = labels.describe()
        raise ConfigError(
            f"metric {', '.join(wrong)}{did_you_mean(wrong[0], there)}: {head}, which writes no text, gives "
            f"{', '.join(there)}; expected auto alone, or some of these"
        )
    return tuple(name for name in there if name in words)
