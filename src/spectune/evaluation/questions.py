"""What a task asks of models, as token ids: made once, however many models are judged."""

from collections.abc import Collection

from transformers import PreTrainedTokenizerBase

from spectune.data import Encoded, LabelledExample, encode
from spectune.evaluation.asked import Asked, ask
from spectune.evaluation.task import Task
from spectune.inference import last_examples


class Questions:
    """The rows of a task, encoded as in training, and the prompts of those that are written.

    Args:
        vocab_size: rows of the base's embedding.

    Raises:
        DataError: rows that cannot be encoded.
    """

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None) -> None:
        self.task, self.tokenizer, self.vocab_size = task, tokenizer, vocab_size
        how = {**task.conventions, "max_length": task.max_length, "truncation": task.truncation}
        self.encoded: Encoded = encode(task.rows, tokenizer, vocab_size=vocab_size, labels=task.labels, **how)
        self._asked: dict[tuple[frozenset[int], int], list[Asked]] = {}

    @property
    def labelled(self) -> list[LabelledExample]:
        """The texts of a head's task."""
        return [example for example in self.encoded.examples if isinstance(example, LabelledExample)]

    def asked(self, stops: Collection[int], length: int) -> list[Asked]:
        """See `ask`; kept for models with the same stop tokens and as much room."""
        key = frozenset(stops), length
        if key not in self._asked:
            self._asked[key] = ask(self.task, self.tokenizer, last_examples(self.encoded.examples), stops, length)
        return self._asked[key]
