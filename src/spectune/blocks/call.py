"""A decoder block's call: the one place where it is exchanged, in which order, and how it is put back.

torch calls a module by `_compiled_call_impl` where its `__dict__` has one (`nn.Module.compile` puts one there). What
stands around a block's whole call, hooks included, is put into the same place by `wrapped`, a layer around another:
`Wrapper` says in which order, and any other order is refused.

Training compiles, recomputes and captures (`compile`, `recompute`, `cuda_graphs`). Planning wraps the blocks of its
model without weights alike, for good as the model is thrown away, and while a step is traced `Wrapper.MARKED` notes
where blocks begin and end.
Copies of a model (`copy.deepcopy`, pickles) have none of it: torch leaves this entry out.
"""

import contextlib
import enum
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from spectune.families import Family

#: as `nn.Module.__call__`
Call = Callable[..., Any]
#: number of the block, the block, its call so far -> its call from now on
Make = Callable[[int, nn.Module, Call], Call]

_PLACE = "_compiled_call_impl"


class Wrapper(enum.IntEnum):
    """What may stand around a block's call, from the inside out."""

    COMPILED = 1  # spectune.blocks.compile
    RECOMPUTED = 2  # spectune.blocks.recompute
    CAPTURED = 3  # spectune.blocks.cuda_graphs
    MARKED = 4  # where a plan's trace sees blocks begin and end


@dataclass(frozen=True, eq=False)
class BlockCall:
    """What stands in a block's place for its call.

    Attributes:
        call: what is called.
        before: what stood there, None where there was nothing.
    """

    layer: nn.Module
    wrapper: Wrapper
    call: Call
    before: Call | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


def decoder_blocks(model: PreTrainedModel, family: Family) -> list[nn.Module]:
    """The blocks of a model, in their order; of a shortened one those that are left."""
    modules = dict(model.named_modules())
    return [modules[layer.path] for layer in family.layers if layer.path in modules]


def call_of(layer: nn.Module) -> Call | None:
    """What is called for a block now, None where that is the block itself."""
    call: Call | None = layer.__dict__.get(_PLACE)
    return call.call if isinstance(call, BlockCall) else call


def wrap(layers: Sequence[nn.Module], wrapper: Wrapper, make: Make) -> list[BlockCall]:
    """Put what `make` gives around the call of each block, until `unwrap`. Raises RuntimeError for something that
    belongs inside of, or in the place of, what is there already."""
    done: list[BlockCall] = []
    try:
        for index, layer in enumerate(layers):
            before = layer.__dict__.get(_PLACE)
            if isinstance(before, BlockCall) and before.wrapper >= wrapper:
                raise RuntimeError(
                    f"a block is {before.wrapper.name.lower()} already and cannot be {wrapper.name.lower()} after "
                    f"that: the order is {', '.join(each.name.lower() for each in Wrapper)}, each once"
                )
            call = make(index, layer, call_of(layer) or layer._call_impl)
            done.append(BlockCall(layer, wrapper, call, before))
            layer.__dict__[_PLACE] = done[-1]
    except BaseException:
        unwrap(done)
        raise
    return done


def unwrap(calls: Sequence[BlockCall]) -> list[BlockCall]:
    """Put back what stood there before, whatever stands there now. Returns those in whose place it was not they."""
    lost = [call for call in calls if call.layer.__dict__.get(_PLACE) is not call]
    for call in calls:
        if call.before is None:
            call.layer.__dict__.pop(_PLACE, None)
        else:
            call.layer.__dict__[_PLACE] = call.before
    return lost


@contextlib.contextmanager
def wrapped(layers: Sequence[nn.Module], wrapper: Wrapper, make: Make) -> Iterator[list[BlockCall]]:
    """Inside the `with`, what `make` gives stands around the call of each block; after it, come what may, exactly what
    was there before, a call that the user has compiled too. Raises RuntimeError as `wrap` does, and at the end where
    something else has taken the place inside."""
    calls = wrap(layers, wrapper, make)
    try:
        yield calls
    except BaseException:
        unwrap(calls)
        raise
    if unwrap(calls):
        raise RuntimeError(
            f"a block was compiled while it was {wrapper.name.lower()}, which took its place: compile before that"
        )
