"""What the hooks before and after a module share: whose rows are whose."""

from typing import Any, TypeVar

from torch import Tensor, nn

from spectune.deltas.forward_state import ForwardState
from spectune.deltas.modules import SideModule
from spectune.deltas.slots import get
from spectune.errors import ConfigError

Kind = TypeVar("Kind", bound=SideModule)


class SideHook:
    """A hook on one side of the module at `path`. `gathers_tokens`: the module is an expert, which is given some tokens
    of any row."""

    handle: Any

    def __init__(self, path: str, state: ForwardState, *, gathers_tokens: bool) -> None:
        self.path, self.state, self.gathers_tokens = path, state, gathers_tokens

    def close(self) -> None:
        self.handle.remove()

    def by_rows(self, module: nn.Module, kind: type[Kind], tensor: Tensor) -> list[tuple[Kind, Tensor]]:
        """The deltas' modules of this kind, each with the indices of its rows along the first dimension of `tensor`.
        Raises ConfigError: rows cannot be told apart here."""
        layout = self.state.layout_of(tensor.shape[0])
        acting = [(m, rows) for name, rows in layout.groups() if isinstance(m := get(module, name), kind)]
        if acting and tensor.dim() == 2 and self.gathers_tokens:
            raise ConfigError(
                f"{self.path} stands among experts, which are given some tokens of any row: deltas at this place "
                "cannot share a batch with others. Route each of them in a batch of its own."
            )
        return [(delta_module, layout.picks(rows, tensor, self.path)) for delta_module, rows in acting]


def remove_copies(model: nn.Module) -> None:
    """Take hooks off copies of modules that had some (a layer put in twice), for which nobody has a handle."""
    for module in model.modules():
        for hooks, takes_names in (
            (module._forward_hooks, module._forward_hooks_with_kwargs),
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        ):
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), SideHook)]:
                del hooks[key]
                takes_names.pop(key, None)
