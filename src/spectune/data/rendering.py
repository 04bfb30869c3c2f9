"""A row as text, and which stretches of it are learned: what is decided before there are tokens."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rendered:
    """One sequence as text.

    Attributes:
        text: ends with the last learned character; empty where a row has nothing to learn.
        learned: `(start, stop)` of each learned stretch, in characters, ascending, none of them touching another.
        turns: how many assistant turns that is.
        thoughts_cut: earlier turns whose reasoning the chat template leaves out.
        unasked: turns before the first question, which the chat template cannot ask for.
        front: the tokenizer puts in front what it puts in front of a text (BOS); not where a chat template does that.
    """

    text: str
    learned: tuple[tuple[int, int], ...]
    turns: int = 1
    thoughts_cut: int = 0
    unasked: int = 0
    front: bool = True


def ending_at_eos(text: str, start: int, stop: int, eos: str) -> int:
    """Where a learned stretch ends: behind its EOS, where white space alone stands behind that; else at `stop`.

    Several EOS at the end count as one: the model learns to stop once.
    """
    end = start + len(text[start:stop].rstrip())
    if not eos or not text.endswith(eos, start, end):
        return stop
    while text.endswith(eos, start, end - len(eos)):
        end -= len(eos)
    return end


def joined(turns: Sequence[tuple[str, str]], separator: str, eos: str, *, last_only: bool) -> Rendered:
    """Prompts and completions one after the other, each completion learned.

    Args:
        turns: prompt and completion of each turn; between two turns stand EOS and an empty line.
        last_only: the last completion alone is learned.
    """
    text, learned = "", []
    for number, (prompt, completion) in enumerate(turns):
        last = number == len(turns) - 1
        start = len(text) + len(prompt) + len(separator)
        text += prompt + separator + completion
        text = text[: ending_at_eos(text, start, len(text), eos)]
        text += "" if last or text.endswith(eos) else eos
        if last or not last_only:
            learned.append((start, len(text)))
        text += "" if last else "\n\n"
    return Rendered(text, tuple(learned), len(learned))
