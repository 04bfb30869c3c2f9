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
    """The pair of hooks around a layer (or the decoder) that put changed parameters in and take them out again."""

    def __init__(self, registry: Registry, path: str) -> None:
        self.registry = registry
        self.path = path
        self._users: dict[tuple[str, str], int] = {}
        self._inside: list[contextlib.ExitStack] = []
        host = registry.model.get_submodule(path)
        self._handles = [
            host.register_forward_pre_hook(self._enter),
            host.register_forward_hook(self._leave, always_call=True),
        ]

    def open(self, owner: str, name: str) -> None:
        self._users[owner, name] = self._users.get((owner, name), 0) + 1

    def close(self, owner: str, name: str) -> bool:
        """The inverse of `open`; True once nobody is left and the hooks are gone."""
        self._users[owner, name] -= 1
        if self._users[owner, name] == 0:
            del self._users[owner, name]
        if self._users:
            return False
        for handle in self._handles:
            handle.remove()
        return True

    @property
    def running(self) -> bool:
        """Whether the layer runs now."""
        return bool(self._inside)

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

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        stack = contextlib.ExitStack()
        stack.enter_context(self.changed())
        self._inside.append(stack)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._inside:  # none where the way in raised
            self._inside.pop().close()


def _module_at(module: nn.Module, delta: str | None, name: str) -> ParameterModule | OutputModule | None:
    """What a delta changes the parameter with: a module for it, or one after the host that acts on it instead."""
    found = get(module, delta, name)
    if isinstance(found, ParameterModule):
        return found
    after = get(module, delta)
    return after if isinstance(after, OutputModule) and after.acts_on == name else None
