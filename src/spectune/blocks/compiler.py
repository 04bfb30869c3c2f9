"""How decoder blocks are compiled for training: what is compiled, and the compiler's settings."""

from __future__ import annotations

import abc
import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

#: graphs of one run: kinds of layers, the first layer of each, and shapes before they are taken to vary
MOST_GRAPHS = 64


def _block(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One layer with its hooks. What is compiled is this function, never the layer's own `forward`: compiled functions
    are kept by their code, and all models of a type share that of `forward`."""
    return layer._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]


def block_of() -> Callable[..., Any]:
    """`block(layer, args, kwargs)`, the same function each time with a code object of its own: what was compiled of
    another run is never looked at, and goes when the run goes."""
    return types.FunctionType(_block.__code__.replace(), _block.__globals__, _block.__name__)


class CompiledCall(abc.ABC):
    """What stands in for the call of a layer that is compiled, at `nn.Module._compiled_call_impl`."""

    #: what its graphs were given, see `memory_budget`
    memory_budget: float

    @abc.abstractmethod
    def compiles(self) -> bool:
        """Whether a call now is compiled. Otherwise the layer runs as it is."""

    @abc.abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `nn.Module.__call__`."""


def memory_budget(mode: bool | str) -> float:
    """What compiled blocks are given as `torch._functorch.config.activation_memory_budget`, from 0 (a block's inputs
    alone are kept) to 1 (what the partitioner keeps by itself, recomputing pointwise operations where it is free).

    Args:
        mode: of recomputation, as `TrainingConfig.gradient_checkpointing` names it. "selective" and True are the
            compiler's: it makes again what backward needs, and fuses it. With "offload" blocks are recomputed from
            outside, as that is where their inputs go away, and the budget is nobody's.
    """
    return {"selective": 0.5, True: 0.0}.get(mode, 1.0)


@contextlib.contextmanager
def compiler_settings(memory_budget: float) -> Iterator[None]:
    """The compiler's settings for training blocks.

    The partitioner's heuristics keep normed inputs and gated products for backward, as they would have to be written
    to memory there to be multiplied. They are a third of what a Llama block keeps, and cost one pass to make again (see
    docs/performance.md).
    """
    import torch._dynamo as dynamo
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor

    from spectune.blocks.narrow_products import GroupNarrowProducts
    from spectune.blocks.partition import Partition

    with (
        dynamo.config.patch(skip_nnmodule_hook_guards=False, recompile_limit=MOST_GRAPHS),
        functorch.patch(
            ban_recompute_materialized_backward=False,
            ban_recompute_used_far_apart=False,
            ban_recompute_long_fusible_chains=False,
            activation_memory_budget=memory_budget,
        ),
        inductor.patch(post_grad_custom_pre_pass=GroupNarrowProducts(), custom_partitioner_fn=Partition()),
    ):
        yield
