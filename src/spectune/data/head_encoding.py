"""Encode rows for a head: the ids of a text, and its label; or of words joined with spaces, and a class at each word's
first token. No EOS is added: the head reads the text's own last token.

A word's tokens are those that it has in running text, behind a space, so a byte-level BPE needs no `add_prefix_space`
(and the first word has none, as the first word of any text has none).
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from spectune.data.chats.chat_template import ChatTemplate
from spectune.data.data_report import DataReport
from spectune.data.head_labels import TOKEN_CLS, Label, Labels, as_number, labels_of
from spectune.data.labelled import LabelledExample
from spectune.data.problem import RowProblem
from spectune.data.shapes import Row, other_shapes
from spectune.data.tokenizing import Text, TextTokenizer, Tokens

#: rows that are tokenized together
_CHUNK = 512
Made = LabelledExample | RowProblem | None


class HeadEncoder:
    """From rows to labelled ids. Arguments as `spectune.data.encode` has them."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, labels: Labels, *, longest: int, truncation: str = "start",
        separator: str = "", today: str | None = None, vocab_size: int | None = None,
    ) -> None:  # fmt: skip
        self.tokenizer, self.labels, self.longest, self.truncation = tokenizer, labels, longest, truncation
        self.separator, self.vocab_size, self._today = separator, vocab_size, today
        self.texts = TextTokenizer(tokenizer)

    @cached_property
    def template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self._today)

    def encoded(self, rows: Sequence[Row], report: DataReport) -> Iterator[tuple[Row, Made]]:
        """The example of each row; what is wrong with it; or None where it has no token. What is lost goes into the
        report."""
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            made = [self._text(row) for row in chunk]
            tokenized = iter(self.texts.tokenize([one for one in made if isinstance(one, Text)]))
            for row, one in zip(chunk, made, strict=True):
                tokens = one if isinstance(one, RowProblem) else next(tokenized)
                try:
                    yield row, self._example(row, tokens, report)
                except RowProblem as problem:
                    yield row, problem

    def unlabelled(self, rows: Sequence[Row]) -> list[LabelledExample]:
        """The ids of texts whose labels are to be found, as training has them. Raises RowProblem: one has none."""
        found = list[LabelledExample]()
        for row in rows:
            text = self._text(row)
            tokens = text if isinstance(text, RowProblem) else self.texts.tokenize([text])[0]
            if isinstance(tokens, RowProblem):
                raise tokens
            found.append(self._cut(row, tokens, None if row.tokens else 0, [0] * len(row.tokens or ()), DataReport()))
        return found

    def _text(self, row: Row) -> Text | RowProblem:
        if self.labels.task_type == TOKEN_CLS:
            return _of_words(row.tokens) if row.tokens else RowProblem(f"has no tokens ({row.shape})")
        try:
            return Text(self._read(row), (), frozenset())
        except RowProblem as problem:
            return problem

    def _read(self, row: Row) -> str:
        """The text that the head reads: of a row with an answer what stands before it; of a chat with a label all of
        it."""
        if row.messages is not None:
            if row.answered and row.label is not None and not row.choices:
                return self.template.whole(row, row.messages).text
            return self.template.prompt(row)
        if row.tokens is not None:
            raise RowProblem("has tokens + tags, which are for task_type TOKEN_CLS; expected text + label")
        return row.text if row.text is not None else row.before + self.separator

    def _example(self, row: Row, tokens: Tokens | RowProblem, report: DataReport) -> LabelledExample | None:
        if isinstance(tokens, RowProblem):
            raise tokens
        given = labels_of(row, self.labels.task_type)
        if self.vocab_size is not None and tokens.ids and max(tokens.ids) >= self.vocab_size:
            raise RowProblem(f"holds the id {max(tokens.ids)}, and the base's embedding has {self.vocab_size} rows")
        if not tokens.ids:
            return None
        words = self.labels.task_type == TOKEN_CLS
        numbers = [self._number(label) for label in given]
        example = self._cut(row, tokens, None if words else numbers[0], numbers if words else [], report)
        if words and not example.places:
            return None
        report.labels.update(self.labels.names[int(number)] for number in numbers if not self.labels.regression)
        report.unknown += self.tokenizer.unk_token_id in tokens.ids if self._unknown else 0
        report.inexact += not tokens.exact
        report.ignored.update(other_shapes(row))
        return example

    @cached_property
    def _unknown(self) -> bool:
        """Whether the unknown token means nothing else (GPT-2's is EOS)."""
        return self.tokenizer.unk_token_id not in (None, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)

    def _number(self, label: Label) -> int | float:
        if not self.labels.regression:
            return self.labels.number_of(label)
        value = as_number(label) if isinstance(label, str) else label
        if value is None:
            raise RowProblem(f"the label {label!r} is no number; expected one, as in the training rows")
        return float(value)

    def _cut(
        self, row: Row, tokens: Tokens, label: int | float | None, classes: Sequence[int | float], report: DataReport
    ) -> LabelledExample:
        """The example of at most so many ids; a word whose first token is cut has no loss."""
        ids, places, front = tokens.ids, list(tokens.places), self.texts.front
        if front and ids[: len(front)] != front:
            ids, places = front + ids, [place + len(front) for place in places]
        kept, lost = self._kept(ids), len(ids) - self.longest
        if lost > 0:
            report.cut.append({"origin": row.origin, "tokens_lost": lost, "from": _FROM[self.truncation]})
            report.lost_beginning += self.truncation == "start"
        at = {place: number for number, place in enumerate(kept)}
        # a word that the tokenizer drops has its place where the next one begins
        nexts = [*places[1:], len(ids)]
        words = [n for n, place in enumerate(places) if place in at and place < nexts[n]]
        report.unscored_words += len(places) - len(words)
        return LabelledExample(
            [ids[place] for place in kept], row, label=label, words=words,
            places=[at[places[n]] for n in words], classes=[int(classes[n]) for n in words],
        )  # fmt: skip

    def _kept(self, ids: Sequence[int]) -> Sequence[int]:
        """The places of the ids that stay: BOS does."""
        longest, count = self.longest, len(ids)
        if count <= longest:
            return range(count)
        if self.truncation == "refuse":
            raise RowProblem(
                f"has {count} tokens, and max_length is {longest}; truncation=start or middle would cut it"
            )
        front = self.texts.front
        lead = int((bool(front) and list(ids[: len(front)]) == front) or ids[0] == self.tokenizer.bos_token_id)
        head = lead if self.truncation == "start" else max(lead, longest // 2)
        return [*range(head), *range(count - longest + head, count)]


_FROM = {"start": "prompt", "middle": "middle"}


def _of_words(words: Sequence[str]) -> Text:
    """Words as a text; their places are those of the spaces before them, which byte-level tokens begin with."""
    places, at = list[int](), 0
    for word in words:
        places.append(max(at - 1, 0))
        at += len(word) + 1
    return Text(" ".join(words), tuple(places), frozenset())


def encode_for_head(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, labels: Labels, report: DataReport, **how: Any
) -> tuple[list[LabelledExample], list[str]]:
    """The examples of rows, and what is wrong with the others, `file:line` each."""
    examples, problems = list[LabelledExample](), list[str]()
    for row, made in HeadEncoder(tokenizer, labels, **how).encoded(rows, report):
        if isinstance(made, RowProblem):
            problems.append(f"{row.origin}: {made}")
        elif made is None:
            report.dropped.append({"origin": row.origin, "reason": "nothing to learn: it has no token"})
        else:
            examples.append(made)
    return examples, problems
