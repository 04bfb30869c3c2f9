"""The decoder's entry, where a pass begins and virtual tokens and positions are put in, and its exit."""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from spectune.compute.evaluating import evaluating
from spectune.compute.head import is_probing_head
from spectune.compute.masks import positions_from_mask
from spectune.compute.pack_layout import Pack
from spectune.deltas.forward_state import ForwardState
from spectune.deltas.hooks import caches
from spectune.deltas.hooks.attention_function import running
from spectune.deltas.hooks.outer_call import OuterCall
from spectune.deltas.hooks.virtual_tokens import VirtualTokens, check_one_text, check_token_wise, is_2d, left_padding
from spectune.deltas.layout import BatchLayout
from spectune.deltas.method import plain_tokens
from spectune.deltas.modules import InputModule
from spectune.deltas.slots import get
from spectune.deltas.table_route import TableRoute
from spectune.errors import ConfigError
from spectune.families import Family, token_embedding


@dataclass(frozen=True, eq=False)
class _Exit:
    """What the decoder's exit does for the pass that runs.

    Attributes:
        outer: the model whose pass this one runs inside of, if any.
        cut: virtual tokens to cut off the hidden states.
        moved: where each place of a packed text stands among virtual tokens, `[packs, length]` int64.
        holds: the route whose virtual tokens this pass puts into the cache.
        through: places that the cache holds after this pass, virtual ones included; None without a cache.
    """

    outer: ForwardState | None = None
    cut: int = 0
    moved: Tensor | None = None
    holds: tuple[str | None, ...] = ()
    through: Any = None


class DecoderHook:
    """The pair of hooks at the decoder. `before_pass`: called at the beginning of every pass. `prepare`: called with
    the layout of a pass whose rows differ, before its blocks run."""

    def __init__(
        self, model: PreTrainedModel, family: Family, state: ForwardState, *, before_pass: Sequence[Callable[[], None]],
        prepare: Callable[[BatchLayout | None], None],
    ) -> None:  # fmt: skip
        self.model, self.family, self.state, self.before_pass = model, family, state, before_pass
        self.prepare = prepare
        self.decoder = decoder = model.get_submodule(family.decoder)
        self.signature = inspect.signature(decoder.forward)
        self.takes_positions = "position_ids" in self.signature.parameters
        self.outer_call = OuterCall(model, family.decoder, state.thread)
        self._handles = [
            # around the whole model: what changes it may have a hook of its own at the decoder meanwhile
            model.register_forward_pre_hook(state.passes.begin),
            model.register_forward_hook(state.passes.end, always_call=True),
            decoder.register_forward_pre_hook(self.enter, with_kwargs=True),
            decoder.register_forward_hook(self.leave, always_call=True),
        ]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self.outer_call.close()

    def puts_tokens_in(self) -> bool:
        """Whether any row's delta has virtual tokens in the sequence itself."""
        return any(isinstance(get(self.decoder, name), InputModule) for name in self.state.current.names)

    def enter(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook: `[batch, text]` in, `[batch, virtual + text]` out, positions shifted."""
        self.state.passes.begin()
        for prepare in self.before_pass:
            prepare()
        call = {**dict(zip(self.signature.parameters, args, strict=False)), **kwargs}
        ids, embeds, mask = call.get("input_ids"), call.get("inputs_embeds"), call.get("attention_mask")
        text = ids if ids is not None else embeds
        if text is None:
            return None  # the base says itself what is missing
        if (route := self.state.current).cached:  # everything is in the cache: the call stays as it is
            names = route.over(text.shape[0]) if route.per_row else None
            return self._begin(None if names is None else BatchLayout(route, names, text.shape[1]), _Exit())
        cache = next((call[name] for name in caches.CACHE_NAMES if call.get(name) is not None), None)
        if self.state.most_virtual_tokens:
            first = cache is None or bool(caches.seen_in(cache) == 0)
            mask = self.outer_call.text_only(call, prompt=self.puts_tokens_in(), first=first)
        pack = None if is_probing_head() else self.state.thread.pack_ahead
        if pack is not None:
            return (), self._enter_packed(call, pack, text, cache)
        if self.takes_positions and call.get("position_ids") is None and is_2d(mask):
            counts = {self.state.count_of(name) for name in self.state.current.names}
            if 0 in counts and len(counts) > 1:
                _ = self.counts_padding  # runs the model once: before this pass begins
        return self._enter_rows(call, text, mask, cache)

    def leave(self, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook: hidden states of virtual tokens are cut off, so that any head sees text only."""
        self.state.passes.end()
        done, self.state.thread.exit = self.state.thread.exit, None
        if done is None:
            return None
        running.state = done.outer
        if output is None:  # the pass failed
            return None
        if done.through is not None:
            for cache in caches.caches_in(output):  # that the decoder may have made itself
                caches.note_length(cache, done.through)
        if done.cut == 0 and done.moved is None:
            return None
        for cache in caches.caches_in(output):
            caches.check_cache(cache, True, done.cut, done.holds)
        if isinstance(output, tuple):
            return (_text_of(output[0], done), *output[1:])
        output.last_hidden_state = _text_of(output.last_hidden_state, done)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(_text_of(states, done) for states in output.hidden_states)
        return output

    def _begin(self, layout: BatchLayout | None, done: _Exit) -> None:
        if layout is not None and layout.route.mixed and not isinstance(layout.route, TableRoute):
            self.prepare(layout)
        self.state.begin_pass(layout)
        self.state.thread.exit = replace(done, outer=running.state)
        running.state = self.state

    def _enter_rows(self, call: dict[str, Any], text: Tensor, mask: Any, cache: Any) -> Any:
        """The call of a batch with one text in each row; None where it stays as it is."""
        state, route = self.state, self.state.current
        batch, length = text.shape[:2]
        seen = 0 if cache is None else caches.seen_in(cache)
        first = bool(seen == 0)
        names = route.over(batch, state.thread.copies) if route.per_row or state.most_virtual_tokens else None
        # one entry for all rows where they are alike: no tensor is made then
        holds = names if names is not None and route.mixed else route.names[:1]
        virtual = self._virtual_tokens(holds)
        caches.check_cache(cache, first, virtual.length, holds)
        seen_text = seen - virtual.length if virtual.length and not first else seen
        before = virtual.length if first else 0
        padding = None if names is None else left_padding(mask)
        layout = None if names is None else BatchLayout(route, names, length + before, before, seen_text, padding)
        through = None
        if cache is not None or call.get("use_cache") is not False:
            through = seen + length + before
            caches.note_length(cache, through)
        exit_without = _Exit(holds=holds, through=through)
        if layout is None or not max(virtual.shifts):
            self._begin(layout, exit_without)
            return None
        # what a decoder carries from pass to pass in other ways than a cache does not say how much text is in it
        given = [name for name in caches.OTHER_STATES if call.get(name) is not None]
        if given and virtual.length:
            raise ConfigError(
                f"{type(self.decoder).__name__} carries its state in `{given[0]}`, which does not tell whether virtual "
                "tokens went through it: prompt tuning works here with use_cache=False only"
            )
        made = call.get("attention_mask")
        ready = virtual.length and made is not None and not is_2d(made)
        virtual.check_mask(made if ready else mask, seen_text, length, from_caller=self.outer_call.mask_from_caller)
        virtual.check_context(mask, seen_text, length, self.family.position_table)
        if self.takes_positions:
            positions = call.get("position_ids")
            if positions is None:
                positions = self._text_positions(mask, seen_text, length, virtual, text.device)
            elif virtual.length and first and call.get("attention_mask") is None:
                check_one_text(positions)
                # without a mask and a cache transformers takes the jump behind the virtual tokens for a new document
                call["attention_mask"] = torch.ones(batch, length, dtype=torch.int64, device=text.device)
            call["position_ids"] = positions + virtual.shift(text.device)
        if virtual.length:
            self._put_in(call, virtual, padding, cache, first, seen_text + length)
        self._begin(layout, replace(exit_without, cut=before))
        return (), call

    def _enter_packed(self, call: dict[str, Any], pack: Pack, text: Tensor, cache: Any) -> dict[str, Any]:
        """The call of a packed batch: whole documents, those of one pack of one delta."""
        route = self.state.current
        if cache is not None:
            raise ConfigError("a packed batch goes with no cache")
        if text.shape[:2] != pack.documents.shape:
            raise ConfigError(
                f"the batch is {list(text.shape[:2])}, `documents` are {list(pack.documents.shape)}: expected both to "
                "be [packs, length]"
            )
        if call.get("attention_mask") is not None:
            raise ConfigError("a packed batch has no attention mask: `documents` say what is padding")
        names = route.over(text.shape[0])
        # one entry for all packs where they are alike
        virtual = self._virtual_tokens(names if route.mixed else names[:1])
        virtual.check_documents(pack, self.family.position_table)
        moved, positions = None, call.get("position_ids")
        if virtual.length:
            pack, moved = _put_before_each(call, pack, virtual, self._embedding)
            positions = None  # counted anew, with the virtual tokens in the sequence
        if self.takes_positions:
            shift = virtual.shift(pack.device, counted=virtual.length > 0)
            call["position_ids"] = (pack.positions if positions is None else positions) + shift
        # all ones: whatever a model makes of its mask or its positions by itself, what our mask function says is added
        call["attention_mask"] = torch.ones(pack.documents.shape, dtype=torch.int64, device=pack.device)
        pack.prepare(virtual.leads)
        self._begin(BatchLayout(route, names, pack.width, pack=pack), _Exit(moved=moved))
        return call

    @functools.cached_property
    def _windows(self) -> dict[str, int | None]:
        """How far layers see, by their kind; those of chunks are left out, which are counted from the text's begin."""
        window = self.family.sliding_window
        return {"full_attention": None} if window is None else {"full_attention": None, "sliding_attention": window}

    @property
    def _embedding(self) -> nn.Module:
        return self.model.get_submodule(self.family.embedding)

    def _virtual_tokens(self, names: tuple[str | None, ...]) -> VirtualTokens:
        found = [get(self.decoder, name) for name in names]
        prompts = tuple(module if isinstance(module, InputModule) else None for module in found)
        shifts = tuple(self.state.count_of(name) for name in names)
        lengths = tuple(s if prompt is not None else 0 for s, prompt in zip(shifts, prompts, strict=True))
        return VirtualTokens(shifts, prompts, lengths, self._windows)

    @functools.cached_property
    def first_position(self) -> int:
        """The position of a text's first token: 0, or what follows the row that a table of positions keeps for padding
        (RoBERTa and its like)."""
        named = ((name.rpartition(".")[2], module) for name, module in self.decoder.named_modules())
        tables = [m for name, m in named if "position" in name and isinstance(m, nn.Embedding)]
        return next((table.padding_idx + 1 for table in tables if table.padding_idx is not None), 0)

    @functools.cached_property
    def counts_padding(self) -> bool:
        """Whether the bare base's own positions, where the caller gives none, are the index in the batch, padding
        counted (True), or the count of real tokens (False). Found out by running it. Raises ConfigError: neither; then
        a caller must give position_ids."""
        device, first = token_embedding(self.model).weight.device, self.first_position
        config = self.model.config.get_text_config()
        a, b, c = plain_tokens(config, self.family.vocab_size)[:3]
        pad = config.pad_token_id if isinstance(getattr(config, "pad_token_id", None), int) else c
        rows = torch.tensor([[pad, a, b], [0, 1, 1], [first, first + 1, first + 2], [first, first, first + 1]])
        ids, mask, by_index, by_count = rows.to(device)[:, None]
        with self.state.routed(None), evaluating(self.model):
            own, index, count = (
                self.model(input_ids=ids, attention_mask=mask, use_cache=False, **given).logits[:, -1].float()
                for given in ({}, {"position_ids": by_index}, {"position_ids": by_count})
            )
        if torch.allclose(own, index, rtol=1e-4, atol=1e-5):
            return True
        if torch.allclose(own, count, rtol=1e-4, atol=1e-5):
            return False
        raise ConfigError(
            f"{type(self.model).__name__} numbers the positions of a left-padded batch in a way of its own: give "
            "position_ids where rows with virtual tokens share a left-padded batch with others"
        )

    def _text_positions(
        self, mask: Any, seen: Any, length: int, virtual: VirtualTokens, device: torch.device
    ) -> Tensor:
        """Positions of the text where the caller gave none, int64 `[batch or 1, length]`, not shifted yet."""
        by_index: Tensor = (torch.arange(length, device=device) + seen + self.first_position)[None]
        if not is_2d(mask):
            return by_index
        counted = positions_from_mask(mask, length) + self.first_position
        if all(virtual.shifts):
            return counted
        # rows without virtual tokens have the positions that this base gives them by itself
        own = by_index if self.counts_padding else counted
        shifted = torch.tensor([shift > 0 for shift in virtual.shifts], device=device)[:, None]
        return torch.where(shifted, counted, own)

    def _put_in(
        self, call: dict[str, Any], virtual: VirtualTokens, padding: Tensor | None, cache: Any, first: bool, text: int
    ) -> None:
        """Put virtual tokens into the sequence (in the first pass over a cache) and into its mask (in every one).
        `padding`: padding tokens on the left of each row, `[batch, 1]`. `text`: tokens of the text so far, those of
        this pass included."""
        embeds = call.get("inputs_embeds")
        device = (call["input_ids"] if embeds is None else embeds).device
        places = virtual.places(text, padding, device)
        here = places >= 0
        if (mask := virtual.in_mask(call.get("attention_mask"), here, text)) is not None:
            call["attention_mask"] = mask
        if not first:
            return
        check_token_wise(call, text)
        if embeds is None:
            embeds = self._embedding(call["input_ids"])
        pick = places.clamp(min=0)[..., None].expand(-1, -1, embeds.shape[-1])
        tokens = virtual.embeddings(embeds).expand(pick.shape[0], -1, -1).gather(1, pick)
        call["input_ids"] = None
        call["inputs_embeds"] = torch.where(here[..., None], tokens, F.pad(embeds, (0, 0, virtual.length, 0)))
        if self.takes_positions:
            call["position_ids"] = torch.where(
                here, places + self.first_position, F.pad(call["position_ids"], (virtual.length, 0))
            )
        caches.make_room(cache, virtual.length, call["inputs_embeds"].shape[1])


def _text_of(states: Tensor, done: _Exit) -> Tensor:
    """Hidden states of the text, `[batch, text, hidden]`."""
    if done.moved is None:
        return states[:, done.cut :]
    return states[torch.arange(done.moved.shape[0], device=done.moved.device)[:, None], done.moved]


def _put_before_each(
    call: dict[str, Any], pack: Pack, virtual: VirtualTokens, embedding: nn.Module
) -> tuple[Pack, Tensor]:
    """Put each pack's virtual tokens before each of its documents, in a decoder's call, in place. Returns the longer
    pack, and where each place of the text stands in it, `[packs, length]` int64."""
    if call.get("token_type_ids") is not None:
        raise ConfigError("token_type_ids do not go with prompt tuning: virtual tokens have no type. Leave them out.")
    pack, source, moved = pack.grown(virtual.lengths)
    embeds = call.get("inputs_embeds")
    if embeds is None:
        embeds = embedding(call["input_ids"])
    prompts = virtual.embeddings(embeds).expand(embeds.shape[0], -1, -1)
    row = torch.arange(embeds.shape[0], device=embeds.device)[:, None]
    text, tokens = embeds[row, source.clamp(min=0)], prompts[row, (-1 - source).clamp(min=0)]
    call["input_ids"] = None
    call["inputs_embeds"] = torch.where((source < 0)[..., None], tokens, text)
    return pack, moved
