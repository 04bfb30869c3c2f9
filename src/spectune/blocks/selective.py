"""What selective recomputation keeps of a block: outputs of matrix products and of attention. The rest is made again.

Norms, activations, rotary positions, dropout, residual sums and products with a narrow inner dimension (LoRA's second
one) take little time to make again, and most of the memory. torch's selective checkpointing asks a policy for each
operation (torch.utils.checkpoint.create_selective_checkpoint_contexts); this is ours.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy

#: products over fewer numbers than this are bound by memory, as norms are: about operations a byte of an H100
NARROW = 256
#: operations of this project (products in low precision among them) are kept, whatever they are called
OWN = "spectune"

#: name of a product -> which of its arguments are multiplied
_PRODUCTS = {f"aten::{name}": (1, 2) for name in ("addmm", "baddbmm")} | {
    f"aten::{name}": (0, 1)
    for name in ("mm", "bmm", "_scaled_mm", "_scaled_mm_v2", "_grouped_mm", "_scaled_grouped_mm")
}
_KERNELS = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention",
            "fused_attention_overrideable")  # fmt: skip
_ATTENTION = {
    "torch_attn::_varlen_attn",
    *(f"aten::_scaled_dot_product_{kernel}" for kernel in _KERNELS),
    *(f"aten::_{kernel}_attention_forward" for kernel in ("flash", "efficient", "cudnn")),
}


def policy(hidden_size: int) -> Callable[..., CheckpointPolicy]:
    """The policy of a model of that width: `policy(context, operation, *args, **kwargs)`."""
    least = min(NARROW, max(1, hidden_size // 4))

    def choose(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = worth_keeping(operation, args, kwargs, least)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return choose


def worth_keeping(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], least: int) -> bool:
    """Whether an operation's output is kept, if it is a `torch._ops.OpOverload`. `least`: numbers that a product adds
    up for one of its output, at least."""
    schema = getattr(operation, "_schema", None)
    if schema is None or schema.is_mutable:
        return False
    if schema.name in _PRODUCTS:
        first, second = (args[place] for place in _PRODUCTS[schema.name])
        return bool(first.shape[-1] >= least) and not _scores(first, second)
    if schema.name in _ATTENTION or schema.name.startswith(f"{OWN}::"):
        # what draws random numbers is done again, so that what draws after it draws the same
        return not argument_of(schema, "dropout_p", args, kwargs)
    return False


def _scores(first: Tensor, second: Tensor) -> bool:
    """Whether a batch of products gives more than it takes: attention's scores, of every token with every other."""
    if first.dim() != 3 or second.dim() != 3:
        return False
    return first.shape[0] * first.shape[1] * second.shape[2] > max(first.numel(), second.numel())


def argument_of(schema: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation's argument by name, its default where it was not given; None where it has none of that name."""
    for place, argument in enumerate(schema.arguments):
        if argument.name == name:
            return args[place] if place < len(args) else kwargs.get(name, argument.default_value)
    return None
