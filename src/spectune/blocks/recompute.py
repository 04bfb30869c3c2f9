"""Recomputation of blocks in backward: every block, all but its products, or every block with its input on the host.

The whole call of a block is recomputed, hooks included, not its `forward` as transformers does: what a delta does with
a block's output would be kept otherwise. FSDP2's own hooks run again in the recomputation, for which it is made
("module-hook-based activation checkpointing").

A block that spectune has compiled recomputes within its graph, and is left alone while it runs compiled: its backward
makes again what it needs, where the whole block would be run here, its last product too. What is drawn at random is the
same there (`spectune.blocks.partition`), and routes and caches are those of the forward pass. Only "offload" is around
a compiled call, because the block's input goes away outside of it.
"""

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import Cache, PreTrainedModel

from spectune.blocks.call import BlockCall, Call, Make, Wrapper, call_of, decoder_blocks, wrap, wrapped
from spectune.blocks.compile import CompiledCall
from spectune.blocks.offload import CudaTransfers, HostStates, Transfers
from spectune.blocks.selective import policy
from spectune.deltas import Attachment
from spectune.errors import ConfigError
from spectune.families import describe

log = logging.getLogger("spectune")

#: nothing is recomputed; all but products and attention; every block; every block, its input in host memory
Recomputation = bool | Literal["selective", "offload"]
#: from the fastest to the leanest
ORDER: tuple[Recomputation, ...] = (False, "selective", True, "offload")


@contextlib.contextmanager
def recomputing(model: PreTrainedModel, mode: Recomputation, *, transfers: Transfers | None = None) -> Iterator[None]:
    """Recompute the blocks of `model` in training inside the `with`, and leave it as it was before.

    Blocks that are to be compiled are compiled before this, with the mode's `memory_budget`
    (`spectune.blocks.compile`).

    Args:
        transfers: copies for "offload" instead of those of the model's CUDA device.

    Raises:
        ConfigError: "offload" without a CUDA device.
    """
    if mode is False:
        yield
        return
    on: list[Any] = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in on:  # by transformers' own means, inside of ours: once is enough
        module.gradient_checkpointing = False
    try:
        with wrapped(*_recomputed(model, mode, transfers)):
            yield
    finally:
        for module in on:
            module.gradient_checkpointing = True


def recompute(model: PreTrainedModel, mode: Recomputation, *, transfers: Transfers | None = None) -> list[BlockCall]:
    """The same for good, of a model that is thrown away, or until `spectune.blocks.call.unwrap`."""
    return [] if mode is False else wrap(*_recomputed(model, mode, transfers))


def _recomputed(
    model: PreTrainedModel, mode: Recomputation, transfers: Transfers | None
) -> tuple[Sequence[nn.Module], Wrapper, Make]:
    """What `wrap` takes."""
    attachment = Attachment.of(model)
    family = describe(model) if attachment is None else attachment.family
    layers = decoder_blocks(model, family)
    settings: dict[str, Any] = {}
    if mode == "selective":
        chosen = policy(family.hidden_size)
        settings["context_fn"] = functools.partial(create_selective_checkpoint_contexts, chosen)
        # the policy sees nothing of what others have compiled
        layers = [layer for layer in layers if isinstance(call_of(layer), CompiledCall | None)]
    states = None
    if mode == "offload":
        if transfers is None:
            modes("offload", model.device.type)
        states = HostStates(transfers or CudaTransfers(model.device))

    def make(index: int, layer: nn.Module, inner: Call) -> Call:
        return _RecomputedCall(model, layer, inner, settings, states, last=index == len(layers) - 1)

    return layers, Wrapper.RECOMPUTED, make


def recomputed_call(model: PreTrainedModel, layer: nn.Module, inner: Call) -> Call:
    """A block's call `inner`, which in training runs again in backward."""
    return _RecomputedCall(model, layer, inner, {}, None, last=False)


def modes(wanted: Recomputation | Literal["auto"], device_type: str) -> tuple[Recomputation, ...]:
    """What may be done on such a device, in the order in which it is tried: all of it for "auto", else what is wanted.
    Raises ConfigError where "offload" is wanted and block inputs are in host memory already."""
    if wanted == "offload" and device_type != "cuda":
        raise ConfigError(
            f"gradient_checkpointing=offload needs a CUDA device, and the model is on {device_type!r}, which has no "
            "memory beside the host's. Use true (every block) or selective."
        )
    if wanted != "auto":
        return (wanted,)
    return ORDER if device_type == "cuda" else ORDER[:-1]


@dataclass(frozen=True, eq=False)
class _RecomputedCall:
    """The call of one block of a model, which runs again in backward.

    Attributes:
        inner: the call that runs, and runs again.
        settings: of `torch.utils.checkpoint.checkpoint`.
        states: where the inputs of blocks go meanwhile; None leaves them on the device.
        last: no block comes after this one.
    """

    model: nn.Module
    layer: nn.Module
    inner: Call
    settings: dict[str, Any]
    states: HostStates | None
    last: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.inner
        if not (self.layer.training and torch.is_grad_enabled()):
            return call(*args, **kwargs)
        if self.states is None and isinstance(call, CompiledCall) and call.memory_budget < 1:
            # the compiled graph recomputes by itself
            if call.compiles():
                return call(*args, **kwargs)
            call = self.layer._call_impl  # the second time too, though it might be compiled by then
        if any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
            _say_cache()
            return call(*args, **kwargs)
        # the route as it lies over this pass, which is another by the time that backward runs
        attachment = Attachment.of(self.model)
        call = call if attachment is None else attachment.keeping_pass(call)
        place, hidden = _hidden_states(args, kwargs)
        # what is recomputed may not hold its input beside the checkpoint, which may send it away
        others = tuple(None if index == place else value for index, value in enumerate(args))
        named = {name: value for name, value in kwargs.items() if name != place}

        def again(states: Tensor) -> Any:
            if isinstance(place, str):
                return call(*others, **named, **{place: states})
            return call(*others[:place], states, *others[place + 1 :], **named)

        leaving = contextlib.nullcontext() if self.states is None else self.states.leaving(hidden, last=self.last)
        with leaving:
            return checkpoint(again, hidden, use_reentrant=False, **self.settings)


@functools.cache
def _say_cache() -> None:
    log.warning("blocks that are given a cache are not recomputed: a second pass would write into it again")


def _hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | str, Tensor]:
    """The block's input: its first floating-point tensor, and where it stands."""
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for place, value in given:
        if isinstance(value, Tensor) and value.is_floating_point():
            return place, value
    raise ConfigError("a block was called without hidden states: gradient_checkpointing=false runs it as it is")
