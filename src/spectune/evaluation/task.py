"""A task: the rows that models are judged on, and what is measured of each. It is decided once, for all models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from spectune.data import Labels, Row
from spectune.errors import ConfigError, DataError, did_you_mean
from spectune.evaluation.choices import common_answers, inferred_choices, labelled
from spectune.evaluation.corpus import CORPUS_METRICS
from spectune.evaluation.custom import CustomMetric, load_metric
from spectune.evaluation.label_metrics import (
    LABEL_METRICS,
    LOWER_IS_BETTER,
    OF_CLASSES,
    common_choices,
    metrics_of_head,
)
from spectune.evaluation.references import answer_of, has_prompt, references_of
from spectune.evaluation.scripts import bleu_tokenizer
from spectune.inference import CHOICE_NORMALIZATIONS

#: of what a model wrote, in the order of tables
TEXT_METRICS = ("exact_match", "rouge_l", *CORPUS_METRICS)
METRICS = ("loss", *TEXT_METRICS, *LABEL_METRICS)

_LIKELIHOODS = {
    "sum": "likelihood", "token": "likelihood per token, EOS counted,", "byte": "likelihood per UTF-8 byte",
}  # fmt: skip
_WHY = {
    "13a": "", "zh": ": the references are Chinese, which has no spaces",
    "char": ": the references are in scripts without spaces, so each character is a token",
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What is measured of which rows; made by `Task.of`. Every row has a loss; some are written, some chosen.

    `to_write` and `to_choose` are places in `rows`. Where choices were inferred, the rows here have them, and their
    answer as the label; `choices_of` says of which rows' answers. `max_new_tokens` None: a quarter more than the
    longest answer, see `judge_rows.new_tokens`. `choice_normalization`: by what the likeliest choice is found
    (`CHOICE_NORMALIZATIONS`). `bleu_tokenizer`: sacrebleu's, for all models the one that fits the references' scripts.
    `label_metrics`: of the rows that are chosen, or of the head whose `labels` are given: then no row is written or
    chosen, and all have what the head says of them.
    """

    rows: tuple[Row, ...]
    to_choose: tuple[int, ...]
    to_write: tuple[int, ...]
    writable: int
    text_metrics: tuple[str, ...]
    custom: tuple[CustomMetric, ...]
    choices: tuple[str, ...]
    max_new_tokens: int | None
    batch_size: int
    max_length: int
    separator: str
    choice_normalization: str = "sum"
    bleu_tokenizer: str = "13a"
    train_on: str = "all"
    truncation: str = "start"
    today: str | None = None
    choices_of: str = "training row"
    label_metrics: tuple[str, ...] = ()
    labels: Labels | None = None

    @classmethod
    def of(
        cls, rows: Sequence[Row], *, train_rows: Sequence[Row] = (), metric: str | None = "auto",
        generate_rows: int = 64, max_new_tokens: int | None = None, batch_size: int = 16, max_length: int,
        separator: str = "", choice_normalization: str = "sum", train_on: str = "all", truncation: str = "start",
        today: str | None = None, answers: Sequence[str] = (), labels: Labels | None = None, code_later: bool = False,
    ) -> Task:  # fmt: skip
        """Decide what is measured.

        `metric="auto"` (or None): rows with `choices` and a label, or an answer that is one of these, are chosen, by
        likelihood; so are rows whose training rows show that they have choices (see `common_answers`); other rows
        with a prompt and references, or an answer of their own, are written; `text` rows have their loss alone.

        Args:
            rows: those to judge on.
            train_rows: only looked at to find out whether the answers are a few labels.
            answers: those labels, where they are known without the rows.
            metric: names out of `METRICS`, or import paths of functions (see `spectune.evaluation.custom`),
                comma-separated. The loss is always taken.
            generate_rows: how many rows are written at most: of more, that many at even distances, the first among
                them, so that sorted data is met everywhere; no draw, the same for every model.
            max_new_tokens: of a written row.
            batch_size: rows at a time; where memory does not suffice, it is halved.
            max_length, separator, train_on, truncation, today: as in training, see `spectune.data.encode`.
            choice_normalization: "sum", "token" or "byte": see `ChoiceScores.best`.
            labels: of the head that is judged; None: a language model is.
            code_later: metrics of the user's own are not imported yet: `with_code` does.

        Raises:
            ConfigError: an unknown metric, or one that needs written rows where none may be written.
            DataError: no rows, a metric named that no row can give, or an answer that is none of its row's choices.
        """
        if not rows:
            raise DataError("no rows to judge on; expected at least one")
        if generate_rows < 0 or batch_size < 1 or (max_new_tokens is not None and max_new_tokens < 1):
            raise ConfigError(
                f"generate_rows = {generate_rows}, batch_size = {batch_size}, max_new_tokens = {max_new_tokens}; "
                "expected at least 0, 1 and 1"
            )
        if choice_normalization not in CHOICE_NORMALIZATIONS:
            near = did_you_mean(choice_normalization, CHOICE_NORMALIZATIONS)
            expected = f"expected one of {', '.join(CHOICE_NORMALIZATIONS)}"
            raise ConfigError(f"choice_normalization {choice_normalization!r}{near}: {expected}")
        if labels is not None:
            how = {"separator": separator, "train_on": train_on, "truncation": truncation, "today": today}
            return _of_head(rows, labels, metric, batch_size=batch_size, max_length=max_length, **how)
        wanted = _wanted(metric, CustomMetric.named if code_later else load_metric)
        own, choices, whose = _with_choices(rows, train_rows, answers, wanted)
        to_choose = _choosable(own, wanted)
        writable = _writable(own, wanted, to_choose, generate_rows)
        count = min(len(writable), generate_rows)
        to_write = tuple(writable[number * len(writable) // count] for number in range(count))
        references = [reference for place in to_write for reference in references_of(own[place])]
        return cls(
            rows=tuple(own), to_choose=tuple(to_choose), to_write=to_write, writable=len(writable),
            text_metrics=wanted.text if to_write else (), custom=wanted.custom if to_write else (), choices=choices,
            max_new_tokens=max_new_tokens, batch_size=batch_size, max_length=max_length, separator=separator,
            choice_normalization=choice_normalization, bleu_tokenizer=bleu_tokenizer(references), train_on=train_on,
            truncation=truncation, today=today, choices_of=whose,
            label_metrics=_of_choices([own[place] for place in to_choose], wanted),
        )  # fmt: skip

    def with_code(self) -> Task:
        """With the user's own metrics imported. Raises ConfigError: one cannot be."""
        if all(metric.imported for metric in self.custom):
            return self
        return dataclasses.replace(self, custom=tuple(load_metric(metric.source) for metric in self.custom))

    @property
    def conventions(self) -> dict[str, Any]:
        """How rows become ids, cutting apart: arguments of `encode` and of `prompts_ids`."""
        return {"separator": self.separator, "train_on": self.train_on, "today": self.today}

    @property
    def higher_is_better(self) -> dict[str, bool]:
        """The metrics that rows will have, and which way is better; of the user's own only their code says it."""
        named = {name: name not in LOWER_IS_BETTER for name in (*self.label_metrics, *self.text_metrics)}
        return named | {metric.name: metric.higher_is_better for metric in self.custom if metric.imported}

    def describe(self) -> str:
        """What is measured, in sentences for a report."""
        count = len(self.rows)
        parts = [f"Loss is taken of {_rows(count)}."]
        if self.labels is not None:
            names = f" {', '.join(self.label_metrics)}: of what it says." if self.label_metrics else ""
            return f"{self.labels.describe()}. {parts[0]}{names}"
        if self.to_choose:
            over = "the row's choices"
            if self.choices:
                named = ", ".join(repr(choice) for choice in self.choices)
                over = f"{len(self.choices)} choices, inferred because every {self.choices_of} is answered with one: "
                over += named
            by = _LIKELIHOODS[self.choice_normalization]
            parts.append(f"Accuracy, over {_rows(len(self.to_choose))}, is by {by} over {over}.")
        if self.to_write:
            names = ", ".join([*self.text_metrics, *(metric.source for metric in self.custom)])
            which = _rows(self.writable)
            if len(self.to_write) < self.writable:
                which = f"{len(self.to_write):,} of {which}, evenly spaced"
            limit = "a quarter more tokens than the longest answer (at most 256, or one more than it has)"
            if self.max_new_tokens is not None:
                limit = f"{self.max_new_tokens} tokens"
            parts.append(f"{names}: of greedy completions of {which}, of up to {limit}.")
            if "bleu" in self.text_metrics:
                parts.append(f"BLEU's tokenizer is sacrebleu's {self.bleu_tokenizer!r}{_WHY[self.bleu_tokenizer]}.")
        if not self.to_choose and not self.to_write:
            parts.append("No row is written or chosen.")
        return " ".join(parts)

    def conditions(self) -> dict[str, Any]:
        """What the measurements depend on beside model and rows, as JSON: for a comparison's settings and its keys."""
        return {
            "metrics": self.higher_is_better, "custom": [metric.source for metric in self.custom],
            "judged_rows": len(self.rows), "chosen_rows": len(self.to_choose), "generated_rows": len(self.to_write),
            "choices": list(self.choices), "max_new_tokens": self.max_new_tokens, "max_length": self.max_length,
            "separator": self.separator, "choice_normalization": self.choice_normalization,
            "bleu_tokenizer": self.bleu_tokenizer if "bleu" in self.text_metrics else None,
            **({"labels": dataclasses.asdict(self.labels)} if self.labels is not None else {}),
        }  # fmt: skip


def _of_head(rows: Sequence[Row], labels: Labels, metric: str | None, **how: Any) -> Task:
    """The task of a head: no row is written, and what it says of each is measured."""
    return Task(
        rows=tuple(dataclasses.replace(row) for row in rows), to_choose=(), to_write=(), writable=0, text_metrics=(),
        custom=(), choices=(), max_new_tokens=None, label_metrics=metrics_of_head(labels, metric), labels=labels, **how,
    )  # fmt: skip


@dataclass(frozen=True)
class _Wanted:
    """The metrics that `metric` names; `auto`: whatever the rows can give."""

    metric: str | None
    text: tuple[str, ...]
    classes: tuple[str, ...]
    custom: tuple[CustomMetric, ...]
    auto: bool = False


def _wanted(metric: str | None, custom_metric: Callable[[str], CustomMetric]) -> _Wanted:
    words = [word.strip() for word in (metric or "auto").split(",") if word.strip()]
    if words == ["auto"]:
        return _Wanted(metric, TEXT_METRICS, OF_CLASSES, (), auto=True)
    for word in words:
        if ":" not in word and word not in METRICS:
            raise ConfigError(
                f"metric {word!r}{did_you_mean(word, METRICS)}: expected auto alone, or some of {', '.join(METRICS)}, "
                "package.module:function or file.py:function"
            )
    if not words:
        raise ConfigError(f"metric {metric!r} names none; expected auto, or some of {', '.join(METRICS)}")
    custom = tuple(custom_metric(word) for word in words if ":" in word)
    taken = [*METRICS, *(one.name for one in custom)]
    if twice := [one.source for one in custom if taken.count(one.name) > 1]:
        raise ConfigError(f"metric {', '.join(twice)}: the function's name is taken by another metric; rename it")
    if of_heads := [word for word in words if word in LABEL_METRICS and word not in OF_CLASSES]:
        there = ", ".join(("loss", *TEXT_METRICS, *OF_CLASSES))
        raise ConfigError(
            f"metric {', '.join(of_heads)}: of a head (task_type SEQ_CLS or TOKEN_CLS), and these rows are judged by "
            f"what a language model makes of them; expected auto, or some of {there}"
        )
    text, classes = (tuple(name for name in known if name in words) for known in (TEXT_METRICS, OF_CLASSES))
    return _Wanted(metric, text, classes, custom)


def _of_choices(rows: Sequence[Row], wanted: _Wanted) -> tuple[str, ...]:
    """The metrics of rows that are chosen for: beyond accuracy where all have the same choices. Raises DataError: one
    was named that they do not give."""
    names = wanted.classes if rows else ()
    if not rows or common_choices(rows):
        return names
    if not wanted.auto and (others := [name for name in names if name != "accuracy"]):
        raise DataError(f"metric {', '.join(others)}: rows have choices of their own; expected the same in all")
    return names[:1]


def _with_choices(
    rows: Sequence[Row], train_rows: Sequence[Row], answers: Sequence[str], wanted: _Wanted
) -> tuple[list[Row], tuple[str, ...], str]:
    """The rows, with the choices that were inferred where none has any; these choices; and whose answers they are: the
    training rows', or, where accuracy is named and those are no labels, the rows' own."""
    whose = "training row"
    # a row of its own each: the same object given twice is two rows
    own = [dataclasses.replace(row) for row in rows]
    if not wanted.classes:
        return own, (), whose
    if any(row.choices for row in own):
        return labelled(own), (), whose
    known = tuple(answers) or common_answers(train_rows)
    if not known and not wanted.auto:
        known, whose = common_answers(own), "row"
    choices = inferred_choices(known, own)
    if choices:
        own = [dataclasses.replace(row, choices=choices, label=answer_of(row)) for row in own]
    return own, choices, whose


def _choosable(rows: Sequence[Row], wanted: _Wanted) -> list[int]:
    """Places of the rows that are chosen for. Raises DataError where accuracy was named and there are none."""
    if not wanted.classes:
        return []
    found = [place for place, row in enumerate(rows) if row.choices and row.label is not None and has_prompt(row)]
    if not found and not wanted.auto:
        raise DataError(
            f"metric {', '.join(wanted.classes)}: no row has a prompt, choices and a label, and the answers are not a "
            "few short texts over and over; expected `choices` (a list) in the rows, and `label` or an answer that is "
            "one of them"
        )
    return found


def _writable(rows: Sequence[Row], wanted: _Wanted, chosen: Sequence[int], generate_rows: int) -> list[int]:
    """Places of the rows that can be written, by default those that are not chosen for. Raises ConfigError or DataError
    where metrics of written rows were named and none may or can be written."""
    found = [place for place, row in enumerate(rows) if has_prompt(row) and references_of(row)]
    if wanted.auto:
        taken = set(chosen)
        return [place for place in found if place not in taken]
    if not (wanted.text or wanted.custom):
        return []
    if generate_rows == 0:
        raise ConfigError(f"metric {wanted.metric}: needs written rows, and generate_rows is 0")
    if not found:
        raise DataError(f"metric {wanted.metric}: no row has a prompt and references or an answer to compare with")
    return found


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"
