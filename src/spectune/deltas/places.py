"""Whether the modules at which deltas act still stand in the model: it may be changed after attach."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from spectune.errors import ConfigError, some


class Places:
    """The modules of one model at which deltas act, by delta and by their path at attach.

    A module that was put into another one (a wrapper around a layer) is still called; one that something else was put
    in place of is not, and what a delta has learned there would be left out in silence."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._hosts: dict[str, dict[str, nn.Module]] = {}
        # module, name of a child, child, by the child's path: as long as they hold, all stand where they did
        self._edges: dict[str, tuple[nn.Module, str, nn.Module]] = {}
        self._lost: dict[str, list[str]] = {}

    def add(self, delta: str, hosts: Mapping[str, nn.Module]) -> None:
        """Note the modules of a delta, by their paths in the model."""
        self._hosts[delta] = dict(hosts)
        for path in hosts:
            self._note(path)

    def remove(self, delta: str) -> None:
        self._hosts.pop(delta, None)
        self._lost.pop(delta, None)

    def check(self, deltas: Iterable[str | None]) -> None:
        """Raise ConfigError: a module at which one of these deltas acts is no longer in the model. Walks over the model
        only if something was exchanged."""
        if torch.compiler.is_compiling():
            return
        wanted = [name for name in dict.fromkeys(deltas) if name in self._hosts]
        # a list: a bank may attach meanwhile, on another thread
        whole = all(module._modules.get(name) is child for module, name, child in list(self._edges.values()))
        if whole and not any(name in self._lost for name in wanted):
            return
        self._look_again()
        for name in wanted:
            if name in self._lost:
                raise ConfigError(
                    f"{some(self._lost[name])}: replaced or removed since delta {name!r} was attached, so that it does "
                    f"not act there any more. Put the module back, or spectune.detach(model, {name!r}) and attach or "
                    "load it again."
                )

    def check_paths(self, delta: str) -> None:
        """Raise ConfigError: a module at which the delta acts is not where it was."""
        self.check([delta])
        moved = [path for path, host in self._hosts.get(delta, {}).items() if _at(self.model, path) is not host]
        if moved:
            raise ConfigError(
                f"{some(moved)}: moved within the model since delta {delta!r} was attached (a wrapper around it?). "
                "Take the wrapper off first."
            )

    def _look_again(self) -> None:
        paths = {id(module): path for path, module in self.model.named_modules()}
        self._edges, self._lost = {}, {}
        for delta, hosts in self._hosts.items():
            for path, host in hosts.items():
                if id(host) in paths:
                    self._note(paths[id(host)])
                else:
                    self._lost.setdefault(delta, []).append(path)

    def _note(self, path: str) -> None:
        module, names = self.model, path.split(".") if path else []
        for depth, name in enumerate(names, 1):
            child = module._modules[name]
            assert child is not None, "a host is a module"
            self._edges[".".join(names[:depth])] = module, name, child
            module = child


def _at(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None
