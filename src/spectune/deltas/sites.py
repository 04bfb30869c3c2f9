"""The hooks: one at each module a delta acts after, one pair at the decoder's entry and exit.

A delta's modules are children of the module they act at (`module.deltas[key]`), so that `model.to`, FSDP and
`parameters()` see them. The hooks are opened when a delta first needs the place, and taken away with the last.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spectune.compute.masks import positions_from_mask
from spectune.deltas.modules import DeltaModule, InputModule, OutputModule
from spectune.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from spectune.deltas.registry import Registry

_CACHE_NAMES = ("cache", "past_key_values")  # transformers 5.2x calls it `cache`, earlier ones `past_key_values`


def key_of(name: str) -> str:
    """A delta's name as a key that any `nn.ModuleDict` takes: no dots, never an attribute's name; one to one."""
    return "@" + name.replace(".", ":")


def put(module: nn.Module, name: str, delta_module: DeltaModule) -> None:
    """Make `delta_module` a child of `module` under the delta's name."""
    _children(module)[key_of(name)] = delta_module


def _children(module: nn.Module) -> nn.ModuleDict:
    """`module.deltas`, made where it is not there yet."""
    found = module._modules.get("deltas")
    if isinstance(found, nn.ModuleDict):
        return found
    if hasattr(module, "deltas"):
        raise ConfigError(f"{type(module).__name__} has an attribute `deltas` of its own; spectune needs that name")
    module.deltas = children = nn.ModuleDict()
    return children


def get(module: nn.Module, name: str | None) -> DeltaModule | None:
    """The delta's module at this place, None where it has none."""
    deltas = module._modules.get("deltas")
    if name is None or deltas is None:
        return None
    found = deltas._modules.get(key_of(name))
    return found if isinstance(found, DeltaModule) else None


def take(module: nn.Module, name: str) -> None:
    """The inverse of `put`; the last one out leaves no trace."""
    _take(module, key_of(name))


def _take(module: nn.Module, key: str) -> None:
    deltas = module._modules.get("deltas")
    if isinstance(deltas, nn.ModuleDict):
        deltas._modules.pop(key, None)
        if not len(deltas):
            del module.deltas


def put_shared(module: nn.Module, name: str, shared: nn.Module) -> None:
    """Make what a delta's modules share a child of `module`."""
    _children(module)[key_of(name) + "#shared"] = shared


def take_shared(module: nn.Module, name: str) -> None:
    _take(module, key_of(name) + "#shared")


class OutputHook:
    """The hook after one module: lets the current delta's module change the output."""

    def __init__(self, registry: Registry, module: nn.Module) -> None:
        self.registry = registry
        self.users = 0
        self.handle = module.register_forward_hook(self.run, with_kwargs=True)

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        delta_module = get(module, self.registry.current)
        if not isinstance(delta_module, OutputModule):
            return None
        x = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
        if isinstance(output, tuple):
            return (delta_module(x, output[0]), *output[1:])
        return delta_module(x, output)


class DecoderSite:
    """The decoder's entry, where virtual tokens and positions are put in, and its exit, where they are cut off."""

    def __init__(self, registry: Registry, model: PreTrainedModel) -> None:
        self.registry = registry
        decoder = model.get_submodule(registry.family.decoder)
        self.signature = inspect.signature(decoder.forward)
        self.takes_positions = "position_ids" in self.signature.parameters
        self.to_cut = 0
        self.handles = [
            decoder.register_forward_pre_hook(self.enter, with_kwargs=True),
            decoder.register_forward_hook(self.leave),
        ]
        self._masks_for_generate = _MasksForGenerate(registry, getattr(model, "create_masks_for_generate", None))
        # `generate` asks the instance for this name before it makes masks for a static cache
        model.__dict__["create_masks_for_generate"] = self._masks_for_generate
        self._model = model

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        self._model.__dict__.pop("create_masks_for_generate", None)

    def enter(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook: `[batch, text]` in, `[batch, virtual + text]` out, positions shifted."""
        self.to_cut = 0
        self.registry.keep_route_in_checkpoints()
        self.registry.keep_attention()
        delta = self.registry.current_delta
        extra = 0 if delta is None else delta.method.virtual_tokens
        if extra == 0:
            return None
        call = {**dict(zip(self.signature.parameters, args, strict=False)), **kwargs}
        ids, embeds, mask = call.get("input_ids"), call.get("inputs_embeds"), call.get("attention_mask")
        cache = next((call[name] for name in _CACHE_NAMES if call.get(name) is not None), None)
        text = ids if ids is not None else embeds
        if text is None:
            return None  # the base says itself what is missing
        batch, length = text.shape[:2]
        seen = 0 if cache is None else cache.get_seq_length()
        prompt = get(decoder, self.registry.current)
        in_sequence = isinstance(prompt, InputModule)
        first = bool(seen == 0)
        seen_text = seen - extra if in_sequence and not first else seen
        self._check_context(seen_text, length, extra)
        self._check_mask(mask, seen_text, length, in_sequence)

        if self.takes_positions:
            positions = call.get("position_ids")
            if positions is None and isinstance(mask, Tensor) and mask.dim() == 2:
                positions = positions_from_mask(mask, length)
            elif positions is None:
                positions = (torch.arange(length, device=text.device) + seen_text)[None]
            call["position_ids"] = positions + extra
        if isinstance(prompt, InputModule):
            if first:
                self._put_before(call, prompt, decoder, cache, batch, extra)
            if isinstance(mask, Tensor):
                call["attention_mask"] = torch.cat([mask.new_ones(batch, extra), mask], dim=1)
        return (), call

    def leave(self, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook: hidden states of virtual tokens are cut off, so that any head sees text only."""
        cut, self.to_cut = self.to_cut, 0
        if cut == 0:
            return None
        if isinstance(output, tuple):
            return (output[0][:, cut:], *output[1:])
        output.last_hidden_state = output.last_hidden_state[:, cut:]
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(states[:, cut:] for states in output.hidden_states)
        return output

    def _put_before(
        self, call: dict[str, Any], prompt: InputModule, decoder: nn.Module, cache: Any, batch: int, extra: int
    ) -> None:
        if call.get("token_type_ids") is not None:
            raise ConfigError(
                "token_type_ids do not go with prompt tuning: virtual tokens have no type. Leave them out."
            )
        embeds = call.get("inputs_embeds")
        if embeds is None:
            embeds = self._model.get_submodule(self.registry.family.embedding)(call["input_ids"])
        virtual = prompt().to(embeds.dtype).expand(batch, -1, -1)
        call["input_ids"] = None
        call["inputs_embeds"] = torch.cat([virtual, embeds], dim=1)
        if self.takes_positions:
            text_positions = call["position_ids"]
            lead = torch.arange(extra, device=embeds.device, dtype=text_positions.dtype)
            call["position_ids"] = torch.cat(
                [lead.expand(*text_positions.shape[:-1], extra), text_positions], dim=-1
            ).expand(*text_positions.shape[:-2], batch, -1)
        self.to_cut = extra
        _make_room(cache, extra, call["inputs_embeds"].shape[1])

    def _check_context(self, seen: Any, length: int, extra: int) -> None:
        table = self.registry.family.position_table
        if table is not None and isinstance(seen, int) and seen + length + extra > table:
            raise ConfigError(
                f"{seen + length} text tokens and {extra} virtual tokens need {seen + length + extra} positions; this "
                f"base has {table}. Use at most {table - extra} text tokens, or fewer virtual ones."
            )

    def _check_mask(self, mask: Any, seen: Any, length: int, in_sequence: bool) -> None:
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

    def __init__(self, registry: Registry, original: Any) -> None:
        self.registry = registry
        self.original = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        delta = self.registry.current_delta
        if delta is not None and delta.module_at(self.registry.family.decoder) is not None:
            return kwargs.get("attention_mask")
        if self.original is not None:
            return self.original(*args, **kwargs)
        from transformers.masking_utils import create_masks_for_generate

        return create_masks_for_generate(*args, **kwargs)


def _make_room(cache: Any, extra: int, length: int) -> None:
    """A static cache is as long as the text that `generate` was asked for: it needs `extra` more places."""
    for layer in getattr(cache, "layers", []):
        longest = getattr(layer, "max_cache_len", None)
        if longest is None or getattr(layer, "is_sliding", False):
            continue
        if not getattr(layer, "is_initialized", True):
            layer.max_cache_len = longest + extra
        elif length > longest:
            raise ConfigError(
                f"the static cache has {longest} places, text and virtual tokens need {length}; "
                f"make it at least {extra} longer than the text (max_cache_len)"
            )
