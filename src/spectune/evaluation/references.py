"""The prompt of a row, its own answer, and the references that a written answer is compared with."""

from spectune.data import Row


def has_prompt(row: Row) -> bool:
    """Whether the row has a prompt to answer; a `text` row has none."""
    return bool(row.prompt) or bool(row.messages)


def prompt_of(row: Row) -> str:
    """The prompt as a reader sees it; of a chat the messages before the answer, one a line."""
    if row.messages:
        return "\n".join(f"{message['role']}: {message['content']}" for message in row.asked)
    return row.prompt if row.prompt is not None else row.text or ""


def answer_of(row: Row) -> str | None:
    """The row's own answer, word for word; None where it has none."""
    if row.messages:
        return str(row.messages[-1]["content"]) if row.answered else None
    return row.completion


def references_of(row: Row) -> tuple[str, ...]:
    """What a written completion is compared with: the row's references, else its own answer without outer spaces."""
    answer = answer_of(row)
    return row.references or ((answer.strip(),) if answer else ())
