"""The hook after a module: lets the module of each row's delta change the output."""

from typing import Any

from torch import Tensor, nn

from spectune.deltas.forward_state import ForwardState
from spectune.deltas.hooks.module_side import SideHook
from spectune.deltas.modules import OutputModule
from spectune.deltas.slots import get
from spectune.deltas.table_route import TableRoute


class OutputHook(SideHook):
    """The hook after the module at `path`; see `SideHook`."""

    kind = OutputModule

    def __init__(self, module: nn.Module, path: str, state: ForwardState, *, gathers_tokens: bool) -> None:
        super().__init__(module, path, state, gathers_tokens=gathers_tokens)
        self.handle = module.register_forward_hook(self.run, with_kwargs=True)

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook: the module's output, changed."""
        route = self.state.current
        by_slot = isinstance(route, TableRoute)
        if not self.tables if by_slot else route.bare:
            return None
        several = type(output) in (tuple, list)
        y = output[0] if several else output
        if isinstance(route, TableRoute):
            changed = route.changed(self.tables, [_input(args, kwargs), y])
        elif route.mixed:
            changed = self.mixed([_input(args, kwargs), y])
        else:
            delta_module = get(module, route.name)
            if not isinstance(delta_module, OutputModule):
                return None
            changed = delta_module(_input(args, kwargs), y)
        return type(output)((changed, *output[1:])) if several else changed


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    found: Tensor = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
    return found
