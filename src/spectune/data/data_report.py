"""Where every input row went, and what of it is learned."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from spectune.data.example import Example

#: origins named of what is only counted
_NAMED = 5


@dataclass(frozen=True)
class SourceReport:
    """One of several sources: its rows that are kept, each counted once; and what an epoch of training has of it.

    Attributes:
        weight: how often an epoch has each row; None of rows that are not weighted, those to validate on.
    """

    rows: int = 0
    examples: int = 0
    tokens: int = 0
    target_tokens: int = 0
    weight: float | None = None
    epoch_examples: int = 0
    epoch_tokens: int = 0
    epoch_target_tokens: int = 0

    def with_row(self, examples: Sequence[Example]) -> Self:
        """With one row more, of these examples."""
        return replace(
            self,
            rows=self.rows + 1,
            examples=self.examples + len(examples),
            tokens=self.tokens + _tokens(examples),
            target_tokens=self.target_tokens + _target_tokens(examples),
        )

    def with_epoch(self, examples: Sequence[Example]) -> Self:
        """With these as the examples of an epoch."""
        tokens, targets = _tokens(examples), _target_tokens(examples)
        return replace(self, epoch_examples=len(examples), epoch_tokens=tokens, epoch_target_tokens=targets)

    def to_dict(self) -> dict[str, Any]:
        """Without what an epoch has, where the rows are not weighted."""
        found = asdict(self)
        ours = ("rows", "examples", "tokens", "target_tokens")
        return {name: found[name] for name in ours} if self.weight is None else found


def _tokens(examples: Sequence[Example]) -> int:
    return sum(example.length for example in examples)


def _target_tokens(examples: Sequence[Example]) -> int:
    return sum(example.target_tokens for example in examples)


@dataclass
class DataReport:
    """Where every input row went: `rows = kept + dropped + bad`; cut and split rows are among the kept.

    Attributes:
        examples: sequences; a long `text` row is `split` into several, a chat whose template rewrites earlier turns
            has several, too.
        tokens: those of all examples; `target_tokens`: those of them that are learned.
        turns: assistant turns that are learned.
        thoughts_cut: earlier turns that are learned without their thought, because the chat template cuts it.
        unasked: the assistant's turns before the first question that are not learned, because the chat template has no
            prompt for them.
        lost_beginning: rows whose beginning was cut.
        eos_inside: rows with an EOS inside of a learned turn, where generation would end.
        inexact: rows whose text decoding does not give back, because the tokenizer changes it (case, white space).
        unknown: rows with an unknown token.
        ignored: keys of another shape that rows hold beside the one that is taken, and in how many.
        sources: of several sources, what each has, by its name.
        labels: for a head, how many texts or words of each class there are.
        unscored_words: words without a loss: they were cut, or have no token.
    """

    rows: int = 0
    kept: int = 0
    examples: int = 0
    tokens: int = 0
    target_tokens: int = 0
    turns: int = 0
    longest: int = 0
    ends_with_eos: int = 0
    thoughts_cut: int = 0
    unasked: int = 0
    lost_beginning: int = 0
    eos_inside: int = 0
    inexact: int = 0
    unknown: int = 0
    cut: list[dict[str, Any]] = field(default_factory=list)
    split: list[dict[str, Any]] = field(default_factory=list)
    dropped: list[dict[str, str]] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    sources: dict[str, SourceReport] = field(default_factory=dict)
    labels: Counter[str] = field(default_factory=Counter)
    unscored_words: int = 0

    def count_source(self, name: str | None, examples: Sequence[Example]) -> None:
        """Count a kept row with these examples under its source, where it has one."""
        if name is not None:
            self.sources[name] = self.sources.get(name, SourceReport()).with_row(examples)

    @property
    def tokens_lost(self) -> int:
        return sum(entry["tokens_lost"] for entry in self.cut)

    def to_dict(self) -> dict[str, Any]:
        lists: dict[str, list[Any]] = {"cut": self.cut, "split": self.split, "dropped": self.dropped, "bad": self.bad}
        sources = {name: found.to_dict() for name, found in self.sources.items()}
        return {
            **{name: getattr(self, name) for name in ("rows", "kept", "examples", "turns")},
            **{name: len(rows) for name, rows in lists.items()},
            **{name: getattr(self, name) for name in ("tokens", "target_tokens", "tokens_lost")},
            "longest_row_tokens": self.longest,
            "rows_that_end_with_eos": self.ends_with_eos,
            "rows_that_lost_their_beginning": self.lost_beginning,
            "rows_with_eos_inside": self.eos_inside,
            "rows_with_unknown_tokens": self.unknown,
            "rows_that_the_tokenizer_changes": self.inexact,
            "turns_without_their_thought": self.thoughts_cut,
            "turns_without_a_prompt": self.unasked,
            **({"ignored_keys": dict(self.ignored)} if self.ignored else {}),
            **({"sources": sources} if sources else {}),
            **({"labels": dict(self.labels)} if self.labels else {}),
            **({"words_without_a_loss": self.unscored_words} if self.unscored_words else {}),
            **{f"{name}_rows": rows for name, rows in lists.items()},
        }

    def summary(self, name: str = "data") -> str:
        """What is not learned as it was given, in one line for a terminal: `train: 3 of 90 rows cut (...)`; or ""."""
        parts = []
        if self.cut:
            parts.append(
                f"{len(self.cut):,} of {self.rows:,} rows cut to max_length ({self.tokens_lost:,} tokens lost)"
            )
        if self.split:
            windows = sum(entry["windows"] for entry in self.split)
            parts.append(f"{len(self.split):,} long texts split into {windows:,} windows (no token lost)")
        if self.dropped:
            parts.append(f"{len(self.dropped):,} rows dropped ({self.dropped[0]['reason']})")
        counted = (
            (len(self.bad), "bad rows left out"),
            (self.lost_beginning, "rows lost the beginning of what stands before the answer"),
            (self.thoughts_cut, "earlier turns without their thought, which the chat template cuts"),
            (self.unasked, "turns before the first question not learned: the chat template cannot ask"),
            (self.eos_inside, "rows with an EOS inside of an answer, where generation will end"),
            (self.unknown, "rows with characters that the tokenizer does not know"),
            (self.unscored_words, "words without a loss: cut, or without a token"),
        )
        parts += [f"{count:,} {what}" for count, what in counted if count]
        if self.ignored:
            keys = ", ".join(f"{key} ({count:,} rows)" for key, count in self.ignored.items())
            parts.append(f"not used beside the shape that is taken: {keys}; name it in columns to take it")
        return f"{name}: {'; '.join(parts)}" if parts else ""
