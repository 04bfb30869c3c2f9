"""Encode rows: token ids, and which of them have a loss.

The target is the completion and its EOS, by position, never by token id: bases that pad with EOS learn it all the
same. The prompt's ids are the ones that generation gets.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from spectune.data.loading import Row, Rows
from spectune.errors import ConfigError, DataError


@dataclass(slots=True)
class Example:
    """One encoded row: `input_ids`, of which those from `prompt_length` on are learned (0: all but the first)."""

    input_ids: list[int]
    prompt_length: int
    row: Row

    @property
    def target_tokens(self) -> int:
        """Tokens with a loss. The first token of a sequence has none: nothing stands before it."""
        return len(self.input_ids) - max(self.prompt_length, 1)


@dataclass
class DataReport:
    """Where every input row went: `rows = kept + dropped + bad`; cut and split rows are among the kept.

    `examples` counts sequences: a long `text` row is `split` into several. `tokens` are those of all examples.
    """

    rows: int = 0
    kept: int = 0
    examples: int = 0
    tokens: int = 0
    target_tokens: int = 0
    longest: int = 0
    ends_with_eos: int = 0
    cut: list[dict[str, Any]] = field(default_factory=list)
    split: list[dict[str, Any]] = field(default_factory=list)
    dropped: list[dict[str, str]] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)

    @property
    def tokens_lost(self) -> int:
        return sum(entry["tokens_lost"] for entry in self.cut)

    def to_dict(self) -> dict[str, Any]:
        lists: dict[str, list[Any]] = {"cut": self.cut, "split": self.split, "dropped": self.dropped, "bad": self.bad}
        return {
            **{name: getattr(self, name) for name in ("rows", "kept", "examples")},
            **{name: len(rows) for name, rows in lists.items()},
            **{name: getattr(self, name) for name in ("tokens", "target_tokens", "tokens_lost")},
            "longest_row_tokens": self.longest,
            "rows_that_end_with_eos": self.ends_with_eos,
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
        if self.bad:
            parts.append(f"{len(self.bad):,} bad rows left out")
        return f"{name}: {'; '.join(parts)}" if parts else ""

    def count(self, example: Example, eos: int) -> None:
        """Add an example's tokens."""
        self.examples += 1
        self.tokens += len(example.input_ids)
        self.target_tokens += example.target_tokens
        self.longest = max(self.longest, len(example.input_ids))
        self.ends_with_eos += example.input_ids[-1] == eos


@dataclass
class Encoded:
    """The examples of some rows, and where each row went."""

    examples: list[Example]
    report: DataReport

    @property
    def rows(self) -> list[Row]:
        """The rows of the examples; a long text is several examples of one row."""
        return list({id(example.row): example.row for example in self.examples}.values())

    @cached_property
    def sha256(self) -> str:
        """A digest of all token ids and of what of them is learned."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(repr((example.input_ids, example.prompt_length)).encode())
        return digest.hexdigest()


def encode(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, max_length: int, separator: str = "") -> Encoded:
    """Token ids of all rows, at most `max_length` each, and a report that accounts for every one.

    A row that is too long loses the beginning of its prompt; where the target alone is too long, its end (EOS too).
    A `text` row that is too long loses nothing: it becomes several examples, windows that follow each other.

    Raises:
        ConfigError: the tokenizer has no EOS, or no chat template for `messages`.
        DataError: no row has anything to learn.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no EOS token, so no model could learn to stop; set tokenizer.eos_token")
    if max_length < 2:
        raise ConfigError(f"max_length = {max_length}: at least 2 tokens are needed")
    bad = list(rows.skipped) if isinstance(rows, Rows) else []
    report, examples = DataReport(rows=len(rows) + len(bad), bad=bad), list[Example]()
    for row in rows:
        prompt, target = _ids(row, tokenizer, separator)
        before = len(prompt), len(target)
        if row.text is not None:
            found = [Example(window, 0, row) for window in _windows(target, max_length)]
            if len(found) > 1:
                report.split.append({"origin": row.origin, "tokens": len(target), "windows": len(found)})
        else:
            prompt, target = _cut(prompt, target, max_length)
            found = [Example(prompt + target, len(prompt), row)]
        if sum(example.target_tokens for example in found) < 1:
            report.dropped.append({"origin": row.origin, "reason": "nothing to learn: its target has no token"})
            continue
        after = len(prompt), len(target)
        if after != before:
            ends = [end for end, had, has in zip(("prompt", "end"), before, after, strict=True) if has < had]
            lost = sum(before) - sum(after)
            report.cut.append({"origin": row.origin, "tokens_lost": lost, "from": " and ".join(ends)})
        report.kept += 1
        examples += found
        for example in found:
            report.count(example, int(tokenizer.eos_token_id))
    if not examples:
        raise DataError(f"none of {report.rows} rows has a token to learn", [d["origin"] for d in report.dropped])
    return Encoded(examples, report)


def prompt_ids(row: Row, tokenizer: PreTrainedTokenizerBase, separator: str = "") -> list[int]:
    """The ids that generation starts from: exactly the prefix that training saw before the target.

    `messages` may end with the answer, which is left out, or with the question.
    """
    if row.text is not None:
        return _plain(row.text, tokenizer)
    if row.messages is not None:
        return _template(tokenizer, row.asked, generation=True)
    return _ids(row, tokenizer, separator)[0]


def _ids(row: Row, tokenizer: PreTrainedTokenizerBase, separator: str) -> tuple[list[int], list[int]]:
    """Prompt ids and target ids, EOS at the end of the latter."""
    eos = [int(tokenizer.eos_token_id)]
    if row.text is not None:
        return [], _plain(row.text, tokenizer) + eos
    if row.messages is not None:
        return _chat(row.messages, tokenizer)
    assert row.prompt is not None
    assert row.completion is not None
    prompt = _plain(row.prompt + separator, tokenizer)
    together = _plain(row.prompt + separator + row.completion, tokenizer)
    if prompt and together[: len(prompt)] == prompt:
        return prompt, together[len(prompt) :] + eos
    # the two would merge across the seam: then training must see what generation sees, the prompt by itself
    if not row.prompt + separator:
        return [], together + eos
    return prompt, list(tokenizer(row.completion, add_special_tokens=False)["input_ids"]) + eos


def _plain(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids with what the tokenizer puts in front (BOS, once), without what it puts behind."""
    ids = list(tokenizer(text)["input_ids"])
    bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    behind = len(ids) - len(bare)
    ends = tokenizer.eos_token_id, tokenizer.sep_token_id
    while behind > 0 and ids and ids[-1] in ends and ids[-len(bare) :] != bare:
        ids.pop()
        behind -= 1
    if bare[:1] == [tokenizer.bos_token_id] and ids[:2] == [tokenizer.bos_token_id] * 2:
        ids = ids[1:]  # the text began with BOS already
    return ids


def _chat(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The last assistant message is the target, all before it the prompt."""
    prompt = _template(tokenizer, messages[:-1], generation=True)
    whole = _template(tokenizer, messages, generation=False)
    target = whole[len(prompt) :]
    if whole[: len(prompt)] != prompt:
        target = list(tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"])
    eos = int(tokenizer.eos_token_id)
    # templates may write a line end after EOS, which is no part of the answer
    ends = eos in target
    return prompt, target[: len(target) - target[::-1].index(eos)] if ends else [*target, eos]


def _template(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], *, generation: bool) -> list[int]:
    if tokenizer.chat_template is None:
        raise ConfigError(
            "the rows are chats (messages), but this tokenizer has no chat template; set tokenizer.chat_template, or "
            "give the rows as prompt + completion"
        )
    try:
        ids: Any = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=False, add_generation_prompt=generation
        )
    except Exception as error:  # templates raise what they like: jinja errors, and their own
        raise DataError(f"the tokenizer's chat template refuses these messages: {error}") from error
    return [int(i) for i in ids]


def _windows(ids: list[int], longest: int) -> list[list[int]]:
    """Consecutive windows of at most `longest` ids. Each begins with the last id of the one before: a sequence's first
    token is not predicted, so every token of the text but its first has a loss once."""
    return [ids[start : start + longest] for start in range(0, max(len(ids) - 1, 1), longest - 1)]


def _cut(prompt: list[int], target: list[int], longest: int) -> tuple[list[int], list[int]]:
    if len(prompt) + len(target) <= longest:
        return prompt, target
    if len(target) < longest and prompt:
        return prompt[len(prompt) + len(target) - longest :], target
    keep = prompt[-1:]  # one token to predict the first target from
    return keep, target[: longest - len(keep)]
