"""How models are asked for the rows that they write, and what is compared: the prompt that training had, and texts as
a model can write them.

Prediction and reference go the same way. The ids up to the first stop token are decoded, without EOS, BOS and padding;
what the chat template puts around an answer (an empty block of thoughts, the end of a turn that is no stop token) is
taken off; so are outer spaces. So a model that has learned its rows by heart matches them exactly, whatever template
and tokenizer do to a text.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from spectune.data import Example, Row, encode, prompts_ids
from spectune.errors import DataError
from spectune.evaluation.references import asked_place, written_of
from spectune.evaluation.task import Task
from spectune.inference import UNLIMITED, decoded, last_examples, shortened, up_to_stop

#: stands for an answer where what is around it is looked for; letters and digits that no tokenizer changes
_ANYTHING = "qzx7vjk9wqx"


@dataclass(frozen=True, slots=True)
class Asked:
    """One row to write."""

    prompt: list[int]
    """What generation starts from."""
    cut: bool
    """Whether the prompt is not whole."""
    references: tuple[str, ...]
    """What is compared with, as a model can write it."""
    before: str
    """What the template puts before an answer, behind the prompt; without outer spaces."""
    behind: str
    """What it puts behind an answer, up to the stop token."""
    tokens: int
    """The longest of the row's target, EOS included, and its references."""

    def text(self, written: str) -> str:
        """What a model wrote, without what belongs to the template."""
        return _without(written, self.before, self.behind)


def ask(
    task: Task, tokenizer: PreTrainedTokenizerBase, examples: Mapping[int, Example], stops: Collection[int], length: int
) -> list[Asked]:
    """Each row that the task writes, in its order.

    Args:
        examples: by the `id` of the row the example that its answer stands in, cut as in training.
        stops: the ids that end a text.
        length: tokens of prompt and answer together.

    Raises:
        DataError: rows that cannot be encoded.
    """
    rows = [task.rows[place] for place in task.to_write]
    if not rows:
        return []
    whole = _whole(rows, tokenizer, task.conventions)
    found = []
    for row, prompt in zip(rows, prompts_ids(rows, tokenizer, **task.conventions), strict=True):
        target = _target(prompt, whole.get(id(row)))
        before, behind = _around(row, target, tokenizer, stops, task.conventions)
        references = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in row.references]
        if not references:
            references = [target or list(tokenizer(written_of(row) or "", add_special_tokens=False)["input_ids"])]
        texts = [decoded(tokenizer, up_to_stop(ids, stops)) for ids in references]
        if not row.references:
            texts = [_without(text, before, behind) for text in texts]
        longest = max(len(ids) for ids in (target, *references))
        begun = _begun(prompt, target, examples.get(id(row)))
        if begun is None:  # room for what is written, but at least half of the length for what it is written from
            begun = shortened(prompt, length - min(longest, length // 2), tokenizer.bos_token_id)
        compared = tuple(text.strip() for text in texts)
        found.append(Asked(begun, begun != prompt, compared, before, behind, longest))
    return found


def _whole(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, conventions: Mapping[str, Any]
) -> dict[int, Example]:
    """By the `id` of the row the example that its answer stands in, uncut."""
    return last_examples(encode(rows, tokenizer, max_length=UNLIMITED, **conventions).examples)


def _target(prompt: list[int], example: Example | None) -> list[int]:
    """What training learns behind the prompt; none where it does not learn the row's last answer."""
    if example is None or example.answer_start < len(prompt) or example.input_ids[: len(prompt)] != prompt:
        return []
    return example.input_ids[len(prompt) :]


def _begun(prompt: list[int], target: list[int], cut: Example | None) -> list[int] | None:
    """The prompt as training has it; None where the row is not learned, or even its target is cut."""
    if cut is None or not target or len(cut.input_ids) <= len(target) or cut.input_ids[-len(target) :] != target:
        return None
    return cut.input_ids[: len(cut.input_ids) - len(target)]


def _around(
    row: Row,
    target: list[int],
    tokenizer: PreTrainedTokenizerBase,
    stops: Collection[int],
    conventions: Mapping[str, Any],
) -> tuple[str, str]:
    """What the template puts before and behind the answer, as the target decodes."""
    answer, place = (written_of(row) or "").strip(), asked_place(row)
    if not row.messages or place is None or not target or not answer or row.messages[place].get("tool_calls"):
        return "", ""
    text = decoded(tokenizer, up_to_stop(target, stops))
    as_written = decoded(tokenizer, tokenizer(answer, add_special_tokens=False)["input_ids"]).strip()
    for content in (answer, as_written):
        if content and text.count(content) == 1:
            before, _, behind = text.partition(content)
            return before.strip(), behind.strip()
    # it is a part of what stands around it, or the template changed it: see what stands around another answer
    changed = {**row.messages[place], "content": _ANYTHING}
    other = replace(row, messages=[*row.messages[:place], changed, *row.messages[place + 1 :]])
    try:
        [prompt] = prompts_ids([other], tokenizer, **conventions)
        ids = _target(prompt, _whole([other], tokenizer, conventions).get(id(other)))
    except DataError:  # a template that takes no other answer
        ids = []
    before, there, behind = decoded(tokenizer, up_to_stop(ids, stops)).partition(_ANYTHING)
    if there and text.strip().startswith(before.strip()):
        return before.strip(), behind.strip()
    return "", _behind_its_end(answer, text)


def _behind_its_end(answer: str, text: str) -> str:
    """What stands in the text behind the last lines of an answer, of which the template has the first ones elsewhere:
    thoughts whose beginning is in the prompt."""
    lines = answer.splitlines(keepends=True)
    for start in range(1, len(lines)):
        end = "".join(lines[start:])
        if end.strip() and text.count(end) == 1:
            return text.partition(end)[2].strip()
    return ""


def _without(text: str, before: str, behind: str) -> str:
    return text.strip().removeprefix(before).removesuffix(behind).strip()
