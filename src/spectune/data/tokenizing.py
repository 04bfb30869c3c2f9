"""Texts as token ids, with the places of given characters among them.

A text is tokenized whole, as every engine does it. Where a learned stretch begins, the ids before it must be those of
the text before it by itself, which is all that generation has: if the tokenizer merges across that place, the parts are
tokenized apart.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from spectune.data.problem import RowProblem
from spectune.data.token_places import BareIds, ByOffsets, Encoding, TokenBytes

#: texts that are put before the second part of a text that is tokenized in two, so that a tokenizer which treats a
#: text's beginning otherwise (a space put in front, no `##`) takes the part for what it is; the first that works
_SENTINELS = ("", "\n", ":", "a", ".", "_", "0", "x", "-", "e", "'")
#: ids of short texts that come again in every row, such as a chat's headers, are kept
_SHORT, _KEPT = 200, 10_000


class Text(NamedTuple):
    """A text to tokenize. `places`: characters whose first token is looked for, ascending, its length for the end;
    `starts`: those of them at which generation may begin."""

    text: str
    places: tuple[int, ...]
    starts: frozenset[int]


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of a text; `places[i]` is the index of the first id of what stands at the i-th place.

    Attributes:
        exact: decoding the ids gives the text.
    """

    ids: list[int]
    places: tuple[int, ...]
    exact: bool = False


class TextTokenizer:
    """A tokenizer as training and generation use it: nothing cut, nothing padded, special tokens in a text are special.

    Attributes:
        front: ids that the tokenizer puts in front of a text by itself (BOS).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        with_specials = list(tokenizer("a")["input_ids"])
        # the call also takes back what a tokenizer.json says of cutting and padding
        bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        fits = (i for i in range(len(with_specials)) if with_specials[i : i + len(bare)] == bare)
        self.front: list[int] = with_specials[: next(fits, 0)]
        self._specials = frozenset({*map(int, tokenizer.all_special_ids), *map(int, tokenizer.added_tokens_decoder)})
        backend = getattr(tokenizer, "backend_tokenizer", None)
        fast = backend is not None and backend.encode("a", add_special_tokens=False).ids == bare
        self._backend: Any = backend if fast else None
        self._bytes = TokenBytes.of(backend) if fast and self.decode(bare) == "a" else None
        self._kept: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """The ids of one text, without what the tokenizer puts in front."""
        return self._ids([text])[0]

    def tokenize(self, texts: Sequence[Text]) -> list[Tokens | RowProblem]:
        """The ids of each text, without what the tokenizer puts in front of one; a problem where no ids have all of the
        text's places between two of them, or where they would not decode to it."""
        encodings = self._encode([text.text for text in texts])
        located = [self._located(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]
        ids_of = self._ids_of({at.text for places in located for at in places if isinstance(at, _Prefix)})
        found: list[Tokens | RowProblem] = []
        for text, encoding, places in zip(texts, encodings, located, strict=True):
            ends = [at.end(encoding.ids, ids_of) if isinstance(at, _Prefix) else at for at in places]
            if None in ends:
                covered = [place for place, end in zip(text.places, ends, strict=True) if end is None]
                found.append(self._apart(text, encoding.ids, covered))
            else:
                found.append(Tokens(encoding.ids, tuple(end for end in ends if end is not None), encoding.proved))
        return self._proved(texts, found)

    def _located(self, text: Text, encoding: Encoding) -> list["int | _Prefix | None"]:
        """The index of the first token of each place; None where a token covers it, and what is to be compared where
        that decides."""
        found: list[int | _Prefix | None] = []
        for place in text.places:
            if place in (0, len(text.text)):
                found.append(len(encoding.ids) if place else 0)
                continue
            at = encoding.token_at(place)
            if at is not None and (at < 0 or place in text.starts):
                found.append(self._prefix(encoding, text.text, place, at))
            else:
                found.append(at)
        return found

    def _prefix(self, encoding: Encoding, text: str, place: int, at: int) -> "_Prefix":
        """What stands before a place, from the last special token on: tokenizers cut a text at these first, so what
        stands before one has no part in the ids behind it."""
        special = encoding.special_before(place, at, self._specials)
        before = text[:place] if special is None else encoding.since(special, place)
        return _Prefix(special or 0, before, at if at >= 0 else None)

    def _ids_of(self, texts: set[str]) -> dict[str, list[int]]:
        new = [text for text in texts if text not in self._kept]
        found = dict(zip(new, self._ids(new), strict=True))
        if len(self._kept) < _KEPT:
            self._kept |= {text: ids for text, ids in found.items() if len(text) <= _SHORT}
        return {text: found[text] if text in found else self._kept[text] for text in texts}

    def _apart(self, text: Text, whole: list[int], covered: Sequence[int]) -> Tokens | RowProblem:
        """The ids of a text that is cut at those places that a token would cover.

        All of these are cut at first, and then what is covered in a piece alone: one cut after the other would take the
        time of the whole text for each of a conversation's turns.
        """
        exact = self.decode(whole) == text.text
        cuts = [0, *covered, len(text.text)]
        while True:
            ids, places, more = list[int](), dict[int, int](), list[int]()
            for begin, end in itertools.pairwise(cuts):
                inside = [place for place in text.places if begin <= place <= end]
                piece = self._piece(text, begin, end, inside, ids, exact)
                if piece is None:
                    return _no_ids(text.text, begin, end)
                found, located = piece
                more += [place for place, at in zip(inside, located, strict=True) if at is None]
                places |= {p: len(ids) + at for p, at in zip(inside, located, strict=True) if at is not None}
                ids += found
            if more and more[0] in cuts:
                return _no_ids(text.text, more[0], len(text.text))
            if not more:
                return Tokens(ids, tuple(places[place] for place in text.places), False)
            cuts = sorted({*cuts, *more})

    def _piece(
        self, text: Text, begin: int, end: int, inside: Sequence[int], before: list[int], exact: bool
    ) -> tuple[list[int], list[int | None]] | None:
        """Ids of a piece of a text behind ids of what stands before it, and the places inside of it; None where there
        are none that decode to the text."""
        written = text.text[begin:end]
        wanted = text.text[:end] if exact else self.decode(self.ids(text.text[:end]))
        for sentinel in _SENTINELS if begin else ("",):
            shift, lead = len(sentinel), self._ids_of({sentinel})[sentinel]
            part = Text(
                sentinel + written,
                tuple(place - begin + shift for place in inside),
                frozenset(place - begin for place in text.starts if not begin and 0 < place < end),
            )
            encoding = self._encode([part.text])[0]
            ids = encoding.ids[len(lead) :]
            if encoding.ids[: len(lead)] != lead:
                continue
            # bytes that are proved to be the piece's are so behind any others
            if not (exact and encoding.proved) and self.decode(before + ids) != wanted:
                continue
            located = self._located(part, encoding)
            ids_of = self._ids_of({at.text for at in located if isinstance(at, _Prefix)})
            ends = [at.end(encoding.ids, ids_of) if isinstance(at, _Prefix) else at for at in located]
            at_edges = {begin: 0, end: len(ids)}
            return ids, [
                at_edges[place] if place in at_edges else None if at is None else at - len(lead)
                for place, at in zip(inside, ends, strict=True)
            ]
        return None

    def _proved(self, texts: Sequence[Text], found: list[Tokens | RowProblem]) -> list[Tokens | RowProblem]:
        """Each with whether its ids decode to its text; where they do, so must each stretch between two places."""
        members = [
            (at, text, tokens)
            for at, (text, tokens) in enumerate(zip(texts, found, strict=True))
            if isinstance(tokens, Tokens) and not tokens.exact
        ]
        decoded = self._decode_all([tokens.ids for *_, tokens in members])
        exact = [one for one, said in zip(members, decoded, strict=True) if said == one[1].text]
        for at, _, tokens in exact:
            found[at] = Tokens(tokens.ids, tokens.places, exact=True)
        spans = [
            (at, text.text[a:b], tokens.ids[i:j])
            for at, text, tokens in exact
            for a, b, i, j in zip(text.places[:-1], text.places[1:], tokens.places[:-1], tokens.places[1:], strict=True)
        ]
        for (at, text, _), said in zip(spans, self._decode_all([ids for *_, ids in spans]), strict=True):
            if said != text and said != text.removeprefix(" "):  # decoders drop the space that begins a text
                found[at] = RowProblem(
                    f"what is learned decodes to {said[:60]!r}, and not to what is written, {text[:60]!r}"
                )
        return found

    def decode(self, ids: list[int]) -> str:
        """Ids as text, special tokens included."""
        return self._decode_all([ids])[0]

    def _decode_all(self, many: Sequence[list[int]]) -> list[str]:
        if self._backend is not None:
            return list(self._backend.decode_batch(list(many), skip_special_tokens=False)) if many else []
        return [str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)) for ids in many]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if self._backend is not None:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False) if texts else []
            return [encoding.ids for encoding in encodings]
        return [list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]

    def _encode(self, texts: Sequence[str]) -> list[Encoding]:
        if self._backend is None:
            return [BareIds(ids, text) for ids, text in zip(self._ids(texts), texts, strict=True)]
        if self._bytes is None:
            encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
            return [ByOffsets(encoding, text) for encoding, text in zip(encodings, texts, strict=True)]
        ids = self._ids(texts)
        placed = [self._bytes.placed(*one) for one in zip(ids, texts, strict=True)]
        others = [text for text, found in zip(texts, placed, strict=True) if found is None]
        encodings = iter(self._backend.encode_batch(others, add_special_tokens=False) if others else ())
        return [
            ByOffsets(next(encodings), text) if found is None else found
            for text, found in zip(texts, placed, strict=True)
        ]


def _no_ids(text: str, begin: int, end: int) -> RowProblem:
    return RowProblem(
        f"the tokenizer has no ids for {text[begin:end][:40]!r} behind {text[max(0, begin - 20) : begin]!r} that "
        "decode to it; move the space"
    )


class _Prefix(NamedTuple):
    """A place that is one between tokens only if the ids from `first` on are those of `text` by itself; `at`: the index
    behind them, where it is known."""

    first: int
    text: str
    at: int | None

    def end(self, ids: list[int], ids_of: dict[str, list[int]]) -> int | None:
        wanted = ids_of[self.text]
        end = self.first + len(wanted)
        return end if ids[self.first : end] == wanted and self.at in (None, end) else None
