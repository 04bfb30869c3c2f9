"""Classification that does not say so: rows without choices whose answers are a few short texts over and over."""

from collections import Counter
from collections.abc import Sequence

from spectune.data import Row
from spectune.evaluation.references import answer_of, has_prompt

#: of such a task: distinct answers at most, times that each comes at least, characters of an answer at most
MOST_CHOICES, FEWEST_ROWS, LONGEST_CHOICE = 20, 3, 60


def inferred_choices(train_rows: Sequence[Row], judged_rows: Sequence[Row]) -> tuple[str, ...]:
    """The distinct answers of the training rows where they are labels, else ().

    They are where there are 2 to 20 of them, of at most 60 characters, each in at least 3 training rows, all on
    prompts; and where every judged row has a prompt, no list of references, and one of them as its answer.
    Word for word, outer spaces included; in the order of the alphabet.
    """
    if not train_rows or any(row.choices for row in train_rows):
        return ()
    answers: Counter[str] = Counter()
    for row in train_rows:
        answer = answer_of(row)
        if answer is None or len(answer) > LONGEST_CHOICE or not has_prompt(row) or len(answers) > MOST_CHOICES:
            return ()
        answers[answer] += 1
    if not 2 <= len(answers) <= MOST_CHOICES or min(answers.values()) < FEWEST_ROWS:
        return ()
    fit = all(has_prompt(row) and len(row.references) < 2 and answer_of(row) in answers for row in judged_rows)
    return tuple(sorted(answers)) if fit else ()
