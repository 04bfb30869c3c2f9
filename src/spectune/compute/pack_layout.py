"""How documents lie in the sequences of a packed batch, and what attention needs to know of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

#: `(query, key, value, queries, keys, *, scale, window)`, where the last two are `Spans`; see `compute.varlen`
Kernel = Callable[..., Tensor]


class Spans:
    """Stretches of tokens that follow each other.

    Attributes:
        lengths: of each.
        longest: of any.
        most: no shorter than the longest, nor than `at_least`: the next power of two, at least 16. Compiled code is
            made for each number that it meets, and the longest document is another one in every batch.
        bounds: where each begins and the last one ends, int32 `[stretches + 1]`.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device, at_least: int = 0) -> None:
        self.lengths = tuple(lengths)
        self.longest = max(self.lengths)
        self.most = max(16, 1 << (max(self.longest, at_least) - 1).bit_length())
        ends = torch.tensor([0, *self.lengths]).cumsum(0)
        self.bounds = ends.to(torch.int32).to(device, non_blocking=True)


class Pack:
    """Documents that stand one after the other in `[packs, width]` places; what is left over at the end is padding,
    which is held apart like one more document, so that no place has nothing to attend to.

    Attributes:
        lengths: tokens of each document of each pack.
        documents: the number of the document at each place, `[packs, width]` int64, padding's last.
        positions: its place within its document, `[packs, width]` int64; 0 on padding.
        kernel: attention over documents of various lengths, None where masks are to be used.
        at_least: tokens of the longest document of all batches, if it is known; see `Spans.most`.
    """

    def __init__(
        self, lengths: Sequence[Sequence[int]], width: int, device: torch.device, kernel: Kernel | None = None,
        at_least: int = 0,
    ) -> None:  # fmt: skip
        self.lengths = tuple(tuple(pack) for pack in lengths)
        self.width, self.device, self.kernel, self.at_least = width, device, kernel, at_least
        rest = [width - sum(pack) for pack in self.lengths]
        spans = [(*pack, left) if left else pack for pack, left in zip(self.lengths, rest, strict=True)]
        numbers = [torch.repeat_interleave(torch.tensor(span)) for span in spans]
        positions = [
            torch.cat([*(torch.arange(length) for length in pack), torch.zeros(left, dtype=torch.int64)])
            for pack, left in zip(self.lengths, rest, strict=True)
        ]
        self.documents = torch.stack(numbers).to(device, non_blocking=True)
        self.positions = torch.stack(positions).to(device, non_blocking=True)
        #: the documents of all packs in a row, padding too. Made here: compiled blocks ask for it
        self.spans = Spans([length for span in spans for length in span], device, at_least)
        self._stretches = tuple(map(len, spans))  # of each pack
        self._masks: dict[tuple[int | None, bool], Tensor] = {}
        self._leads: dict[tuple[int, ...], tuple[Tensor, Spans]] = {}

    @classmethod
    def of(cls, documents: Tensor, device: torch.device, kernel: Kernel | None = None, at_least: int = 0) -> Pack:
        """A pack from the number of each token's document, `[packs, width]` int64, -1 for padding at the end of a pack.
        Raises ValueError: a document's tokens are not next to each other, or padding stands before some."""
        host = documents.cpu()
        lengths = []
        for row in host:
            numbers, counts = torch.unique_consecutive(row, return_counts=True)
            real = numbers >= 0
            if len(numbers.unique()) != len(numbers) or not bool(real[: int(real.sum())].all()):
                raise ValueError(
                    "documents of a pack stand one after the other, each in one piece, and padding (-1) at the end; "
                    f"got {row.tolist()}"
                )
            lengths.append(counts[real].tolist())
        return cls(lengths, host.shape[1], device, kernel, at_least)

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(max(pack, default=0) for pack in self.lengths)

    def prepare(self, leads: tuple[int, ...]) -> None:
        """Make what the kernel needs, with these `with_lead`, now: not in a compiled block."""
        if self.kernel is not None and any(leads):
            self.with_lead(leads)

    def with_lead(self, counts: tuple[int, ...]) -> tuple[Tensor, Spans]:
        """For keys that stand before each document's own, so many for each pack, or the same ones for all: indices,
        int64, into those keys, one pack's after the other's, followed by all packs' own, so that each document has its
        keys together; and where they then stand."""
        if counts not in self._leads:
            begins = [sum(counts[:pack]) for pack in range(len(counts))]
            leads = [torch.arange(begin, begin + count) for begin, count in zip(begins, counts, strict=True)]
            leads = leads if len(leads) > 1 else leads * len(self._stretches)
            each = [lead for lead, stretches in zip(leads, self._stretches, strict=True) for _ in range(stretches)]
            start, picks = sum(counts), []
            for lead, length in zip(each, self.spans.lengths, strict=True):
                picks += [lead, torch.arange(start, start + length)]
                start += length
            index = torch.cat(picks).to(self.device, non_blocking=True)
            lengths = [len(lead) + length for lead, length in zip(each, self.spans.lengths, strict=True)]
            self._leads[counts] = index, Spans(lengths, self.device, max(counts) + self.at_least)
        return self._leads[counts]

    def within(self, mask_function: Callable[..., Any]) -> Callable[..., Any]:
        """Transformers' mask function of `(batch, head, query, key)` indices, as it is for each document alone: no
        other document is seen, and places count from the document's beginning."""
        documents, positions = self.documents, self.positions

        def inside(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            same = documents[batch, query] == documents[batch, key]
            alone: Tensor = mask_function(batch, head, positions[batch, query], positions[batch, key])
            return same & alone

        return inside

    def mask(self, window: int | None = None, *, causal: bool = True) -> Tensor:
        """The boolean attention mask `[packs, 1, width, width]`: causal within documents, at most `window` tokens back
        (itself counted); or all of the document where attention is not causal. Made once."""
        if (window, causal) not in self._masks:
            seen = self.documents[:, :, None] == self.documents[:, None, :]
            if causal:
                back = self.positions[:, :, None] - self.positions[:, None, :]
                seen = seen & (back >= 0)
                seen = seen if window is None else seen & (back < window)
            self._masks[window, causal] = seen[:, None]
        return self._masks[window, causal]

    def grown(self, counts: tuple[int, ...]) -> tuple[Pack, Tensor, Tensor]:
        """The pack with virtual tokens before each document: so many for each pack, or for all.

        Returns:
            the longer pack; for each of its places where its token comes from, `[packs, longer width]` int64 (a place
            before, or `-1 - i` for virtual token i); and for each place before where it stands now, `[packs, width]`.
        """
        counts = counts if len(counts) > 1 else counts * len(self.lengths)
        lengths = [[count + length for length in pack] for count, pack in zip(counts, self.lengths, strict=True)]
        width = max(sum(pack) for pack in lengths)
        source = torch.zeros(len(lengths), width, dtype=torch.int64)
        moved = torch.zeros(len(lengths), self.width, dtype=torch.int64)
        for row, (count, pack) in enumerate(zip(counts, self.lengths, strict=True)):
            old, new, virtual = 0, 0, -1 - torch.arange(count)
            for length in pack:
                text = torch.arange(old, old + length)
                source[row, new : new + count] = virtual
                source[row, new + count : new + count + length] = text
                moved[row, text] = torch.arange(new + count, new + count + length)
                old, new = old + length, new + count + length
        longer = Pack(lengths, width, self.device, self.kernel, max(counts) + self.at_least)
        return longer, source.to(self.device, non_blocking=True), moved.to(self.device, non_blocking=True)
