"""Where a delta's modules stand in the model: children of the module that they act at (`module.deltas[key]`), so that
`model.to`, FSDP and `parameters()` see them.
"""

from collections.abc import Iterable

from torch import nn

from spectune.deltas.modules import DeltaModule
from spectune.errors import ConfigError


def key_of(name: str) -> str:
    """A delta's name as a key that any `nn.ModuleDict` takes: no dots, never an attribute's name; one to one."""
    return "@" + name.replace(".", ":")


def put(module: nn.Module, name: str, delta_module: nn.Module, part: str = "") -> None:
    """Make `delta_module` a child of `module` under the delta's name. `part`: the parameter that it acts on, where it
    does not act after the module; "shared" for what all modules of the delta share."""
    _children(module)[_key(name, part)] = delta_module


def get(module: nn.Module, name: str | None, part: str = "") -> DeltaModule | None:
    """The delta's module at this place, None where it has none."""
    deltas = module._modules.get("deltas")
    if name is None or deltas is None:
        return None
    found = deltas._modules.get(_key(name, part))
    return found if isinstance(found, DeltaModule) else None


def take(module: nn.Module, name: str, part: str = "") -> None:
    """The inverse of `put`; the last one out leaves no trace."""
    deltas = module._modules.get("deltas")
    if isinstance(deltas, nn.ModuleDict):
        deltas._modules.pop(_key(name, part), None)
        if not len(deltas):
            del module.deltas


def take_copies(model: nn.Module, name: str, parts: Iterable[str]) -> None:
    """Take a delta's modules, at these parts, out of copies of hosts, which stand in the model where one of its parts
    was copied (a layer put in twice): with their hooks, they would go on to act."""
    keys = {_key(name, part) for part in parts}
    for module in _without_deltas(model):
        deltas = module._modules.get("deltas")
        if isinstance(deltas, nn.ModuleDict):
            for key in keys:
                deltas._modules.pop(key, None)
            if not len(deltas):
                del module.deltas


def _without_deltas(model: nn.Module) -> list[nn.Module]:
    """The modules of a model but for those of its deltas, which may be thousands at each."""
    found, waiting = dict[int, nn.Module](), [model]
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = module
            waiting += [
                child
                for name, child in module._modules.items()
                if child is not None and not (name == "deltas" and isinstance(child, nn.ModuleDict))
            ]
    return list(found.values())


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
