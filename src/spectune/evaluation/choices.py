"""Which choice of a row is right; and classification that does not say so: rows without choices whose answers are a few
short texts over and over."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

from spectune.data import Row
from spectune.errors import DataError
from spectune.evaluation.references import answer_of, has_prompt
from spectune.inference import answered_choice

#: of such a task: distinct answers at most, times that each comes at least, characters of an answer at most
MOST_CHOICES, FEWEST_ROWS, LONGEST_CHOICE = 20, 3, 60


def common_answers(train_rows: Sequence[Row]) -> tuple[str, ...]:
    """The distinct answers of the training rows where they are labels, else ().

    They are where there are 2 to 20 of them, of at most 60 characters, each in at least 3 training rows, all on
    prompts, and no row has choices. Word for word, outer spaces included; in the order of the alphabet.
    """
    if not train_rows or any(row.choices for row in train_rows):
        return ()
    answers: Counter[str] = Counter()
    for row in train_rows:
        answer = answer_of(row)
        if answer is None or len(answer) > LONGEST_CHOICE or not has_prompt(row) or len(answers) > MOST_CHOICES:
            return ()
        answers[answer] += 1
    labels = 2 <= len(answers) <= MOST_CHOICES and min(answers.values()) >= FEWEST_ROWS
    return tuple(sorted(answers)) if labels else ()


def inferred_choices(answers: Sequence[str], judged_rows: Sequence[Row]) -> tuple[str, ...]:
    """The training rows' answers (`common_answers`) as choices of the judged rows, if every one of these has a prompt,
    no list of references, and one of them as its answer; else ()."""
    known = set(answers)
    fit = all(has_prompt(row) and len(row.references) < 2 and answer_of(row) in known for row in judged_rows)
    return tuple(answers) if fit else ()


def labelled(rows: Sequence[Row]) -> list[Row]:
    """The rows, with the label of those whose answer alone says which of their choices is right.

    Raises:
        DataError: rows with an answer that is none of their choices, or another one than their label: what is learned
            is not what is asked. All of them at once.
    """
    found, problems = list[Row](), list[str]()
    for row in rows:
        if row.choices and has_prompt(row) and (answer := answer_of(row)):
            right = answered_choice(row)
            if right is None:
                expected = f"expected one of {', '.join(map(repr, row.choices))}, outer white space aside"
                problems.append(f"{row.origin}: its answer is {_short(answer)}; {expected}")
            elif row.label is not None and right != row.label:
                problems.append(f"{row.origin}: its answer is {_short(answer)} and its label {row.label!r}")
            else:
                row = dataclasses.replace(row, label=right)
        found.append(row)
    if problems:
        raise DataError(
            f"{len(problems)} of {len(rows)} rows have choices and are answered with something else, so that accuracy "
            "would not measure what is learned. Make the answer one of the choices (and the label the same one), or "
            "name other metrics than accuracy.",
            problems,
        )
    return found


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "...")
