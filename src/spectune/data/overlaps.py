"""Rows that stand twice: within one part of the data, or in two parts that have to be apart.

Two rows are equal where the text that is asked and the text that is learned are: in Unicode's form NFC, outer white
space aside. Nothing else of a row counts, and no tokenizer has a part in it.
"""

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from spectune.data.shapes import Row

#: pairs of origins that are named of each kind
NAMED = 5


class Twins(NamedTuple):
    """Two rows, by their origins; `earlier` may be of another part."""

    row: str
    earlier: str


@dataclass
class Repeats:
    """Rows that stand somewhere before.

    Attributes:
        rows: how many rows have an equal one before them.
        prompts: how many of the others have an equal prompt before them, which is answered otherwise there.
        equal_rows, equal_prompts: the first few of each.
    """

    rows: int = 0
    prompts: int = 0
    equal_rows: list[Twins] = field(default_factory=list)
    equal_prompts: list[Twins] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows, "prompts": self.prompts,
            "equal_rows": [list(pair) for pair in self.equal_rows],
            "equal_prompts": [list(pair) for pair in self.equal_prompts],
        }  # fmt: skip


class Seen:
    """The rows of one part of the data, found again by what they ask and answer.

    Of each row two numbers are kept: a million rows are read in seconds.

    Attributes:
        repeats: rows that stand twice in this part.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows
        self._places = dict[int, int](), dict[int, int]()
        self.repeats = Repeats()
        for place, row in enumerate(rows):
            asked, learned = _texts(row)
            self._count(self.repeats, row, asked, learned)
            whole, prompts = self._places
            whole.setdefault(hash((asked, learned)), place)
            prompts.setdefault(hash(asked), place)

    def repeated(self, rows: Sequence[Row]) -> Repeats:
        """Which rows of another part stand in this one."""
        found = Repeats()
        for row in rows:
            self._count(found, row, *_texts(row))
        return found

    def _count(self, repeats: Repeats, row: Row, asked: str, learned: str) -> None:
        whole, prompts = self._places
        if (place := whole.get(hash((asked, learned)))) is not None and _texts(self._rows[place]) == (asked, learned):
            repeats.rows += 1
            named = repeats.equal_rows
        elif asked and (place := prompts.get(hash(asked))) is not None and _texts(self._rows[place])[0] == asked:
            repeats.prompts += 1
            named = repeats.equal_prompts
        else:
            return
        if len(named) < NAMED:
            named.append(Twins(row.origin, self._rows[place].origin))


def _texts(row: Row) -> tuple[str, str]:
    """What is asked, empty where nothing is, and what is learned."""
    if row.messages is not None:
        before = [*map(_message, row.asked), _beside(row)]
        return "\n".join(part for part in before if part), _message(row.messages[-1]) if row.answered else ""
    if row.text is not None and row.label is not None:  # for a head: the text asks, the label answers
        return _plain(row.text), str(row.label)
    if row.text is not None:
        return "", _plain(row.text)
    if row.tokens is not None:
        return _plain(" ".join(row.tokens)), json.dumps(row.tags)
    return _plain(row.before), _plain(row.completion or "")


def _message(message: dict[str, Any]) -> str:
    more = {key: value for key, value in message.items() if key not in ("role", "content")}
    written = json.dumps(more, sort_keys=True, default=str) if more else ""
    return f"{message['role']}: {_plain(message['content'])}{written}"


def _beside(row: Row) -> str:
    """What the chat template gets beside the messages."""
    given = {"tools": row.tools, "documents": row.documents, "kwargs": row.template_kwargs}
    return json.dumps(given, sort_keys=True, default=str) if any(given.values()) else ""


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text.strip())
