"""The text of a row while it is being written: whole characters only, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from spectune.inference.answers import decoded

#: what decoders write for bytes that are not yet a character
_HALF = "\N{REPLACEMENT CHARACTER}"
#: ids that are decoded again with each new one, at most and at least: how a decoder writes a token depends on what
#: stands before it
_LONGEST, _CONTEXT = 24, 6
#: tokens of a character at most: what is none after so many is not going to be one
_BYTES = 4
#: tokens that wait for a decoder to come back to what it has written already
_HELD = 8


class WrittenText:
    """Takes a row's tokens one by one and gives its text in pieces that stay as they are.

    All pieces together are `answers.decoded` of all ids, up to the first stop string, which is not among them. Where
    the ids are no text (bytes that make no character) a decoder may change its mind about what it wrote: what was given
    stays then.

    Args:
        stops: texts that end the row; none of them may be empty.

    Attributes:
        found: a stop string is there; further tokens give nothing.
        text: all that was given so far.
        known: with what is held back because it may begin a stop string.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self.found = False
        self.text = ""
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ids: list[int] = []
        # decoding begins at `_from`; all ids before `_read` are whole characters
        self._from, self._read = 0, 0
        self.known, self._before = "", ""  # all text, and that of it which comes from `_from` on

    def add(self, token: int) -> str:
        """The text that can be shown now: no half characters, and nothing that may be the beginning of a stop string.

        A token that is no text (EOS, BOS, padding) gives nothing.
        """
        if self.found:
            return ""
        self._ids.append(token)
        new, held = self._decode(self._from), len(self._ids) - self._read
        sure = new.rstrip(_HALF) if held <= _BYTES else new.removesuffix(_HALF)
        if not sure.startswith(self._before):
            if held <= _HELD:
                return ""
            self._from, self._before = self._read, ""
            sure = new = self._decode(self._from)
        self.known += sure[len(self._before) :]
        self._before = sure
        if sure == new:
            self._read = len(self._ids)
            if self._read - self._from > _LONGEST:
                self._from = self._read - _CONTEXT
                self._before = self._decode(self._from)
        return self._shown(whole=False)

    def end(self) -> str:
        """What is left where the row has ended."""
        if self.found:
            return ""
        whole = self._decode(0)
        if whole.startswith(self.known):
            self.known = whole
        else:
            new = self._decode(self._from)
            self.known += new[len(self._before) :] if new.startswith(self._before) else self._decode(self._read)
        return self._shown(whole=True)

    def _decode(self, start: int) -> str:
        return decoded(self._tokenizer, self._ids[start:])

    def _shown(self, *, whole: bool) -> str:
        """The next piece of the text known so far."""
        known, start = self.known, len(self.text)
        # one that began in what was shown would have been held back
        places = [place for stop in self._stops if (place := known.find(stop, start)) >= 0]
        if places:
            self.found, end = True, min(places)
        else:
            end = len(known) - (0 if whole else self._begun(known[start:]))
        self.text += known[start:end]
        return known[start:end]

    def _begun(self, tail: str) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        sizes = range(min(longest, len(tail)), 0, -1)
        return next((size for size in sizes if any(stop.startswith(tail[-size:]) for stop in self._stops)), 0)
