"""One part of the data, read and encoded as training does it, and what there is to say of it."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from spectune.data.encoding import Encoded, encode
from spectune.data.example import Example
from spectune.data.head_labels import Labels, label_of
from spectune.data.labelled import LabelledExample
from spectune.data.loading import Rows, bad_rows
from spectune.data.marked_text import marked, stretches
from spectune.data.overlaps import Seen
from spectune.errors import DataError

#: what a report's `from` says, in words of the sequence
_LOST = {"prompt": "beginning", "prompt and end": "beginning and end"}


@dataclass
class Checked:
    """A part of the data.

    Attributes:
        name: train, valid or test.
        source: where the rows are from.
        rows: what could be read, whether it could be encoded or not.
        labels: what a head learns of them; None: their text is learned.
    """

    name: str
    source: str
    rows: Rows
    encoded: Encoded
    max_length: int
    eos: int
    labels: Labels | None = None

    @cached_property
    def seen(self) -> Seen:
        return Seen(self.rows)

    @property
    def shapes(self) -> dict[str, int]:
        """How many rows each shape has, as they come."""
        return dict(Counter(row.shape for row in self.rows))

    @property
    def ending(self) -> dict[str, int]:
        """`rows` that have something to learn, and how many of them end `with_eos`."""
        last = {id(example.row): example.last_id for example in self.encoded.examples}  # the later ones count
        ends = Counter(token == self.eos for token in last.values())
        return {"rows": len(last), "with_eos": ends[True]}

    @property
    def truncations(self) -> dict[str, dict[str, int]]:
        """By what they lost, `rows` that were too long, and how many `tokens` of them."""
        found = defaultdict[str, Counter[str]](Counter)
        for entry in self.encoded.report.cut:
            lost = str(entry["from"])
            found[_LOST.get(lost, lost)].update(rows=1, tokens=int(entry["tokens_lost"]))
        return {lost: dict(counts) for lost, counts in found.items()}

    @property
    def dropped(self) -> dict[str, list[str]]:
        """The origins of rows that carry no learned token, by the reason."""
        found = defaultdict[str, list[str]](list)
        for entry in self.encoded.report.dropped:
            found[str(entry["reason"]).removeprefix("nothing to learn: ")].append(str(entry["origin"]))
        return dict(found)

    def to_dict(self) -> dict[str, Any]:
        return {
            "data": self.source, "report": self.encoded.report.to_dict(), "max_length": self.max_length,
            "shapes": self.shapes, "truncations": self.truncations, "ending": self.ending,
            "duplicates": self.seen.repeats.to_dict(),
            **({} if self.labels is None else {"task_type": self.labels.task_type, "classes": list(self.labels.names)}),
        }  # fmt: skip

    def shown(self, count: int) -> list["Shown"]:
        """The first `count` rows of each shape: all sequences of a chat, the first window of a long text."""
        found = dict[str, list[list[Example]]]()
        for _, group in itertools.groupby(self.encoded.examples, key=lambda example: id(example.row)):
            examples = list(group)
            of_shape = found.setdefault(examples[0].row.shape, [])
            if len(of_shape) < count:
                of_shape.append(examples)
        return [
            Shown(example, number, len(examples))
            for rows in found.values()
            for examples in rows
            for number, example in enumerate(examples, start=1)
            if number == 1 or example.row.text is None
        ]


@dataclass(frozen=True)
class Shown:
    """A sequence that is shown: the `number`-th of its row's `count`."""

    example: Example
    number: int
    count: int

    def to_dict(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        example, row = self.example, self.example.row
        if isinstance(example, LabelledExample):
            label = list(row.tags or ()) if example.label is None else label_of(row)
            return {
                "origin": row.origin, "shape": row.shape, "tokens": example.length, "label": label,
                "text": tokenizer.decode(example.input_ids),
            }  # fmt: skip
        ids, cut, whole = example.input_ids, example.prompt_length, stretches(example, tokenizer, whole=True)
        return {
            "origin": row.origin, "shape": row.shape, "sequence": self.number, "sequences": self.count,
            "tokens": example.length, "target_tokens": example.target_tokens, "turns": len(example.targets),
            "prompt": tokenizer.decode(ids[:cut]), "target": tokenizer.decode(ids[cut:]),
            "learned": [piece.text for piece in whole if piece.learned], "text": marked(whole),
            "ends_with_eos": example.last_id == tokenizer.eos_token_id,
        }  # fmt: skip


def check(
    name: str, source: str, rows: Rows, tokenizer: PreTrainedTokenizerBase, *, skip_bad_rows: bool, max_length: int,
    how: Mapping[str, Any],
) -> Checked:  # fmt: skip
    """Encode one part of the data.

    Args:
        rows: read with `skip_bad_rows`, so that what can't be read and what can't be encoded is named together.
        how: further arguments of `encode`.

    Raises:
        DataError: rows are bad and are not to be skipped (all at once), or none has anything to learn.
    """
    try:
        encoded = encode(rows, tokenizer, max_length=max_length, **how)
    except DataError:  # none of the rows is left: what is wrong with them is said where they are not to be skipped
        try:
            encode(Rows(list(rows), []), tokenizer, max_length=max_length, **how)
        except DataError as error:
            raise DataError(str(error), rows.skipped) from error
        raise
    if encoded.report.bad and not skip_bad_rows:
        raise bad_rows(source, encoded.report.bad, encoded.report.rows)
    eos = -1 if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)
    return Checked(name, source, rows, encoded, max_length, eos, how.get("labels"))
