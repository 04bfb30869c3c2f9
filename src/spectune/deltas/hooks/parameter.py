"""Parameters of the base that a delta changes while the layer that holds them runs, and that are the base's after.

For weights that no hook on an output reaches, because the base uses them without calling the module that holds them.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from spectune.deltas.forward_state import ForwardState
from spectune.deltas.modules import ParameterModule, SideModule
from spectune.deltas.slots import get
from spectune.errors import ConfigError


class _Lock:
    """One thread at a time in a layer whose parameters are exchanged; compiled code exchanges none while it runs."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def held(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if torch.compiler.is_compiling() else self._lock

    def __reduce__(self) -> tuple[Any, ...]:
        return _Lock, ()


class ParameterHook:
    """Stands around the `forward` of a layer (or the decoder), puts changed parameters in and takes them out again,
    whatever happens in between: torch's own hooks are not called where Ctrl-C comes up. `host`: the layer. `path`:
    where it stands in the model."""

    def __init__(self, host: nn.Module, path: str, state: ForwardState) -> None:
        self.state = state
        self.path = path
        self.running = 0  # calls of the layer that are not over
        self._lock = _Lock()
        self._users: dict[tuple[str, str], int] = {}
        self._host = host
        self._before = host.__dict__.get("forward")
        self._forward: Any = host.forward
        host.__dict__["forward"] = self._run

    def open(self, owner: str, name: str) -> None:
        """Let deltas change parameter `name` of the module at `owner`, a path within the layer ("" is the layer)."""
        self._users[owner, name] = self._users.get((owner, name), 0) + 1

    def close(self, owner: str, name: str) -> bool:
        """The inverse of `open`; True once nobody uses the hook and nothing is left of it."""
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
        with self._lock.held():
            try:
                for owner, name in self._users:
                    module = self._host.get_submodule(owner)
                    now: Any = module._parameters[name]
                    path = ".".join(part for part in (self.path, owner, name) if part)
                    made = self._made(module, name, getattr(now, "_spectune_base", now), path)
                    if made is not None:
                        replaced.append((module, name, now))
                        module._parameters[name] = made  # type: ignore[assignment]
                yield
            finally:
                for module, name, before in reversed(replaced):
                    module._parameters[name] = before

    def _made(self, module: nn.Module, name: str, base: Tensor, path: str) -> Tensor | None:
        route = self.state.current
        if route.mixed:
            acting = [n for n in dict.fromkeys(route.names) if _module_at(module, n, name) is not None]
            if not acting:
                return None
            raise ConfigError(
                f"{path} is changed itself by {', '.join(map(repr, acting))}, and all rows of a batch share it: such a "
                "delta cannot share a batch with others. Route it in a batch of its own."
            )
        found = _module_at(module, route.name, name)
        if found is None:
            return None
        made = found.in_place_of(base) if isinstance(found, ParameterModule) else found.changed(base)
        made._spectune_base = base  # type: ignore[attr-defined]
        return made


def _module_at(module: nn.Module, delta: str | None, name: str) -> ParameterModule | SideModule | None:
    """What a delta changes the parameter with: a module for it, or a side's module that acts on it instead."""
    found = get(module, delta, name)
    if isinstance(found, ParameterModule):
        return found
    after = get(module, delta)
    return after if isinstance(after, SideModule) and after.acts_on == name else None
