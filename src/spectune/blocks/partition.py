"""Where a block's graph is cut into forward and backward: torch's partitioner, but nothing is drawn at random twice.

Within a budget of memory the partitioner makes again whatever saves most, random numbers too, and those of backward are
others than those of forward: gradients are then of another function, without a word. So what is drawn is kept. In
inductor's graphs that is one number for each mask, from which masks are made again as they were; attention that drops
weights is a kernel that draws, and its output is kept.
"""

from collections.abc import Container
from typing import Any

import torch
from torch import fx
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.custom_graph_pass import CustomPartitionerFn, get_hash_for_files
from torch.utils.checkpoint import CheckpointPolicy

from spectune.blocks.selective import argument_of

#: a budget of none keeps a block's inputs alone, whatever is marked; with this one marks count
LEAST_BUDGET = 1e-9


class Partition(CustomPartitionerFn):
    """For `torch._inductor.config.custom_partitioner_fn`."""

    def __call__(self, gm: fx.GraphModule, joint_inputs: Any, **settings: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        return partition(gm, joint_inputs, **settings)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


def partition(
    graph: fx.GraphModule, inputs: Any, *, seeded: Container[Any] = (), **settings: Any
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Cut a joint graph within the budget that is set (`torch._functorch.config.activation_memory_budget`).

    Args:
        seeded: operations that will draw from a number that is kept, and so may be made again.
        inputs, settings: as `torch._functorch.partitioners.min_cut_rematerialization_partition` takes them.

    Returns:
        Forward and backward.

    Raises:
        RuntimeError: this torch's partitioner draws in backward again what forward has drawn.
    """
    import torch._functorch.config as functorch

    drawn = [node for node in graph.graph.nodes if draws(node)]
    for node in drawn:
        if node.target not in seeded:
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    budget = functorch.activation_memory_budget
    with functorch.patch(activation_memory_budget=max(budget, LEAST_BUDGET) if drawn else budget):
        forward, backward = min_cut_rematerialization_partition(graph, inputs, **settings)
    if twice := _drawn(forward, seeded) & _drawn(backward, seeded):
        raise RuntimeError(
            f"torch {torch.__version__} would draw {', '.join(sorted(twice))} in backward again, which makes gradients "
            "wrong: set gradient_checkpointing=false, or torch_compile=false"
        )
    return forward, backward


def _drawn(graph: fx.GraphModule, seeded: Container[Any]) -> set[str]:
    return {node.name for node in graph.graph.nodes if draws(node) and node.target not in seeded}


def draws(node: fx.Node) -> bool:
    """Whether a node's operation draws random numbers. Attention does where it drops something."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    return bool(argument_of(target._schema, "dropout_p", node.args, node.kwargs) != 0.0)
