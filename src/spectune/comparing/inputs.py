"""What all runs of a comparison work on: its rows, read and encoded once, and what is measured of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from spectune import data
from spectune.comparing.conditions import key
from spectune.comparing.label_words import as_words
from spectune.data import HELD_OUT, Encoded, Labels, Row, encode, load_rows, mixture, split_rows, weighted
from spectune.evaluation import Task
from spectune.training import TrainingConfig
from spectune.training.prepare import train_sources


@dataclass(frozen=True)
class Rows:
    """The rows that were given. `held_out` is the share of the training rows that validates, None where rows for that
    were given; `test` is None where the validation rows are judged."""

    train: data.Rows
    valid: Sequence[Row]
    held_out: float | None
    test: Sequence[Row] | None

    @classmethod
    def read(cls, train: Any, valid: Any, test: Any, settings: TrainingConfig) -> Rows:
        """From what `load_rows` takes. Raises DataError: rows are missing or bad."""
        how = settings.row_options
        rows = load_rows(train, **how)
        held_out = None if valid is not None else HELD_OUT
        if valid is not None:
            held = load_rows(valid, **how)
        else:
            rows, held = split_rows(rows, seed=settings.seed)
        return cls(rows, held, held_out, None if test is None else load_rows(test, **how))

    def in_words(self, labels: Labels) -> Rows:
        """Rows of texts with labels as a language model has them."""
        given = self.train
        how: dict[str, Any] = {"skip_bad_rows": given.skip_bad_rows, "weights": given.weights}
        train = data.Rows(as_words(given, labels), given.skipped, **how)
        parts = (None if part is None else as_words(part, labels) for part in (self.valid, self.test))
        valid, test = parts
        return dataclasses.replace(self, train=train, valid=valid or [], test=test)

    @property
    def judged(self) -> Sequence[Row]:
        return self.valid if self.test is None else self.test

    @property
    def judged_on(self) -> str:
        return "valid" if self.test is None else "test"


@dataclass(frozen=True)
class Inputs:
    """The rows, encoded, and the task that models are judged on. `notice` says what of the judged rows is lost."""

    rows: Rows
    train: Encoded
    valid: Encoded
    task: Task
    notice: str

    @classmethod
    def of(
        cls, rows: Rows, tokenizer: PreTrainedTokenizerBase, settings: TrainingConfig, *, metric: str,
        generate_rows: int, choice_normalization: str = "sum", vocab_size: int | None = None,
        labels: Labels | None = None,
    ) -> Inputs:  # fmt: skip
        """Encode the rows, at most `settings.max_length` tokens of each. Metrics of the user's own are not imported.

        Args:
            vocab_size: rows of the base's embedding, where they are known.
            labels: what models' heads learn of the rows; None: their text is learned.

        Raises:
            ConfigError, DataError: rows that cannot be encoded, or a metric that they cannot give.
        """
        assert settings.max_length is not None
        length, how = settings.max_length, {**settings.encode_options, "labels": labels}
        parts = (rows.train, rows.valid) if rows.test is None else (rows.train, rows.valid, rows.test)
        train, valid, *test = (
            encode(part, tokenizer, max_length=length, vocab_size=vocab_size, **how) for part in parts
        )
        train = weighted(train, rows.train.weights, settings.seed)
        # a row that encoding drops has nothing to be judged on
        task = Task.of(
            (test[0] if test else valid).rows, train_rows=rows.train, metric=metric, generate_rows=generate_rows,
            choice_normalization=choice_normalization, max_length=length,
            batch_size=settings.per_device_eval_batch_size, code_later=True, **how,
        )  # fmt: skip
        # of the rows to train and to validate on each run tells itself
        return cls(rows, train, valid, task, test[0].report.summary("test") if test else "")

    def with_code(self) -> Inputs:
        """With the user's own metrics imported. Raises ConfigError: one cannot be."""
        return dataclasses.replace(self, task=self.task.with_code())

    @property
    def train_size(self) -> tuple[int, int]:
        """Training examples, and the target tokens of all of them."""
        return len(self.train.examples), sum(example.target_tokens for example in self.train.examples)

    def describe(self) -> dict[str, Any]:
        """For `comparison.json`."""
        sources = train_sources(self.train.report)
        return {
            "train_rows": len(self.rows.train),
            "train_examples": len(self.train.examples),
            "valid_rows": len(self.rows.valid),
            "held_out": self.rows.held_out,
            "judged_on": self.rows.judged_on,
            "judged_rows": len(self.task.rows),
            "generated_rows": len(self.task.to_write),
            "higher_is_better": self.task.higher_is_better,
            "task": self.task.describe(),
            **({} if self.task.labels is None else {"loss_unit": self.task.labels.loss_unit}),
            **({"sources": sources, "mixture": mixture(self.train.report)} if sources else {}),
        }

    def identity(self) -> dict[str, Any]:
        """What results depend on. Of judged rows that is all they hold: metrics see references, labels and columns."""
        judged = [{**dataclasses.asdict(row), "origin": None} for row in self.task.rows]
        return {
            "data_sha256": key(self.train.sha256, self.valid.sha256),
            "judged_rows_sha256": key(judged),
            "judged": self.task.conditions(),
        }
