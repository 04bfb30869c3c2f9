"""Encode rows: token ids, and which of them have a loss.

What is learned is decided on text: a completion, each turn of the assistant, or all of a text; EOS ends it. The ids
before a learned stretch are the ones that generation gets. Labels go by position, never by token id: bases that pad
with EOS learn it all the same.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from spectune.data.chats.chat_template import ChatTemplate
from spectune.data.chats.chat_turns import conversation_sequences
from spectune.data.cutting import TRUNCATIONS, cut, windows
from spectune.data.data_report import DataReport
from spectune.data.example import Example
from spectune.data.head_encoding import encode_for_head
from spectune.data.head_labels import Labels
from spectune.data.loading import Rows, bad_rows
from spectune.data.problem import RowProblem
from spectune.data.rendering import Rendered, ending_at_eos, joined
from spectune.data.shapes import Row, other_shapes
from spectune.data.tokenizing import Text, TextTokenizer, Tokens
from spectune.data.working_ahead import with_work_done
from spectune.errors import ConfigError, DataError

#: rows and characters that are tokenized together; so much is held beside the rows and the examples, three times
_CHUNK, _CHARACTERS = 512, 1 << 22


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
            digest.update(example.tobytes())
        return digest.hexdigest()


def encode(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, max_length: int, separator: str = "",
    train_on: str = "all", truncation: str = "start", today: str | None = None, vocab_size: int | None = None,
    labels: Labels | None = None,
) -> Encoded:  # fmt: skip
    """Token ids of all rows, at most `max_length` each, and a report that accounts for every one.

    A row that is too long loses its beginning, but for a BOS; where its last answer alone is too long, that one's end
    (EOS too). A `text` row that is too long loses nothing: it becomes several examples, windows that follow each other.

    Args:
        separator: goes between prompt and completion.
        train_on: "all": every assistant turn of a chat is learned; "last": the last one.
        truncation: "start", or "middle" (the beginning and the end of what stands before the last answer are kept), or
            "refuse" (a row that is too long is a bad row).
        today: the current date as chat templates see it, ISO.
        vocab_size: rows of the base's embedding, where they are known: a row with other ids is a bad row.
        labels: what a head learns of the rows: texts with labels, without EOS (`spectune.data.head_encoding`); None:
            their text is learned.

    Raises:
        ConfigError: the tokenizer has no EOS, or no chat template for `messages`; an EOS beyond the embedding.
        DataError: no row has anything to learn, or (all at once, `file:line` each) rows cannot be learned as they are
            written. Rows that were loaded with `skip_bad_rows` are left out and counted.
    """
    if max_length < 2:
        raise ConfigError(f"max_length = {max_length}: at least 2 tokens are needed")
    if truncation not in TRUNCATIONS:
        raise ConfigError(f"truncation = {truncation!r}: expected one of {', '.join(TRUNCATIONS)}")
    bad = list(rows.skipped) if isinstance(rows, Rows) else []
    report = DataReport(rows=len(rows) + len(bad), bad=bad)
    if labels is not None:
        how: dict[str, Any] = {"separator": separator, "today": today, "vocab_size": vocab_size}
        found = encode_for_head(rows, tokenizer, labels, report, longest=max_length, truncation=truncation, **how)
        for example in found[0]:
            report.kept += 1
            report.count_source(example.row.source, [example])
            _count(report, [example], -1 if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id))
        return _accounted(rows, list(found[0]), found[1], report)
    encoder = RowEncoder(tokenizer, separator=separator, train_on=train_on, today=today, vocab_size=vocab_size)
    examples, problems = _encode_texts(rows, encoder, max_length, truncation, report)
    return _accounted(rows, examples, problems, report)


def _encode_texts(
    rows: Sequence[Row], encoder: "RowEncoder", max_length: int, truncation: str, report: DataReport
) -> tuple[list[Example], list[str]]:
    """The examples of rows whose text is learned, and what is wrong with the others."""
    examples, problems = list[Example](), list[str]()
    for row, made in encoder.encoded(rows):
        try:
            if isinstance(made, RowProblem):
                raise made
            found = encoder.fitted(row, made, max_length, truncation, report)
        except RowProblem as problem:
            problems.append(f"{row.origin}: {problem}")
            continue
        if not found:
            continue
        report.kept += 1
        report.ignored.update(other_shapes(row))
        report.count_source(row.source, found)
        _count(report, found, encoder.eos)
        examples += found
    return examples, problems


def _accounted(rows: Sequence[Row], examples: list[Example], problems: list[str], report: DataReport) -> Encoded:
    """The examples with their report. Raises DataError: rows are bad and are not to be skipped, or none is left."""
    if problems and not (isinstance(rows, Rows) and rows.skip_bad_rows):
        raise bad_rows("the data", problems, report.rows)
    report.bad += problems
    if not examples:
        raise DataError(f"none of {report.rows} rows has a token to learn", [d["origin"] for d in report.dropped])
    return Encoded(examples, report)


def _count(report: DataReport, examples: Sequence[Example], eos: int) -> None:
    for example in examples:
        report.examples += 1
        report.tokens += example.length
        report.target_tokens += example.target_tokens
        report.longest = max(report.longest, example.length)
        report.ends_with_eos += example.last_id == eos


def prompt_ids(
    row: Row, tokenizer: PreTrainedTokenizerBase, separator: str = "", *, train_on: str = "all",
    today: str | None = None
) -> list[int]:  # fmt: skip
    """The ids that generation starts from: exactly what training has before the last answer of such a row.

    A chat may end with the answer, which is left out, or with the question; a prompt may have no completion. Raises
    DataError: the row cannot be learned as it is written.
    """
    return prompts_ids([row], tokenizer, separator, train_on=train_on, today=today)[0]


def prompts_ids(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, separator: str = "", *, train_on: str = "all",
    today: str | None = None
) -> list[list[int]]:  # fmt: skip
    """`prompt_ids` of many rows."""
    encoder = RowEncoder(tokenizer, separator=separator, train_on=train_on, today=today)
    answered = [row for row in rows if row.completion or row.answered]
    made = {id(row): found for row, found in encoder.encoded(answered)}
    prompts, problems = list[list[int]](), list[str]()
    for row in rows:
        try:
            found = made.get(id(row))
            if isinstance(found, RowProblem):
                raise found
            if found and (learned := found[-1].learned):
                prompts.append(found[-1].ids[: learned[-1][0]])
            else:
                prompts.append(encoder.asked(row))
        except RowProblem as problem:
            problems.append(f"{row.origin}: {problem}")
    if problems:
        raise bad_rows("the prompts", problems, len(rows))
    return prompts


@dataclass(frozen=True, slots=True)
class OneSequence:
    """One sequence of a row before it is cut: ids, the learned stretches among them, and what else is counted."""

    ids: list[int]
    learned: tuple[tuple[int, int], ...]
    rendered: Rendered
    exact: bool


class _Chunk(NamedTuple):
    """Rows, what each is as text, and all of these texts."""

    rows: list[Row]
    rendered: list[list[Rendered] | RowProblem]
    texts: list[Text]


class RowEncoder:
    """From rows to ids, under one tokenizer and one set of conventions; arguments as `encode` has them."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, separator: str = "", train_on: str = "all",
        today: str | None = None, vocab_size: int | None = None,
    ) -> None:  # fmt: skip
        if not isinstance(tokenizer.eos_token_id, int):
            raise ConfigError(
                "the tokenizer has no EOS token, so no model could learn to stop; set tokenizer.eos_token"
            )
        if train_on not in ("all", "last"):
            raise ConfigError(f"train_on = {train_on!r}: expected all or last")
        self.tokenizer, self.separator, self.last_only = tokenizer, separator, train_on == "last"
        self.eos, self.vocab_size = tokenizer.eos_token_id, vocab_size
        if vocab_size is not None and self.eos >= vocab_size:
            raise ConfigError(f"EOS is {_beyond(tokenizer, self.eos, vocab_size)}")
        self.texts = TextTokenizer(tokenizer)
        self._eos_text, self._today = str(tokenizer.eos_token), today

    @cached_property
    def template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self._today)

    def encoded(self, rows: Sequence[Row]) -> Iterator[tuple[Row, list[OneSequence] | RowProblem]]:
        """The sequences of each row, whatever their length; or what is wrong with it."""
        chunks = self._chunks(rows)
        few = len(rows) <= _CHUNK
        tokenized = ((chunk, self._tokens(chunk)) for chunk in chunks) if few else with_work_done(self._tokens, chunks)
        for chunk, found in tokenized:
            tokens = iter(zip(chunk.texts, found, strict=True))
            for row, rendered in zip(chunk.rows, chunk.rendered, strict=True):
                if isinstance(rendered, RowProblem):
                    yield row, rendered
                    continue
                made = [self._sequence(one, *next(tokens)) for one in rendered]
                wrong = next((one for one in made if isinstance(one, RowProblem)), None)
                yield row, wrong or [one for one in made if isinstance(one, OneSequence)]

    def _tokens(self, chunk: "_Chunk") -> list[Tokens | RowProblem]:
        return self.texts.tokenize(chunk.texts)

    def _chunks(self, rows: Sequence[Row]) -> Iterator["_Chunk"]:
        """Rows that are tokenized together, as text: not too many, and no more text than memory has room for."""
        chunk = _Chunk([], [], [])
        characters = 0
        for row in rows:
            rendered = self._rendered(row)
            texts = [] if isinstance(rendered, RowProblem) else [_text(one) for one in rendered]
            chunk.rows.append(row)
            chunk.rendered.append(rendered)
            chunk.texts.extend(texts)
            characters += sum(len(one.text) for one in texts)
            if len(chunk.rows) == _CHUNK or characters > _CHARACTERS:
                yield chunk
                chunk, characters = _Chunk([], [], []), 0
        if chunk.rows:
            yield chunk

    def _rendered(self, row: Row) -> list[Rendered] | RowProblem:
        try:
            if row.tokens is not None:
                raise RowProblem("has tokens + tags, and no text to learn: they are for task_type TOKEN_CLS")
            if row.messages is not None:
                return conversation_sequences(self.template, row, last_only=self.last_only)
            if row.text is not None:
                end = ending_at_eos(row.text, 0, len(row.text), self._eos_text)
                return [Rendered(row.text[:end], ((0, end),))]
            turns = [*row.history, (row.prompt or "", row.completion or "")]
            return [joined(turns, self.separator, self._eos_text, last_only=self.last_only)]
        except RowProblem as problem:
            return problem

    def _sequence(self, rendered: Rendered, text: Text, tokens: Tokens | RowProblem) -> OneSequence | RowProblem:
        if isinstance(tokens, RowProblem):
            return tokens
        place_of = dict(zip(text.places, tokens.places, strict=True))
        ids, learned = tokens.ids, [(place_of[start], place_of[stop]) for start, stop in rendered.learned]
        front = self.texts.front if rendered.front else []
        if front and ids[: len(front)] != front:  # else the text begins with BOS already
            ids = front + ids
            learned = [(start + len(front), stop + len(front)) for start, stop in learned]
        if learned and ids[-1] != self.eos:
            ids = [*ids, self.eos]
            learned[-1] = learned[-1][0], len(ids)
        if self.vocab_size is not None and ids and max(ids) >= self.vocab_size:
            return RowProblem(f"holds {_beyond(self.tokenizer, max(ids), self.vocab_size)}")
        return OneSequence(ids, tuple(span for span in learned if span[0] < span[1]), rendered, tokens.exact)

    def fitted(
        self, row: Row, made: Sequence[OneSequence], longest: int, truncation: str, report: DataReport
    ) -> list[Example]:
        """The examples of a row, none longer than `longest`; what is lost goes into the report."""
        found = list[Example]()
        for one in made:
            ids, learned = one.ids, one.learned
            if row.text is not None:
                parts = [Example(window, 0, row) for window in windows(ids, longest)]
                if len(parts) > 1:
                    report.split.append({"origin": row.origin, "tokens": len(ids), "windows": len(parts)})
                found += [part for part in parts if part.target_tokens > 0]
                continue
            if len(ids) > longest and learned:
                lead = self._lead(ids, learned)
                ids, learned, lost = cut(ids, learned, longest, lead=lead, how=truncation)
                report.lost_beginning += "prompt" in lost
                report.cut.append(
                    {"origin": row.origin, "tokens_lost": len(one.ids) - len(ids), "from": " and ".join(lost)}
                )
            if learned and (example := Example.of_spans(ids, learned, row)).target_tokens > 0:
                found.append(example)
        if not found:
            switched_off = row.messages is not None and not any(one.learned for one in made)
            reason = "none of its turns is to be learned" if switched_off else "its target has no token"
            report.dropped.append({"origin": row.origin, "reason": f"nothing to learn: {reason}"})
            return []
        report.turns += sum(one.rendered.turns for one in made) if row.text is None else 0
        report.thoughts_cut += sum(one.rendered.thoughts_cut for one in made)
        report.unasked += sum(one.rendered.unasked for one in made)
        report.inexact += any(not one.exact for one in made)
        report.unknown += self._unknown is not None and any(self._unknown in one.ids for one in made)
        report.eos_inside += any(self.eos in one.ids[a : b - 1] for one in made for a, b in one.learned)
        return found

    @cached_property
    def _unknown(self) -> int | None:
        """The unknown token, where it means nothing else (GPT-2's is EOS)."""
        unknown: int | None = self.tokenizer.unk_token_id
        return unknown if unknown not in (self.eos, self.tokenizer.pad_token_id) else None

    def _lead(self, ids: Sequence[int], learned: Sequence[tuple[int, int]]) -> int:
        """How many ids of the beginning stay where it is cut: BOS."""
        front = self.texts.front
        bos = ids[0] == self.tokenizer.bos_token_id and ids[0] != self.eos
        put_there = bool(front) and list(ids[: len(front)]) == front
        return int(learned[0][0] > 0 and (bos or put_there))

    def asked(self, row: Row) -> list[int]:
        """The ids of a row without an answer. Raises RowProblem: the chat template refuses it."""
        if row.messages is not None:
            return self.texts.ids(self.template.prompt(row))
        text = row.text if row.text is not None else row.before + self.separator
        ids, front = self.texts.ids(text), self.texts.front
        return ids if front and ids[: len(front)] == front else front + ids


def _text(rendered: Rendered) -> Text:
    places = sorted({place for span in rendered.learned for place in span})
    return Text(rendered.text, tuple(places), frozenset(start for start, _ in rendered.learned))


def _beyond(tokenizer: PreTrainedTokenizerBase, token: int, rows: int) -> str:
    name: Any = tokenizer.convert_ids_to_tokens(token)
    return (
        f"the token {name!r} with id {token}, and the base's embedding has {rows} rows: make it larger with "
        "model.resize_token_embeddings(len(tokenizer)) and save that as the base, or use the base's own tokenizer"
    )
