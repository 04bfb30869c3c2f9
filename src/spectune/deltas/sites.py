"""Where a delta's modules stand in the model, and the hook after each module that one acts at.

A delta's modules are children of the module they act at (`module.deltas[key]`), so that `model.to`, FSDP and
`parameters()` see them. The hooks are opened when a delta first needs the place, and taken away with the last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from spectune.deltas.modules import DeltaModule, OutputModule
from spectune.errors import ConfigError

if TYPE_CHECKING:
    from spectune.deltas.registry import Registry


def key_of(name: str) -> str:
    """A delta's name as a key that any `nn.ModuleDict` takes: no dots, never an attribute's name; one to one."""
    return "@" + name.replace(".", ":")


def put(module: nn.Module, name: str, delta_module: DeltaModule, part: str = "") -> None:
    """Make `delta_module` a child of `module` under the delta's name. `part`: the parameter that it acts on, where it
    does not act after the module."""
    _children(module)[_key(name, part)] = delta_module


def _key(name: str, part: str) -> str:
    return f"{key_of(name)}#{part}" if part else key_of(name)


def _children(module: nn.Module) -> nn.ModuleDict:
    """`module.deltas`, made where it is not there yet."""
    found = module._modules.get("deltas")
    if isinstance(found, nn.ModuleDict):
        return found
    if hasattr(module, "deltas"):
        raise ConfigError(f"{type(module).__name__} has an attribute `deltas` of its own; spectune needs that name")
    module.deltas = children = nn.ModuleDict()
    return children


def get(module: nn.Module, name: str | None, part: str = "") -> DeltaModule | None:
    """The delta's module at this place, None where it has none."""
    deltas = module._modules.get("deltas")
    if name is None or deltas is None:
        return None
    found = deltas._modules.get(_key(name, part))
    return found if isinstance(found, DeltaModule) else None


def take(module: nn.Module, name: str, part: str = "") -> None:
    """The inverse of `put`; the last one out leaves no trace."""
    _take(module, _key(name, part))


def _take(module: nn.Module, key: str) -> None:
    deltas = module._modules.get("deltas")
    if isinstance(deltas, nn.ModuleDict):
        deltas._modules.pop(key, None)
        if not len(deltas):
            del module.deltas


def put_shared(module: nn.Module, name: str, shared: nn.Module) -> None:
    """Make what a delta's modules share a child of `module`."""
    _children(module)[key_of(name) + "#shared"] = shared


def take_shared(module: nn.Module, name: str) -> None:
    _take(module, key_of(name) + "#shared")


class OutputHook:
    """The hook after one module: lets the module of each row's delta change the output."""

    def __init__(self, registry: Registry, path: str) -> None:
        self.registry = registry
        self.path = path
        self.users = 0
        self.handle = registry.model.get_submodule(path).register_forward_hook(self.run, with_kwargs=True)

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        route = self.registry.current
        several = type(output) in (tuple, list)
        y = output[0] if several else output
        if route.mixed:
            changed = self._by_row(module, _input(args, kwargs), y)
        else:
            delta_module = get(module, route.name)
            if not isinstance(delta_module, OutputModule):
                return None
            changed = delta_module(_input(args, kwargs), y)
        return type(output)((changed, *output[1:])) if several else changed

    def _by_row(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Each delta on its own rows, one after the other."""
        rows = self.registry.rows(y.shape[0])
        acting = {name: get(module, name) for name, _ in rows.groups}
        if not any(acting.values()):
            return y
        if y.dim() == 2 and self.registry.family.gathers_tokens(self.path):
            raise ConfigError(
                f"{self.path} stands among experts, which are given some tokens of any row: deltas at this place "
                "cannot share a batch with others. Route each of them in a batch of its own."
            )
        for name, indices in rows.groups:
            delta_module = acting[name]
            if isinstance(delta_module, OutputModule):
                pick = rows.picks(indices, y, self.path)
                y = y.index_copy(0, pick, delta_module(x[pick], y[pick]))
        return y


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    found: Tensor = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
    return found
