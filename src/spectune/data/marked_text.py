"""What is learned of a sequence, as text: read back from its ids, so that it is what the model sees."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from spectune.data.example import Example

#: what is not learned is shortened where it is longer; so many tokens of each end stay
_LONG, _ENDS = 400, 100
_HALF_A_CHARACTER = "\ufffd"


class Stretch(NamedTuple):
    """A piece of a sequence's text, and whether the loss is taken on its tokens."""

    text: str
    learned: bool


def stretches(example: Example, tokenizer: PreTrainedTokenizerBase, *, whole: bool = False) -> list[Stretch]:
    """A sequence as text, special tokens included, in pieces.

    A sequence's first token is never learned: nothing stands before it.

    Args:
        whole: show all; else the middle of a long stretch that is not learned is `…(1,234 tokens)…`.
    """
    ids, spans, at = example.input_ids, list[tuple[int, int, bool]](), 0
    for start, stop in example.targets:
        first = max(start, 1)
        spans += [(at, first, False), (first, stop, True)]
        at = stop
    found, text = list[Stretch](), ""
    for start, stop, learned in spans:
        if start == stop:
            continue
        # some decoders drop the space that begins a text: what a stretch adds to the text before it has all of its own
        longer = _decoded(tokenizer, ids[:stop])
        added = longer[len(text) :] if longer.startswith(text) else _decoded(tokenizer, ids[start:stop])
        text = longer
        short = not learned and not whole and stop - start > _LONG
        found.append(Stretch(_shortened(tokenizer, ids[start:stop], added) if short else added, learned))
    return found


def marked(pieces: Iterable[Stretch]) -> str:
    """The text with `[[` and `]]` around each learned stretch."""
    return "".join(f"[[{piece.text}]]" if piece.learned else piece.text for piece in pieces)


def _shortened(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str) -> str:
    head, tail = list(ids[:_ENDS]), list(ids[-_ENDS:])
    for _ in range(3):  # no character is cut in two: it has at most four tokens
        if _decoded(tokenizer, head).endswith(_HALF_A_CHARACTER):
            head.pop()
        if _decoded(tokenizer, tail).startswith(_HALF_A_CHARACTER):
            tail.pop(0)
    begins, ends = _decoded(tokenizer, head), _decoded(tokenizer, tail)
    if text.startswith(f" {begins}"):
        begins = f" {begins}"
    return f"{begins}…({len(ids) - len(head) - len(tail):,} tokens)…{ends}"


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
