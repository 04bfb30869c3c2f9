"""What is measured of a model on rows: the loss of all, and what fits them of metrics of written text and of choices."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectune.data import Row
from spectune.errors import ConfigError

#: metrics of written text; the first two are means over rows, the others are of the corpus
WRITTEN = ("exact_match", "rouge_l", "bleu", "chrf")
#: metric of rows that have choices
CHOSEN = "accuracy"
#: training rows with at most so many distinct completions, each at least so often, are a choice among them
MOST_LABELS, LEAST_OF_EACH = 20, 3

#: `f(prediction, references, row) -> float`; higher is better unless the function has `higher_is_better = False`
Metric = Callable[[str, list[str], dict[str, Any]], float]


@dataclass(frozen=True)
class Task:
    """How rows are judged.

    Attributes:
        rows: all of them have a loss taken.
        metrics: names, of WRITTEN, CHOSEN, or of custom ones.
        custom: the functions of those.
        choices: the labels among which every row chooses, where its own choices are not given.
        written: indices of the rows that a completion is written for, evenly spaced over all that can be.
        max_length, separator: as in training.
    """

    rows: list[Row]
    metrics: tuple[str, ...]
    custom: dict[str, Metric]
    choices: tuple[str, ...]
    written: tuple[int, ...]
    batch_size: int
    max_length: int
    separator: str

    @classmethod
    def of(
        cls,
        rows: Sequence[Row],
        *,
        train_rows: Sequence[Row] = (),
        metric: str = "auto",
        generate_rows: int = 64,
        batch_size: int = 16,
        max_length: int,
        separator: str = "",
    ) -> Task:
        """Decide what is measured.

        Rows with choices and a label: accuracy by likelihood. Rows without, where the training rows' completions are a
        few labels (see MOST_LABELS) and every row's completion is one of them: the same, among those. Else, where rows
        have a prompt and an answer: what the model writes is compared with the references, or the answer.

        Args:
            metric: "auto", or names parted by commas: loss, exact_match, rouge_l, bleu, chrf, accuracy,
                `package.module:function` or `file.py:function` (see `Metric`).
            generate_rows: rows that a completion is written for.

        Raises:
            ConfigError: a metric that does not exist, cannot be imported, or does not fit the rows.
        """
        rows = list(rows)
        chosen = all(row.choices and row.label is not None for row in rows)
        labels = () if chosen else _labels(rows, train_rows)
        can_write = [i for i, row in enumerate(rows) if (row.prompt or row.messages) and references(row)]
        custom: dict[str, Metric] = {}
        if metric == "auto":
            names = (CHOSEN,) if chosen or labels else WRITTEN if can_write and generate_rows else ()
        else:
            names = tuple(dict.fromkeys(part.strip() for part in metric.split(",") if part.strip() not in ("", "loss")))
            custom = {_short(name): _imported(name) for name in names if ":" in name}
            names = tuple(_short(name) if ":" in name else name for name in names)
            _check(names, custom, chosen or bool(labels), bool(can_write))
        writes = any(name != CHOSEN for name in names)
        return cls(
            rows=rows,
            metrics=names,
            custom=custom,
            choices=labels if CHOSEN in names else (),
            written=_evenly(can_write, generate_rows) if writes else (),
            batch_size=batch_size,
            max_length=max_length,
            separator=separator,
        )

    def describe(self) -> str:
        """The task in a sentence."""
        parts = [f"loss on {len(self.rows):,} rows"]
        if CHOSEN in self.metrics:
            among = f"the {len(self.choices)} labels of the training rows" if self.choices else "each row's choices"
            parts.append(f"accuracy by likelihood among {among}")
        written = [name for name in self.metrics if name != CHOSEN]
        if written:
            parts.append(f"{', '.join(written)} of what is written (greedy) for {len(self.written):,} of them")
        return "; ".join(parts)


def references(row: Row) -> tuple[str, ...]:
    """What a written completion is compared with: the row's references, else its own answer."""
    answer = row.messages[-1]["content"] if row.messages else row.completion
    return row.references or ((answer.strip(),) if answer and answer.strip() else ())


def _labels(rows: Sequence[Row], train_rows: Sequence[Row]) -> tuple[str, ...]:
    """The labels that completions are, empty where they are text."""
    if not train_rows or any(
        row.completion is None or row.prompt is None or row.references for row in (*rows, *train_rows)
    ):
        return ()
    counts = Counter(str(row.completion) for row in train_rows)
    few = 2 <= len(counts) <= MOST_LABELS and min(counts.values()) >= LEAST_OF_EACH
    return tuple(sorted(counts)) if few and all(row.completion in counts for row in rows) else ()


def _evenly(indices: Sequence[int], count: int) -> tuple[int, ...]:
    """`count` of the indices, evenly spaced: files are often sorted, and the first rows then say little."""
    if count >= len(indices):
        return tuple(indices)
    return tuple(indices[i * len(indices) // count] for i in range(count))


def _check(names: Sequence[str], custom: dict[str, Metric], can_choose: bool, can_write: bool) -> None:
    for name in names:
        if name not in (*WRITTEN, CHOSEN) and name not in custom:
            known = ", ".join(("loss", *WRITTEN, CHOSEN))
            raise ConfigError(f"metric {name!r}; expected {known}, or package.module:function")
        if name == CHOSEN and not can_choose:
            raise ConfigError(
                "metric accuracy needs `choices` and `label` in every row, or training completions that are a few labels"
            )
        if name != CHOSEN and not can_write:
            raise ConfigError(f"metric {name} needs rows with a prompt and a completion or references")


def _short(name: str) -> str:
    return name.rpartition(":")[2] if ":" in name else name


def _imported(name: str) -> Metric:
    """The function at `package.module:function` or `file.py:function`."""
    place, _, attribute = name.rpartition(":")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        function: Metric = getattr(module, attribute)
    except Exception as error:
        raise ConfigError(f"metric {name}: cannot be imported ({type(error).__name__}: {error})") from error
    if not callable(function):
        raise ConfigError(
            f"metric {name} is a {type(function).__name__}; expected f(prediction, references, row) -> float"
        )
    try:
        inspect.signature(function).bind("", [], {})
    except TypeError as error:
        raise ConfigError(f"metric {name} does not take (prediction, references, row): {error}") from error
    except ValueError:
        pass  # a built-in that tells no signature
    return function
