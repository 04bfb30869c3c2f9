"""Where a row's answer is among its ids, and what of written ids is text."""

import itertools
from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase

from spectune.data import Example
from spectune.data.answered import answer_of

__all__ = ["UNLIMITED", "answer_of", "decoded", "last_examples", "shortened", "up_to_stop"]

#: tokens that no row reaches: to encode rows uncut
UNLIMITED = 2**31


def last_examples(examples: Sequence[Example]) -> dict[int, Example]:
    """By the `id` of its row the last example of each: the one that the answer stands in."""
    return {id(example.row): example for example in examples}


def up_to_stop(ids: Sequence[int], stops: Collection[int]) -> list[int]:
    """What stands before the first stop token."""
    return list(itertools.takewhile(lambda token: token not in stops, ids))


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of written ids. EOS, BOS and padding are none; other special tokens are, for an answer may be one."""
    frame = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    return str(tokenizer.decode([token for token in ids if token not in frame], skip_special_tokens=False))


def shortened(ids: Sequence[int], length: int, bos_token_id: int | None) -> list[int]:
    """The end of a prompt, of at most `length` tokens (at least 1); a BOS at its beginning stays there."""
    if len(ids) <= length:
        return list(ids)
    if length > 1 and bos_token_id is not None and ids[0] == bos_token_id:
        return [ids[0], *ids[len(ids) - length + 1 :]]
    return list(ids[len(ids) - length :])
