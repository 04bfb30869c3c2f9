"""The hook before a module: lets the module of each row's delta change the input."""

from typing import Any

from torch import Tensor, nn

from spectune.deltas.forward_state import ForwardState
from spectune.deltas.hooks.module_side import SideHook
from spectune.deltas.modules import EntryModule
from spectune.deltas.slots import get
from spectune.deltas.table_route import TableRoute

Call = tuple[tuple[Any, ...], dict[str, Any]]


class EntryHook(SideHook):
    """The hook before the module at `path`; see `SideHook`. Hooks after the module see the changed input, but for rows
    of other deltas, which are as they came."""

    kind = EntryModule

    def __init__(self, module: nn.Module, path: str, state: ForwardState, *, gathers_tokens: bool) -> None:
        super().__init__(module, path, state, gathers_tokens=gathers_tokens)
        self.handle = module.register_forward_pre_hook(self.run, with_kwargs=True)

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """Forward pre-hook: the call, with the input changed."""
        route = self.state.current
        by_slot = isinstance(route, TableRoute)
        if not self.tables if by_slot else route.bare:
            return None
        name = None if args else next(key for key, value in kwargs.items() if isinstance(value, Tensor))
        x: Tensor = args[0] if name is None else kwargs[name]
        if isinstance(route, TableRoute):
            x = route.changed(self.tables, [x])
        elif route.mixed:
            x = self.mixed([x])
        else:
            delta_module = get(module, route.name)
            if not isinstance(delta_module, EntryModule):
                return None
            x = delta_module(x)
        return ((x, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: x})
