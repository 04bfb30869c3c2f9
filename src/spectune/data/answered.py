"""A row's own answer, and which of its choices that is."""

import unicodedata

from spectune.data.shapes import Row


def answer_of(row: Row) -> str | None:
    """The row's own answer, word for word, of a chat the content of its last message; None where it has none, as a
    tool call without content has not."""
    if row.messages:
        content = row.messages[-1].get("content") if row.answered else None
        return content if isinstance(content, str) else None
    return row.completion


def answered_choice(row: Row) -> str | None:
    """The choice that is the row's own answer, outer white space and Unicode's composition aside; None where none is,
    or more than one."""
    answer = answer_of(row)
    if answer is None or answer in row.choices:
        return answer
    alike = [choice for choice in row.choices if bare(choice) == bare(answer)]
    return alike[0] if len(alike) == 1 else None


def bare(text: str) -> str:
    """A text without outer white space, in Unicode's form NFC."""
    return unicodedata.normalize("NFC", text.strip())
