"""Where in a text its tokens stand: by what the tokenizer says, or by the bytes that each token stands for."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Protocol

from tokenizers import decoders

#: tokens or characters within which one is looked for
_NEAR = 40


class Encoding(Protocol):
    """Token ids of a text.

    Attributes:
        proved: they are known to decode to the text, and so does what stands between any two of them.
    """

    ids: list[int]
    proved: bool

    def token_at(self, place: int) -> int | None:
        """The index of the token that begins at a character; None where a token covers the place, -1 where the
        tokenizer does not say (it leaves characters out, such as spaces)."""
        ...

    def special_before(self, place: int, at: int, specials: frozenset[int]) -> int | None:
        """The index of the last special token before a place, where it is near. `at`: what `token_at` says."""
        ...

    def since(self, token: int, place: int) -> str:
        """The text from the beginning of a token to a character."""
        ...


class BareIds:
    """Ids of a tokenizer that does not say where they stand."""

    __slots__ = ("ids", "text")
    proved = False

    def __init__(self, ids: list[int], text: str) -> None:
        self.ids, self.text = ids, text

    def token_at(self, _place: int) -> int | None:
        return -1

    def special_before(self, _place: int, _at: int, _specials: frozenset[int]) -> int | None:
        return None

    def since(self, token: int, _place: int) -> str:
        raise LookupError(f"no one knows where token {token} begins")


class ByOffsets:
    """By the tokenizer's own offsets, which are asked for one by one: a list of them would take longer than all else
    that is done for a row."""

    __slots__ = ("_encoding", "ids", "text")
    proved = False

    def __init__(self, encoding: Any, text: str) -> None:
        self.ids: list[int] = encoding.ids
        self.text, self._encoding = text, encoding

    def token_at(self, place: int) -> int | None:
        token = self._encoding.char_to_token(place)
        if token is None:
            return -1
        if self._encoding.token_to_chars(token)[0] < place:
            return None
        if token == 0:
            return -1
        before = self._encoding.token_to_chars(token - 1)[1]
        return int(token) if before == place else None if before > place else -1

    def special_before(self, place: int, at: int, specials: frozenset[int]) -> int | None:
        if at < 0:  # what is left out, such as a header's end of line, is short
            behind = map(self._encoding.char_to_token, range(place, min(place + _NEAR, len(self.text))))
            at = next((token for token in behind if token is not None), 0)
        special = _last(self.ids, at, specials)
        return special if special is not None and self._encoding.token_to_chars(special)[1] <= place else None

    def since(self, token: int, place: int) -> str:
        return self.text[self._encoding.token_to_chars(token)[0] : place]


class ByBytes:
    """By the bytes of each token, one after the other: those of a byte-level tokenizer, where they give the text."""

    __slots__ = ("_data", "_ends", "_plain", "ids", "text")
    proved = True

    def __init__(self, ids: list[int], text: str, data: bytes, ends: list[int]) -> None:
        self.ids, self.text, self._data, self._ends = ids, text, data, ends
        self._plain = len(data) == len(text)

    def _byte(self, place: int) -> int:
        return place if self._plain else len(self.text[:place].encode())

    def token_at(self, place: int) -> int | None:
        byte = self._byte(place)
        before = bisect_left(self._ends, byte)
        return before + 1 if self._ends[before] == byte else None

    def special_before(self, _place: int, at: int, specials: frozenset[int]) -> int | None:
        return _last(self.ids, at, specials)

    def since(self, token: int, place: int) -> str:
        return self._data[self._ends[token - 1] if token else 0 : self._byte(place)].decode()


class TokenBytes(dict[int, bytes]):
    """The bytes of text that each id of a byte-level tokenizer stands for, found as they are asked for."""

    def __init__(self, backend: Any) -> None:
        super().__init__()
        self._backend = backend
        # GPT-2's letters for bytes: those that can be printed stand for themselves, the others for what comes behind
        printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printed]
        self._bytes = {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(others)}

    @classmethod
    def of(cls, backend: Any) -> "TokenBytes | None":
        """None: the tokenizer decodes in another way."""
        return cls(backend) if isinstance(backend.decoder, decoders.ByteLevel) else None

    def __missing__(self, token: int) -> bytes:
        written = str(self._backend.id_to_token(token))
        # a token that was added as text is that text, unless it could be read as letters for bytes
        bytewise = all(letter in self._bytes for letter in written)
        found = bytes(map(self._bytes.__getitem__, written)) if bytewise else written.encode()
        if self._backend.decode([token], skip_special_tokens=False) != found.decode(errors="replace"):
            found = b""  # another way of decoding after all: no text will come of it
        self[token] = found
        return found

    def placed(self, ids: list[int], text: str) -> ByBytes | None:
        """The ids with their places, where they decode to the text: such a decoder puts a token's bytes behind
        another's, so what stands between any two of them is that part of the text, too."""
        parts, data = list(map(self.__getitem__, ids)), text.encode()
        return ByBytes(ids, text, data, list(accumulate(map(len, parts)))) if ids and b"".join(parts) == data else None


def _last(ids: Sequence[int], token: int, specials: frozenset[int]) -> int | None:
    for at in range(token - 1, max(token - _NEAR, -1), -1):
        if ids[at] in specials:
            return at
    return None
