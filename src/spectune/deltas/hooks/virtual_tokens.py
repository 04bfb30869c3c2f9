"""The virtual tokens that stand before the text of one batch.

Rows of one batch may have prompts of different lengths. Each row's virtual tokens stand right before its text; what is
left over in front of the shorter ones is masked, so that distances within a row are what they are when it runs alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spectune.compute.masks import mask_of_none
from spectune.compute.pack_layout import Pack
from spectune.deltas.modules import InputModule
from spectune.errors import ConfigError

#: arguments of a decoder that virtual tokens get entries of
_TOKEN_WISE = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")


@dataclass(frozen=True)
class VirtualTokens:
    """What stands before the text of one batch. All rows alike: one entry for all.

    Attributes:
        shifts: for each row, how far its text's positions move.
        prompts: for each row, the module that gives its virtual tokens, None where it has none in the sequence.
        lengths: for each row, the virtual tokens in the sequence itself (a prefix has none there).
        windows: how far layers see, by their kind, None for everything; of the kinds whose masks are known here.
    """

    shifts: tuple[int, ...]
    prompts: tuple[InputModule | None, ...]
    lengths: tuple[int, ...]
    windows: Mapping[str, int | None]

    @property
    def length(self) -> int:
        """Places that they take in the sequence of every row."""
        return max(self.lengths)

    @property
    def leads(self) -> tuple[int, ...]:
        """For each row, its virtual tokens that are not in the sequence: a prefix's."""
        return tuple(shift - length for shift, length in zip(self.shifts, self.lengths, strict=True))

    def shift(self, device: torch.device, *, counted: bool = False) -> int | Tensor:
        """How far positions move: an int, or int64 `[batch, 1]`. `counted`: those in the sequence are counted
        already."""
        return _column(self.leads if counted else self.shifts, device)

    def places(self, text: int, padding: Tensor | None, device: torch.device) -> Tensor:
        """Which virtual token stands at each place, int64 `[batch or 1, length + text]`, negative where none does.

        A row's virtual tokens stand right before its first real token, in the place of padding if there is any on the
        left: sliding windows and ALiBi count places, and see the same distances whatever the padding. `padding`:
        padding tokens on the left of each row, `[batch, 1]`."""
        first = self.length + (0 if padding is None else padding)
        count = _column(self.lengths, device)
        place = torch.arange(self.length + text, device=device)[None] - (first - count)
        return place.masked_fill(place >= count, -1)

    def embeddings(self, like: Tensor) -> Tensor:
        """`[batch or 1, length, hidden]` in the dtype of `like`, filled up with zeros behind shorter ones."""
        made = {
            id(prompt): F.pad(prompt().to(dtype=like.dtype, device=like.device), (0, 0, 0, self.length - count))
            for prompt, count in zip(self.prompts, self.lengths, strict=True)
            if prompt is not None
        }
        none = like.new_zeros(self.length, like.shape[-1])
        return torch.stack([made.get(id(prompt), none) for prompt in self.prompts])

    def in_mask(self, mask: Any, virtual: Tensor, text: int) -> Any:
        """A 2-D attention mask with these in it: `[batch, length + text]`; a ready-made one, or several by kind of
        layer, in its own shape. `virtual`: where they stand, boolean `[batch or 1, length + text]`."""
        if isinstance(mask, dict):
            return {kind: self._in_made(made, virtual, self.windows[kind]) for kind, made in mask.items()}
        if mask is not None and not is_2d(mask):
            return self._in_made(mask, virtual, None)
        if mask is None and len(set(self.lengths)) > 1:
            mask = torch.ones(len(self.lengths), text, dtype=torch.int64, device=virtual.device)
        return None if mask is None else F.pad(mask, (self.length, 0)).masked_fill(virtual, 1)

    def _in_made(self, mask: Tensor | None, virtual: Tensor, window: int | None) -> Tensor | None:
        """A ready-made mask `[batch or 1, heads or 1, text, keys]` with these in it: the text sees itself as it did,
        and the virtual tokens that the window of this kind of layer reaches (None: all); those see each other
        causally."""
        places = virtual.shape[1]
        if mask is None:  # plainly causal, over texts without padding
            if len(set(self.lengths)) == 1 and (window is None or places <= window):
                return None
            text = places - self.length
            mask = mask_of_none(text, text, causal=True, dtype=torch.bool, device=virtual.device)
        shown, hidden = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
        made = F.pad(mask, (self.length, 0, self.length, 0), value=hidden)
        made = made.expand(max(made.shape[0], virtual.shape[0]), -1, -1, -1).clone()
        here = torch.arange(places, device=virtual.device)
        back = here[:, None] - here
        reached = (back >= 0) if window is None else (back >= 0) & (back < window)
        among = made[..., :places]  # a static cache has more places behind
        among.masked_fill_(virtual[:, None, :, None] | virtual[:, None, None, :], hidden)
        among.masked_fill_(virtual[:, None, None, :] & reached, shown)
        # what stands before all of these sees nothing but itself: a softmax over nothing is no number
        before = virtual.long().cumsum(-1) == 0
        among.masked_fill_(before[:, None, :, None] & (back == 0), shown)
        return made

    def check_context(self, mask: Any, seen: Any, length: int, context: int | None) -> None:
        """Raise ConfigError where text and virtual tokens need more positions than the base's table has."""
        if context is None or not isinstance(seen, int) or seen + length + max(self.shifts) <= context:
            return
        counts = [seen + length] * len(self.shifts)
        if len(self.shifts) > 1 and is_2d(mask):
            counts = [int(count) for count in mask.sum(1)]  # padding of a shorter row takes no position
        text, extra = max(((count, shift) for count, shift in zip(counts, self.shifts, strict=True) if shift), key=sum)
        if text + extra > context:
            raise ConfigError(
                f"{text} text tokens and {extra} virtual tokens need {text + extra} positions; this "
                f"base has {context}. Use at most {context - extra} text tokens, or fewer virtual ones."
            )

    def check_documents(self, pack: Pack, context: int | None) -> None:
        """Raise ConfigError where a document of a packed batch and its virtual tokens need more positions than the
        base's table has."""
        shifts = self.shifts if len(self.shifts) > 1 else self.shifts * len(pack.lengths)
        longest = [max(lengths, default=0) for lengths in pack.lengths]
        text, shift = max(((text, shift) for text, shift in zip(longest, shifts, strict=True) if shift), key=sum,
                          default=(0, 0))  # fmt: skip
        if context is not None and text + shift > context:
            raise ConfigError(
                f"a document of {text} tokens and {shift} virtual ones need {text + shift} positions; this base has "
                f"{context}. Use at most {context - shift} text tokens, or fewer virtual ones."
            )

    def check_mask(self, mask: Any, seen: Any, length: int, *, from_caller: bool) -> None:
        """Raise ConfigError where a mask is not of the text alone, or has no place for virtual tokens. `from_caller`:
        it is not the model that made it."""
        if is_2d(mask):
            if isinstance(seen, int) and mask.shape[1] != seen + length:
                raise ConfigError(
                    f"the attention mask covers {mask.shape[1]} tokens, the text has {seen + length} "
                    f"({seen} cached, {length} new); it must cover the text and nothing else"
                )
            return
        if not self.length or mask is None:
            return
        if from_caller:
            raise ConfigError(
                "prompt tuning needs the 2-D attention mask of the text [batch, length]; "
                f"a ready-made one ({_shape(mask)}) has no place for the virtual tokens"
            )
        several = isinstance(mask, dict)
        kinds = dict(mask) if several else dict.fromkeys(self.windows, mask)
        strange = [kind for kind in kinds if kind not in self.windows]
        shapes = [_shape(made) for made in kinds.values() if made is not None and not _is_4d(made)]
        problem = None
        if strange:
            problem = f"it makes masks of the kind {', '.join(strange)}"
        elif shapes:
            problem = f"it makes a mask that is {shapes[0]}"
        elif not several and any(window is not None for window in self.windows.values()):
            problem = "it makes one mask for layers with windows and without"
        elif seen:
            problem = f"{length} tokens with something beside the text come behind {seen} in the cache"
        if problem is not None:
            raise ConfigError(
                "prompt tuning is refused for this input: the model makes its attention masks itself of what came "
                f"beside the text (pictures, token types), and {problem}, where spectune cannot put virtual tokens in. "
                "Use prefix tuning or LoRA."
            )


def _is_4d(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.dim() == 4


def _shape(mask: Any) -> str:
    return f"{mask.dim()}-D" if isinstance(mask, Tensor) else f"a {type(mask).__name__} of masks"


def is_2d(mask: Any) -> bool:
    """Whether this is a mask `[batch, length]`."""
    return isinstance(mask, Tensor) and mask.dim() == 2


def left_padding(mask: Any) -> Tensor | None:
    """Padding tokens on the left of each row of a 2-D mask, int64 `[batch, 1]`; None without one."""
    return mask.long().cumsum(-1).eq(0).sum(-1, keepdim=True) if is_2d(mask) else None


def check_one_text(positions: Tensor) -> None:
    """Raise ConfigError where positions that came without a mask, `[rows, length]` or several such (`[3 or 4, rows,
    length]`, the first of four counts tokens), are of several documents in one row, as transformers reads them."""
    if torch.compiler.is_compiling() or (positions.dim() == 3 and positions.shape[0] != 4):
        return
    rows = (positions[0] if positions.dim() == 3 else positions).view(-1, positions.shape[-1])
    jumps = (rows.diff(dim=-1) != 1).any(-1)
    if bool(jumps.any()):
        row = int(jumps.long().argmax())
        raise ConfigError(
            f"position_ids of row {row} do not rise one by one: {rows[row].tolist()}. Without an attention mask "
            "transformers reads that as several documents in one row, and prompt tuning puts virtual tokens before one "
            "text in each row. Give each document a row of its own, or, where it is one text, its 2-D attention mask "
            "too."
        )


def check_token_wise(call: dict[str, Any], text: int) -> None:
    """Raise ConfigError where the decoder is given something for each of `text` tokens that virtual ones have not."""
    for name, value in call.items():
        if isinstance(value, Tensor) and name not in _TOKEN_WISE and value.dim() > 1 and value.shape[1] == text:
            raise ConfigError(
                f"{name} do not go with prompt tuning: they are given for each token of the text, and virtual tokens "
                "have none. Leave them out."
            )


def _column(numbers: tuple[int, ...], device: torch.device) -> int | Tensor:
    """A number for each row, `[rows, 1]`; one for all as it is. Nothing waits for the device."""
    if len(numbers) == 1:
        return numbers[0]
    return torch.tensor(numbers).to(device, non_blocking=True)[:, None]
