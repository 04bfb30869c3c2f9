"""Decoder blocks as a decoding step is recorded: each writes its new keys and values into the cache by itself, attends
by lengths, and may be compiled, once for all blocks of a kind.

A block's own call asks the whole cache for its layer by number, which a compiler takes for a constant: every layer
would be compiled anew. Here a block is given its layer alone.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from spectune.blocks.call import Call, Wrapper, decoder_blocks, wrapped
from spectune.blocks.compile import MOST_GRAPHS, block_of
from spectune.blocks.step_attention import FILLED, Filled, known_attention, step_attention
from spectune.errors import ConfigError
from spectune.families import Family


class KeysAndValues(Protocol):
    """A layer of a cache. `stored`: its keys and values, each `[most rows, places, kv_heads, dim]`."""

    stored: tuple[Tensor, Tensor]


class StepCache(Protocol):
    """A cache of as many rows as run at most. `places`: int64 `[most rows]`, where the next token of each is put."""

    places: Tensor

    @property
    def layers(self) -> Sequence[Any]:
        """As `KeysAndValues`."""


class _Layer:
    """What a block has of the cache in one step."""

    def __init__(self, layer: KeysAndValues, row_numbers: Tensor, places: Tensor) -> None:
        self.keys, self.values = layer.stored
        self.row_numbers, self.places = row_numbers, places

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """`[rows, kv_heads, 1, dim]` in; the whole cache out, `[rows, kv_heads, places, dim]`."""
        self.keys.index_put_((self.row_numbers, self.places), key[:, :, 0])
        self.values.index_put_((self.row_numbers, self.places), value[:, :, 0])
        rows = key.shape[0]
        return self.keys[:rows].transpose(1, 2), self.values[:rows].transpose(1, 2)


@dataclass(frozen=True)
class Compiling:
    """How blocks of a step are compiled.

    Attributes:
        backend: of `torch.compile`.
        unrolled: sums over up to this many numbers (a LoRA's rank) are written out, so that they are part of what comes
            before and after them and no kernel of their own.
        tuned: products of a single row are made by inductor too, with block sizes that it tries out: it takes longer to
            compile.
        combined: small kernels that do not depend on each other become one.
    """

    backend: str | Callable[..., Any] = "inductor"
    unrolled: int = 32
    tuned: bool = False
    combined: bool = False

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        """The compiler's settings, inside the `with`."""
        import torch._dynamo as dynamo
        import torch._inductor.config as inductor

        chosen: dict[str, Any] = {"unroll_reductions_threshold": self.unrolled}
        chosen |= {"coordinate_descent_tuning": self.tuned, "combo_kernels": self.combined}
        with dynamo.config.patch(skip_nnmodule_hook_guards=False, recompile_limit=MOST_GRAPHS), inductor.patch(chosen):
            yield


class StepBlocks:
    """The blocks of one model for steps. What was compiled is kept as long as this is."""

    def __init__(self, model: PreTrainedModel, family: Family, compiling: Compiling | None = None) -> None:
        """`compiling`: None runs them as they are. Raises ConfigError: a block takes no further keywords, or the
        attention is none that is known here."""
        known_attention(model)
        self.model, self.layers, self.compiling = model, decoder_blocks(model, family), compiling
        for layer in self.layers:
            if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(layer.forward).parameters.values()):
                raise ConfigError(f"{type(layer).__name__} hands nothing on to its attention")
        self._run = block_of()
        if compiling is not None:
            self._run = torch.compile(self._run, backend=compiling.backend)

    @contextlib.contextmanager
    def exchanged(self, cache: StepCache, rows: int, capacity: int) -> Iterator[None]:
        """Inside the `with`, a step of this many rows and places runs through these blocks. What it makes of the
        cache's places is part of the step: it is entered anew for each. Nothing else may run on the model meanwhile.

        Raises:
            ConfigError: the model's attention is none that is known here, or its blocks do not have a layer of the
                cache each.
        """
        if len(cache.layers) != len(self.layers):
            raise ConfigError(f"{len(self.layers)} blocks share a cache of {len(cache.layers)} layers")
        places = cache.places[:rows]
        numbers = torch.arange(rows, device=places.device)
        filled = Filled.of(places, cache.layers[0].stored[0].shape[1], capacity)

        def make(index: int, layer: nn.Module, inner: Call) -> Call:
            own = _Layer(cache.layers[index], numbers, places)

            def call(*args: Any, **kwargs: Any) -> Any:
                # by keyword or not, and by one of several names
                args = tuple(own if isinstance(value, Cache) else value for value in args)
                kwargs = {name: own if isinstance(value, Cache) else value for name, value in kwargs.items()}
                return self._run(layer, args, {**kwargs, FILLED: filled})

            return call

        settings = contextlib.nullcontext() if self.compiling is None else self.compiling.settings()
        with settings, step_attention(self.model), wrapped(self.layers, Wrapper.COMPILED, make):
            yield
