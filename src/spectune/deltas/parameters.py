"""Parameters of the base that a delta changes while the layer that holds them runs, and that are the base's after.

For weights that no hook on an output reaches, because the base uses them without calling the module that holds them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from spectune.deltas.modules import OutputModule, ParameterModule
from spectune.deltas.sites import get
from spectune.errors import ConfigError

if TYPE_CHECKING:
    from spectune.deltas.registry import Registry


class ParameterHook:
    """Stands around the `forward` of a layer (or the decoder), puts changed parameters in and takes them out again,
    whatever happens in between: torch's own hooks are not called where Ctrl-C comes up."""

    def __init__(self, registry: Registry, path: str) -> None:
        self.registry = registry
        self.path = path
        self.running = 0  # calls of the layer that are not over
        self._users: dict[tuple[str, str], int] = {}
        self._host: nn.Module = registry.model.get_submodule(path)
        self._before = self._host.__dict__.get("forward")
        self._forward: Any = self._host.forward
        self._host.__dict__["forward"] = self._run

    def open(self, owner: str, name: str) -> None:
        self._users[owner, name] = self._users.get((owner, name), 0) + 1

    def close(self, owner: str, name: str) -> bool:
        """The inverse of `open`; True once nobody is left and nothing is left of it."""
        self._users[owner, name] -= 1
        if self._users[owner, name] == 0:
            del self._users[owner, name]
        if self._users:
            return False
        if self._before is None:
            self._host.__dict__.pop("forward", None)
        else:
            self._host.__dict__["forward"] = self._before
        return True

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        with self.changed():
            self.running += 1
            try:
                return self._forward(*args, **kwargs)
            finally:
                self.running -= 1

    @contextlib.contextmanager
    def changed(self) -> Iterator[None]:
        """The parameters as the current route has them. Inside of itself it starts from the base's again, so that a
        function that is called again in backward computes what it did in its forward pass."""
        replaced: list[tuple[nn.Module, str, Any]] = []
        try:
            for owner, name in self._users:
                module = self.registry.model.get_submodule(owner)
                now: Any = module._parameters[name]
                made = self._made(module, name, getattr(now, "_spectune_base", now), f"{owner}.{name}")
                if made is not None:
                    replaced.append((module, name, now))
                    module._parameters[name] = made  # type: ignore[assignment]
            yield
        finally:
            for module, name, before in reversed(replaced):
                module._parameters[name] = before

    def _made(self, module: nn.Module, name: str, base: Tensor, path: str) -> Tensor | None:
        route = self.registry.current
        acting = {n: found for n in dict.fromkeys(route.names) if (found := _module_at(module, n, name)) is not None}
        if not acting:
            return None
        if route.mixed:
            raise ConfigError(
                f"{path} is changed itself by {', '.join(map(repr, acting))}, and all rows of a batch share it: such a "
                "delta cannot share a batch with others. Route it in a batch of its own."
            )
        [found] = acting.values()
        made = found.changed(base)
        made._spectune_base = base  # type: ignore[attr-defined]
        return made


def _module_at(module: nn.Module, delta: str | None, name: str) -> ParameterModule | OutputModule | None:
    """What a delta changes the parameter with: a module for it, or one after the host that acts on it instead."""
    found = get(module, delta, name)
    if isinstance(found, ParameterModule):
        return found
    after = get(module, delta)
    return after if isinstance(after, OutputModule) and after.acts_on == name else None
