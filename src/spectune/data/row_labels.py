"""The label of a row, or the tags of its words, and what is wrong with those of many."""

from collections import Counter
from collections.abc import Sequence

from spectune.data.answered import answer_of, answered_choice
from spectune.data.problem import RowProblem
from spectune.data.shapes import Row

#: what a model is trained for, by the names that PEFT has for it
CAUSAL_LM, SEQ_CLS, TOKEN_CLS = "CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS"
TASK_TYPES = (CAUSAL_LM, SEQ_CLS, TOKEN_CLS)
Label = str | int | float
_EXPECTED = {
    SEQ_CLS: "expected text + label, or prompt + completion with the class as the answer",
    TOKEN_CLS: "expected tokens + tags, lists of the same length",
}


def task_type_of(rows: Sequence[Row]) -> str:
    """What rows are for where nobody says: `tokens` + `tags` for TOKEN_CLS, `text` + `label` for SEQ_CLS, all others
    for CAUSAL_LM."""
    if any(row.tokens is not None for row in rows):
        return TOKEN_CLS
    texts = rows and all(row.text is not None for row in rows)
    return SEQ_CLS if texts and any(row.label is not None for row in rows) else CAUSAL_LM


def label_problems(rows: Sequence[Row], task_type: str) -> dict[int, str]:
    """By place the rows that have no label, or one of another kind (text, a number) than most; `file:line` each."""
    labels, problems = dict[int, list[Label]](), dict[int, str]()
    for place, row in enumerate(rows):
        try:
            labels[place] = labels_of(row, task_type)
        except RowProblem as problem:
            problems[place] = f"{row.origin}: {problem}"
    kinds = Counter(_kind(label) for of_row in labels.values() for label in of_row)
    text = kinds["text"] >= kinds["a number"]
    expected = f"expected {'text' if text else 'a number'}, as in most rows"
    for place, of_row in labels.items():
        if bad := [label for label in of_row if (_kind(label) == "text") is not text]:
            problems[place] = f"{rows[place].origin}: the label {bad[0]!r} is {_kind(bad[0])}; {expected}"
    return dict(sorted(problems.items()))


def labels_of(row: Row, task_type: str) -> list[Label]:
    """The label of a row, or the tags of its words. Raises RowProblem: it has none."""
    if task_type == TOKEN_CLS:
        if row.tags is None:
            raise RowProblem(f"has no tags ({row.shape}); {_EXPECTED[task_type]}")
        return list(row.tags)
    found = label_of(row)
    if found is None:
        raise RowProblem(f"has no label ({row.shape}); {_EXPECTED[task_type]}")
    return [found]


def label_of(row: Row) -> Label | None:
    """What a text is to be classified as: of rows with choices the right one, of prompts and chats with an answer and
    no label that answer without outer spaces; else the label."""
    if row.choices:
        return row.label if row.label is not None else answered_choice(row)
    if row.prompt is not None or (row.messages and row.label is None):
        return (answer_of(row) or "").strip() or None
    return row.label


def _kind(label: Label) -> str:
    return "text" if isinstance(label, str) else "a number"
