"""What is learned of an example, between `[[` and `]]`, read from its labels."""

from __future__ import annotations

import itertools

from transformers import PreTrainedTokenizerFast

from spectune.data import Example, collate
from tests.support.tokenizers_zoo import raw_text

UNLEARNED = -100


def stretches(example: Example) -> list[tuple[bool, list[int]]]:
    """The ids in runs, each with whether it is learned."""
    labels = collate([example], 0)["labels"][0].tolist()
    assert len(labels) == len(example.input_ids)
    pairs = zip(labels, example.input_ids, strict=True)
    assert all(label in (UNLEARNED, token) for label, token in zip(labels, example.input_ids, strict=True))
    runs = itertools.groupby(pairs, key=lambda pair: pair[0] != UNLEARNED)
    return [(learned, [token for _, token in run]) for learned, run in runs]


def marked(example: Example, tokenizer: PreTrainedTokenizerFast) -> str:
    """The example as text. The runs are read one by one: a token that lies across a border would show."""
    return "".join(
        f"[[{raw_text(tokenizer, ids)}]]" if learned else raw_text(tokenizer, ids)
        for learned, ids in stretches(example)
    )
