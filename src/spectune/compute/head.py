"""How a model makes logits of its decoder's output, found by running it once: so that a loss can do the same by itself.

A loss that goes through the logits in chunks has to call the decoder in place of the model. What the model's own
`forward` gives the decoder, and what it does to the head's output (scaling, soft caps), differs from type to type; it
is read from the operations that a tiny batch goes through, not from names.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectune.compute.evaluating import evaluating
from spectune.compute.logits_trace import LogitsTrace, NotPlainError, last_hidden

log = logging.getLogger("spectune")

#: tokens of a row that the model is run on
_PROBED = 2
#: of one model
_PROBES_KEPT = 8
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class _Input:
    """A placeholder for the batch's entry of this name."""

    name: str


@dataclass(frozen=True)
class HeadRecipe:
    """How logits are made of a batch: the decoder's arguments, and what is done to the head's output."""

    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    scale: float
    softcap: float | None


@dataclass(frozen=True)
class LinearHead:
    """A model whose logits are `softcap * tanh(scale * z / softcap)`, or `scale * z` without a soft cap, of
    `z = hidden @ weight.T + bias`.

    Attributes:
        weight: `[V, d]`, the head's own parameter.
        bias: `[V]` or None.
        scale, softcap: as `linear_cross_entropy_sum` takes them.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    _decoder: nn.Module
    _recipe: HeadRecipe

    def hidden(self, inputs: Mapping[str, Any]) -> Tensor:
        """The decoder's output `[batch, length, d]` for a batch without labels, in the head's dtype. The decoder is
        called, hooks and all, as the model's own forward calls it."""

        def filled(value: Any) -> Any:
            return inputs[value.name] if isinstance(value, _Input) else value

        args, kwargs = self._recipe.args, self._recipe.kwargs
        output = self._decoder(*map(filled, args), **{name: filled(value) for name, value in kwargs})
        return last_hidden(output).to(self.weight.dtype)


class _HeadCache:
    """What is known of one model's head, kept in the model's own `__dict__`: it lives as long as the model. Copies and
    pickles of a model start with an empty one, as their modules are others."""

    #: why the model's own forward is called, as last logged
    logged_reason: str | None = None

    def __init__(self) -> None:
        #: decoder, head and names of inputs that were probed -> the recipe, or why there is none; the newest few:
        #: training, validation and packs have other names
        self.probed: dict[tuple[nn.Module, nn.Module, frozenset[str]], HeadRecipe | str] = {}

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        # not by setattr: a compiled model would pass it on to the model inside
        cache: Self = vars(model).setdefault("_spectune_head", cls())
        return cache

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()


def linear_head(model: nn.Module, inputs: Mapping[str, Any]) -> LinearHead | None:
    """How `model` makes its logits of a batch such as `inputs`; None where that is not a linear head on the decoder's
    output, scaled or soft-capped by numbers, or where something listens in between: then the model's own forward is the
    only way. The reason is logged once a model.

    In its first call for a model (or for other names of inputs, or with another head) it runs the model on the first
    two tokens of each row: eagerly, in evaluation mode, without gradients. Modes and random state are put back.

    Args:
        inputs: what the model takes, labels left out. Tensors begin with `[batch, length]`, or the answer is None.
    """
    try:
        owner, decoder, head = _parts(model)
        recipe = _recipe(owner, decoder, head, inputs)
    except NotPlainError as error:
        cache = _HeadCache.of(model)
        if cache.logged_reason != str(error):
            cache.logged_reason = str(error)
            log.info("%s: the loss is taken from its logits, all of them at once: %s", type(model).__name__, error)
        return None
    return LinearHead(head.weight, head.bias, recipe.scale, recipe.softcap, decoder, recipe)


def _parts(model: nn.Module) -> tuple[PreTrainedModel, nn.Module, nn.Linear]:
    """The model, its decoder and its head, if nothing keeps these two from being called by themselves."""
    if not isinstance(model, PreTrainedModel):
        raise NotPlainError("it is not a plain transformers model")
    _check_unwatched(model, "the model")
    decoder: Any = model.get_decoder()  # type: ignore[no-untyped-call]
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if decoder is None or decoder is model or decoder is head or head is None:
        raise NotPlainError("it has no decoder or no head of its own")
    # exactly a linear: quantised stand-ins and wrappers compute something else
    if type(head) is not nn.Linear or type(head.weight) is not nn.Parameter:
        raise NotPlainError(f"its head is a {type(head).__name__}, not a linear with plain weights")
    _check_unwatched(head, "its head")
    if "deltas" in head._modules:
        raise NotPlainError("a delta stands at its head")
    return model, decoder, head


def _check_unwatched(module: nn.Module, name: str) -> None:
    """A module that is passed over must have nothing attached that would not be called then, but for what counts passes
    at the decoder, too (`only_counts`)."""
    hooks = [hook for kind in _HOOKS for hook in getattr(module, kind, {}).values()]
    if not all(getattr(getattr(hook, "__self__", None), "only_counts", False) for hook in hooks):
        raise NotPlainError(f"{name} has hooks")
    if module._compiled_call_impl is not None:
        raise NotPlainError(f"{name} is compiled as a whole")
    if "forward" in module.__dict__:
        raise NotPlainError(f"{name} has a forward of its own")


def _recipe(model: PreTrainedModel, decoder: nn.Module, head: nn.Module, inputs: Mapping[str, Any]) -> HeadRecipe:
    cache, key = _HeadCache.of(model), (decoder, head, frozenset(inputs))
    if (known := cache.probed.get(key)) is None:
        try:
            known = _probe(model, decoder, head, inputs)
        except NotPlainError as error:
            known = str(error)
        while len(cache.probed) >= _PROBES_KEPT:
            del cache.probed[next(iter(cache.probed))]
        cache.probed[key] = known
    if isinstance(known, str):
        raise NotPlainError(known)
    return known


def _probe(model: PreTrainedModel, decoder: nn.Module, head: nn.Module, inputs: Mapping[str, Any]) -> HeadRecipe:
    tiny, text = dict(inputs), inputs["input_ids" if "input_ids" in inputs else "inputs_embeds"]
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            if value.shape[:2] != text.shape[:2]:
                raise NotPlainError(f"{name} {list(value.shape)} has no entry for each token")
            tiny[name] = value[:, :_PROBED]
    trace = LogitsTrace(decoder, head)
    with _undisturbed(model, text.device), trace:
        trace.finish(model(**tiny).logits)
    args = tuple(_named(value, tiny) for value in trace.args)
    kwargs = tuple((name, _named(value, tiny)) for name, value in trace.kwargs.items())
    return HeadRecipe(args, kwargs, trace.scaling.scale, trace.scaling.outer)


def _named(value: Any, inputs: Mapping[str, Any]) -> Any:
    """What the decoder was given, for any batch: the batch's own entries by name, settings as they are."""
    if value is None or isinstance(value, bool | str):
        return value
    # numbers are the same object by accident
    names = [name for name, given in inputs.items() if value is given and not isinstance(value, int | float)]
    if not names:
        raise NotPlainError(f"its forward makes a {type(value).__name__} for its decoder")
    return _Input(names[0])


_PROBING: ContextVar[bool] = ContextVar("spectune_probing_head", default=False)


def is_probing_head() -> bool:
    """Whether the forward pass under way is the one that reads the head: on two tokens of each row, for which nothing
    holds that was announced of the batch at hand (its documents)."""
    # never inside compiled code, which a probe does not run; and the compiler need not follow a context variable
    return not torch.compiler.is_compiling() and _PROBING.get()


@contextlib.contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model may be run inside, and is afterwards as it was: modes, random state, what is compiled."""
    devices = [device] if device.type == "cuda" else []
    # compiled blocks would be compiled for two tokens, and then again for any number
    with evaluating(model), torch.random.fork_rng(devices=devices), torch.compiler.set_stance("force_eager"):
        token = _PROBING.set(True)
        try:
            yield
        finally:
            _PROBING.reset(token)
