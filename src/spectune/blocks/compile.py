"""Compiled decoder blocks for as long as a run takes: each block is one graph, all blocks of a kind share it.

The whole model as one graph would take minutes to compile and gain little more; a block is compiled once for each kind
(twice where nothing below the first block is trained, whose input then needs no gradient). Deltas stand inside: their
hooks are part of the block's call.
"""

import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers import PreTrainedModel

from spectune.blocks.call import Call, Wrapper, decoder_blocks, wrapped
from spectune.families import Family

#: graphs of one run: kinds of layers, the first layer of each, and shapes before they are taken to vary
MOST_GRAPHS = 64


def can_compile_now() -> bool:
    """Whether what is called now may be compiled: not while tensors are counted one by one (on a CPU in a run's first
    steps, `compute.memory.AllocationTracker`), which the compiler cannot trace, and would give up for good."""
    return _get_current_dispatch_mode() is None


def seconds_compiling() -> float:
    """Seconds that this process has compiled for so far, in forward and in backward."""
    if "torch._dynamo.utils" not in sys.modules:
        return 0.0
    from torch._dynamo.utils import calculate_time_spent

    return calculate_time_spent()["total_wall_time"]


@contextlib.contextmanager
def compiled(
    model: PreTrainedModel, family: Family, *, backend: str | Callable[..., Any] = "inductor",
    memory_budget: float = 1.0
) -> Iterator[None]:  # fmt: skip
    """Inside the `with`, run each decoder block compiled while gradients are wanted; leave the model as it was.

    Without gradients (validation, generation) blocks run as they are: their shapes vary, and they would be compiled
    once more.

    Args:
        backend: of `torch.compile`.
        memory_budget: 1 keeps what a product or attention gave and recomputes what is cheap (norms, activations,
            casts); below 1 the compiler recomputes products too, until a block keeps about that share of it. See
            `memory_budget`.
    """
    run = torch.compile(block_of(), backend=backend)

    def make(_: int, layer: nn.Module, inner: Call) -> Call:
        return CompiledCall(layer, run, lambda: torch.is_grad_enabled() and can_compile_now(), memory_budget)

    with wrapped(decoder_blocks(model, family), Wrapper.COMPILED, make), compiler_settings(memory_budget):
        yield


@dataclass(frozen=True, eq=False)
class CompiledCall:
    """The call of a block that spectune compiles, as `nn.Module.__call__`.

    Attributes:
        run: `run(layer, args, kwargs)`, the block's output from its compiled graph.
        compiles: whether a call now is compiled. Otherwise the block runs as it is.
        memory_budget: what its graphs are given, see `memory_budget`.
    """

    layer: nn.Module
    run: Callable[..., Any]
    compiles: Callable[[], bool]
    memory_budget: float

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.compiles():
            return self.run(self.layer, args, kwargs)
        return self.layer._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]


def _block(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One layer with its hooks. What is compiled is this function, never the layer's own `forward`: compiled functions
    are kept by their code, and all models of a type share that of `forward`."""
    return layer._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]


def block_of() -> Callable[..., Any]:
    """`block(layer, args, kwargs)`, the same function each time with a code object of its own: what was compiled of
    another run is never looked at, and goes when the run goes."""
    return types.FunctionType(_block.__code__.replace(), _block.__globals__, _block.__name__)


def memory_budget(mode: bool | str) -> float:
    """What compiled blocks are given as `torch._functorch.config.activation_memory_budget`, from 0 (a block's inputs
    alone are kept) to 1 (what the partitioner keeps by itself, recomputing pointwise operations where it is free).

    Args:
        mode: of recomputation, as `TrainingConfig.gradient_checkpointing` names it. "selective" and True are the
            compiler's: it makes again what backward needs, and fuses it. With "offload" blocks are recomputed from
            outside, as that is where their inputs go away, and the budget is ignored.
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
