"""The decoder's entry, where virtual tokens and positions are put in, and its exit, where they are cut off.

Rows of one batch may have prompts of different lengths. Each row's virtual tokens stand right before its text; what is
left over in front of the shorter ones is masked, so that distances within a row are what they are when it runs alone.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectune.compute.head import is_probing_head
from spectune.compute.masks import positions_from_mask
from spectune.compute.pack_layout import Pack
from spectune.deltas import packed_pass
from spectune.deltas.around import Around
from spectune.deltas.caches import CACHE_NAMES, OTHER_STATES, caches_in, check_cache, make_room, note_length, seen_in
from spectune.deltas.modules import InputModule
from spectune.deltas.rows import Rows
from spectune.deltas.sites import get
from spectune.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from spectune.deltas.registry import Registry

#: what there is for each token and is made for virtual ones too
_TOKEN_WISE = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")


@dataclass(frozen=True)
class _Lead:
    """What stands before the text of one batch.

    `shifts`: for each row, how far its text's positions move. `lengths`: for each row, the virtual tokens in the
    sequence itself (a prefix has none there). All rows alike: one entry for all.
    """

    shifts: tuple[int, ...]
    prompts: tuple[InputModule | None, ...]
    lengths: tuple[int, ...]

    @property
    def length(self) -> int:
        return max(self.lengths)

    def shift(self, device: torch.device) -> int | Tensor:
        return _column(self.shifts, device)

    def places(self, text: int, padding: Tensor | None, device: torch.device) -> Tensor:
        """Which virtual token stands at each place: `[batch or 1, length + text]`, negative where it is
        none. `padding`: tokens of it on the left of each row, `[batch, 1]`.

        A row's virtual tokens stand right before its first real token, in the place of padding if there is any on
        the left: sliding windows and ALiBi count places, and see the same distances whatever the padding.
        """
        first = self.length + (0 if padding is None else padding)
        count = _column(self.lengths, device)
        place = torch.arange(self.length + text, device=device)[None] - (first - count)
        return place.masked_fill(place >= count, -1)

    def embeddings(self, like: Tensor) -> Tensor:
        """`[batch or 1, length, hidden]`, filled up with zeros behind."""
        made = {
            id(prompt): F.pad(prompt().to(dtype=like.dtype, device=like.device), (0, 0, 0, self.length - count))
            for prompt, count in zip(self.prompts, self.lengths, strict=True)
            if prompt is not None
        }
        none = like.new_zeros(self.length, like.shape[-1])
        return torch.stack([made.get(id(prompt), none) for prompt in self.prompts])


def _column(numbers: tuple[int, ...], device: torch.device) -> int | Tensor:
    """One for each row, `[rows, 1]`; all alike as they are. Nothing waits for the device."""
    if len(numbers) == 1:
        return numbers[0]
    return torch.tensor(numbers).to(device, non_blocking=True)[:, None]


class DecoderSite:
    """The pair of hooks at the decoder."""

    def __init__(self, registry: Registry, model: PreTrainedModel) -> None:
        self.registry = registry
        decoder = model.get_submodule(registry.family.decoder)
        self.decoder = decoder
        self.signature = inspect.signature(decoder.forward)
        self.takes_positions = "position_ids" in self.signature.parameters
        self.to_cut = 0
        self._through: int | None = None  # places that went through the decoder with this pass, virtual ones included
        self._moved: Tensor | None = None  # where each place of a packed text stands among virtual tokens
        self._holds: tuple[str | None, ...] = ()  # the route whose virtual tokens this pass puts into the cache
        self.handles = [
            decoder.register_forward_pre_hook(self.enter, with_kwargs=True),
            decoder.register_forward_hook(self.leave),
        ]
        self.around = Around(model, registry.family.decoder)
        self._masks_for_generate = _MasksForGenerate(self, getattr(model, "create_masks_for_generate", None))
        # `generate` asks the instance for this name before it makes masks for a static cache
        model.__dict__["create_masks_for_generate"] = self._masks_for_generate
        self._model = model

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.around.close()
        self._model.__dict__.pop("create_masks_for_generate", None)

    def enter(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook: `[batch, text]` in, `[batch, virtual + text]` out, positions shifted."""
        self.to_cut, self._moved = 0, None
        registry, route = self.registry, self.registry.current
        registry.keep_route_in_checkpoints()
        registry.keep_attention()
        call = {**dict(zip(self.signature.parameters, args, strict=False)), **kwargs}
        ids, embeds, mask = call.get("input_ids"), call.get("inputs_embeds"), call.get("attention_mask")
        cache = next((call[name] for name in CACHE_NAMES if call.get(name) is not None), None)
        text = ids if ids is not None else embeds
        if text is None:
            return None  # the base says itself what is missing
        if self.registry.virtual_tokens:
            mask = self.around.text_only(call, prompt=self.puts_tokens_in())
        batch, length = text.shape[:2]
        if self.takes_positions and call.get("position_ids") is None and isinstance(mask, Tensor) and mask.dim() == 2:
            counts = {0 if name is None else registry.deltas[name].method.virtual_tokens for name in route.names}
            if 0 in counts and len(counts) > 1:
                registry.positions_by_index()  # runs the model once: before anything is noted of this pass
        seen = 0 if cache is None else seen_in(cache)
        first = bool(seen == 0)
        self._through = None
        pack = None if is_probing_head() else registry.pack_ahead
        if pack is not None:
            return (), self._enter_packed(call, pack, text, cache)
        rows = Rows(route, batch, copies=registry.copies) if route.per_row or registry.virtual_tokens else None
        # one entry for all rows where they are alike: no tensor is made then
        self._holds = rows.names if rows is not None and route.mixed else route.names[:1]
        lead = self._lead(self._holds)
        check_cache(cache, first, lead.length, self._holds)
        seen_text = seen - lead.length if lead.length and not first else seen
        if rows is not None:
            before = lead.length if first else 0
            rows.length, rows.lead, rows.seen, rows.padding = length + before, before, seen_text, _padding(mask)
        registry.lay(rows, static_cache=bool(getattr(cache, "is_compileable", False)))
        if cache is not None or call.get("use_cache") is not False:
            self._through = seen + length + (lead.length if first else 0)
            note_length(cache, self._through)
        if rows is None or not max(lead.shifts):
            return None
        self._check_other_states(call, lead)
        self._check_mask(mask, seen_text, length, lead.length)
        self._check_context(mask, seen_text, length, lead)

        if self.takes_positions:
            positions = call.get("position_ids")
            if positions is None:
                positions = self._text_positions(mask, seen_text, length, lead, text.device)
            call["position_ids"] = positions + lead.shift(text.device)
        if lead.length:
            self._put_in(call, lead, rows.padding, cache, first, seen_text + length)
        return (), call

    def leave(self, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook: hidden states of virtual tokens are cut off, so that any head sees text only."""
        self.registry.left()
        if self._through is not None:
            for cache in caches_in(output):  # that the decoder may have made itself
                note_length(cache, self._through)
        cut, self.to_cut = self.to_cut, 0
        moved, self._moved = self._moved, None
        if cut == 0 and moved is None:
            return None

        def text_of(states: Tensor) -> Tensor:
            if moved is None:
                return states[:, cut:]
            return states[torch.arange(moved.shape[0], device=moved.device)[:, None], moved]

        for cache in caches_in(output):
            check_cache(cache, True, cut, self._holds)
        if isinstance(output, tuple):
            return (text_of(output[0]), *output[1:])
        output.last_hidden_state = text_of(output.last_hidden_state)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(text_of(states) for states in output.hidden_states)
        return output

    def _enter_packed(self, call: dict[str, Any], pack: Pack, text: Tensor, cache: Any) -> dict[str, Any]:
        """The call of a packed batch, which is of one delta and of whole documents."""
        registry, route = self.registry, self.registry.current
        if route.mixed or cache is not None:
            raise ConfigError(
                "a packed batch goes with no cache"
                if cache is not None
                else f"the route gives rows of one batch different deltas ({', '.join(map(repr, route.names))}), and a "
                "packed batch has documents of one delta only: route each delta's rows in a batch of their own"
            )
        if text.shape[:2] != pack.documents.shape:
            raise ConfigError(
                f"the batch is {list(text.shape[:2])}, `documents` are {list(pack.documents.shape)}: expected both to "
                "be [packs, length]"
            )
        rows = Rows(route, text.shape[0])
        lead = self._lead(rows.names[:1])
        rows.pack, rows.length = pack, pack.width
        registry.lay(rows)
        [prompt], [shift] = lead.prompts, lead.shifts
        self._moved = packed_pass.enter(self, call, rows, None if prompt is None else prompt(), shift)
        return call

    def puts_tokens_in(self) -> bool:
        """Whether any row's delta has virtual tokens in the sequence itself."""
        return any(isinstance(get(self.decoder, name), InputModule) for name in self.registry.current.names)

    def _lead(self, names: tuple[str | None, ...]) -> _Lead:
        registry = self.registry
        found = [get(self.decoder, name) for name in names]
        prompts = tuple(module if isinstance(module, InputModule) else None for module in found)
        shifts = tuple(0 if name is None else registry.deltas[name].method.virtual_tokens for name in names)
        lengths = tuple(s if prompt is not None else 0 for s, prompt in zip(shifts, prompts, strict=True))
        return _Lead(shifts, prompts, lengths)

    def _text_positions(self, mask: Any, seen: Any, length: int, lead: _Lead, device: torch.device) -> Tensor:
        """Positions of the text where the caller gave none, `[batch or 1, length]`, not shifted yet."""
        by_index: Tensor = (torch.arange(length, device=device) + seen)[None]
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return by_index
        counted = positions_from_mask(mask, length)
        if all(lead.shifts):
            return counted
        # rows without virtual tokens have the positions that this base gives them by itself
        own = by_index if self.registry.positions_by_index() else counted
        shifted = torch.tensor([shift > 0 for shift in lead.shifts], device=device)[:, None]
        return torch.where(shifted, counted, own)

    def _put_in(
        self, call: dict[str, Any], lead: _Lead, padding: Tensor | None, cache: Any, first: bool, text: int
    ) -> None:
        """Virtual tokens into the sequence (in the first pass over a cache) and into its mask (in every one).

        `text`: tokens of the text so far, those of this pass included.
        """
        mask: Tensor | None = call.get("attention_mask")
        device = (call["inputs_embeds"] if call.get("inputs_embeds") is not None else call["input_ids"]).device
        places = lead.places(text, padding, device)
        virtual = places >= 0
        if mask is None and len(set(lead.lengths)) > 1:
            mask = torch.ones(len(lead.lengths), text, dtype=torch.int64, device=device)
        if mask is not None:
            call["attention_mask"] = F.pad(mask, (lead.length, 0)).masked_fill(virtual, 1)
        if not first:
            return
        _check_token_wise(call, text)
        embeds = call.get("inputs_embeds")
        if embeds is None:
            embeds = self._model.get_submodule(self.registry.family.embedding)(call["input_ids"])
        pick = places.clamp(min=0)[..., None].expand(-1, -1, embeds.shape[-1])
        tokens = lead.embeddings(embeds).expand(pick.shape[0], -1, -1).gather(1, pick)
        call["input_ids"] = None
        call["inputs_embeds"] = torch.where(virtual[..., None], tokens, F.pad(embeds, (0, 0, lead.length, 0)))
        if self.takes_positions:
            call["position_ids"] = torch.where(virtual, places, F.pad(call["position_ids"], (lead.length, 0)))
        self.to_cut = lead.length
        make_room(cache, lead.length, call["inputs_embeds"].shape[1])

    def _check_other_states(self, call: dict[str, Any], lead: _Lead) -> None:
        """What a decoder carries from pass to pass some other way does not say how much text is in it."""
        given = [name for name in OTHER_STATES if call.get(name) is not None]
        if given and lead.length:
            raise ConfigError(
                f"{type(self.decoder).__name__} carries its state in `{given[0]}`, which does not tell whether virtual "
                "tokens went through it: prompt tuning works here with use_cache=False only"
            )

    def _check_context(self, mask: Any, seen: Any, length: int, lead: _Lead) -> None:
        table = self.registry.family.position_table
        if table is None or not isinstance(seen, int) or seen + length + max(lead.shifts) <= table:
            return
        counts = [seen + length] * len(lead.shifts)
        if len(lead.shifts) > 1 and isinstance(mask, Tensor) and mask.dim() == 2:
            counts = [int(count) for count in mask.sum(1)]  # padding of a shorter row takes no position
        text, extra = max(((count, shift) for count, shift in zip(counts, lead.shifts, strict=True) if shift), key=sum)
        if text + extra > table:
            raise ConfigError(
                f"{text} text tokens and {extra} virtual tokens need {text + extra} positions; this "
                f"base has {table}. Use at most {table - extra} text tokens, or fewer virtual ones."
            )

    def _check_mask(self, mask: Any, seen: Any, length: int, in_sequence: int) -> None:
        if mask is None or not isinstance(mask, Tensor) or mask.dim() != 2:
            if in_sequence and mask is not None:
                raise ConfigError(
                    "prompt tuning needs the 2-D attention mask of the text [batch, length]; "
                    "a ready-made 4-D mask has no place for the virtual tokens"
                )
            return
        if isinstance(seen, int) and mask.shape[1] != seen + length:
            raise ConfigError(
                f"the attention mask covers {mask.shape[1]} tokens, the text has {seen + length} "
                f"({seen} cached, {length} new); it must cover the text and nothing else"
            )


class _MasksForGenerate:
    """Stands in for the model's mask maker in `generate` with static caches: while a prompt is on, the 2-D mask goes
    on to the decoder's entry, which knows of the virtual tokens; the decoder then makes its mask of full length."""

    def __init__(self, site: DecoderSite, original: Any) -> None:
        self.site = site
        self.original = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.site.puts_tokens_in():
            return kwargs.get("attention_mask")
        if self.original is not None:
            return self.original(*args, **kwargs)
        from transformers.masking_utils import create_masks_for_generate

        return create_masks_for_generate(*args, **kwargs)


def _padding(mask: Any) -> Tensor | None:
    """Padding tokens on the left of each row of a 2-D mask, `[batch, 1]`; None without one."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    return mask.long().cumsum(-1).eq(0).sum(-1, keepdim=True)


def _check_token_wise(call: dict[str, Any], text: int) -> None:
    """What the decoder is given for each token of the text has no entry for virtual ones."""
    for name, value in call.items():
        if isinstance(value, Tensor) and name not in _TOKEN_WISE and value.dim() > 1 and value.shape[1] == text:
            raise ConfigError(
                f"{name} do not go with prompt tuning: they are given for each token of the text, and virtual tokens "
                "have none. Leave them out."
            )
