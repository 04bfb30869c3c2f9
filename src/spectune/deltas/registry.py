"""What is attached to one model, and which delta is on: the route."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor, nn
from transformers import PreTrainedModel

from spectune.deltas import attention
from spectune.deltas.sites import DecoderSite, OutputHook
from spectune.errors import ConfigError
from spectune.families import Family, describe

if TYPE_CHECKING:
    from spectune.deltas.delta import Delta

_ATTRIBUTE = "_spectune"
_UNSET: Any = object()


class Registry:
    """The deltas of one model. It exists from the first attach to the last detach."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.family: Family = describe(model)
        self.deltas: dict[str, Delta] = {}
        self.active: str | None = None
        #: keys and values of each attention call by the module's id, while somebody is looking
        self.attention_calls: dict[int, tuple[Tensor, Tensor]] | None = None
        self._routed: str | None = _UNSET
        self._pinned: str | None = _UNSET
        self._requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        self._attention_before: str | None = None
        self._outputs: dict[str, OutputHook] = {}
        self._attention_users: dict[str, int] = {}
        self._checkpoints: list[tuple[nn.Module, Any]] = []
        self.decoder = DecoderSite(self, model)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        setattr(model, _ATTRIBUTE, self)
        # shadows the class's method on this instance; close() takes the shadow away again
        model.__dict__["save_pretrained"] = self._refuse_save_pretrained

    @staticmethod
    def of(model: nn.Module) -> Registry | None:
        """The registry of a model, None where nothing is attached."""
        found = model.__dict__.get(_ATTRIBUTE)
        return found if isinstance(found, Registry) else None

    def close(self) -> None:
        """Leave the model as it was before the first attach, `requires_grad` included."""
        self.decoder.close()
        for module, original in self._checkpoints:
            if isinstance(getattr(module, "_gradient_checkpointing_func", None), _RouteKeepingCheckpoint):
                module.__dict__["_gradient_checkpointing_func"] = original
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._requires_grad[name])
            if not self._requires_grad[name]:
                parameter.grad = None
        self.model.__dict__.pop("save_pretrained", None)
        del self.model.__dict__[_ATTRIBUTE]

    # -- the route ------------------------------------------------------------------------------------------------

    @property
    def current(self) -> str | None:
        """The delta that is on now: in a recomputation the captured one, else the `with route`'s, else the active."""
        if self._pinned is not _UNSET:
            return self._pinned
        return self.active if self._routed is _UNSET else self._routed

    @property
    def current_delta(self) -> Delta | None:
        name = self.current
        return None if name is None else self.deltas[name]

    @contextlib.contextmanager
    def routed(self, name: str | None) -> Iterator[None]:
        before, self._routed = self._routed, name
        try:
            yield
        finally:
            self._routed = before

    @contextlib.contextmanager
    def pinned(self, name: str | None) -> Iterator[None]:
        before, self._pinned = self._pinned, name
        try:
            yield
        finally:
            self._pinned = before

    def keep_route_in_checkpoints(self) -> None:
        """Make gradient checkpointing recompute with the route of its forward pass, wherever backward is called.

        Checkpointing may be switched on after attach, so this is looked at in each forward pass.
        """
        for module in self.model.modules():
            checkpoint = module.__dict__.get("_gradient_checkpointing_func")
            if checkpoint is not None and not isinstance(checkpoint, _RouteKeepingCheckpoint):
                self._checkpoints.append((module, checkpoint))
                module.__dict__["_gradient_checkpointing_func"] = _RouteKeepingCheckpoint(checkpoint, self)

    # -- sites: each opened once, closed with its last user ---------------------------------------------------------

    def open_output(self, path: str) -> None:
        if path not in self._outputs:
            self._outputs[path] = OutputHook(self, self.model.get_submodule(path))
        self._outputs[path].users += 1

    def close_output(self, path: str) -> None:
        hook = self._outputs[path]
        hook.users -= 1
        if hook.users == 0:
            hook.handle.remove()
            del self._outputs[path]

    def open_attention(self, path: str) -> None:
        """Let the attention module at `path` find its keys and values; the first one switches the model's attention
        to the registered function that knows prefixes."""
        if self._attention_before is None:
            self._attention_before = attention.switch_on(self.model)
        attention.listen(self.model.get_submodule(path), self)
        self._attention_users[path] = self._attention_users.get(path, 0) + 1

    def keep_attention(self) -> None:
        """Switch again where somebody set another attention function after attach (or on another model that shares
        this one's config object): else the prefix would be left out in silence."""
        if self._attention_before is not None and not attention.is_on(self.model):
            self._attention_before = attention.switch_on(self.model)

    def close_attention(self, path: str) -> None:
        self._attention_users[path] -= 1
        if self._attention_users[path] == 0:
            attention.stop_listening(self.model.get_submodule(path))
            del self._attention_users[path]
        if not self._attention_users and self._attention_before is not None:
            self.model.set_attn_implementation(self._attention_before)
            self._attention_before = None

    def _refuse_save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        names = ", ".join(repr(name) for name in self.deltas)
        raise ConfigError(
            f"save_pretrained would write the base mixed with its deltas ({names}). "
            "To save a delta: delta.save(folder). To save a plain model: "
            "spectune.merge(model, name).save_pretrained(folder), or spectune.detach(model, name) first."
        )


class _RouteKeepingCheckpoint:
    """A checkpoint function that remembers which delta was on when the forward pass ran."""

    def __init__(self, checkpoint: Callable[..., Any], registry: Registry) -> None:
        self.checkpoint = checkpoint
        self.registry = registry

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        name = self.registry.current

        def in_route(*inputs: Any, **named: Any) -> Any:
            with self.registry.pinned(name):
                return function(*inputs, **named)

        return self.checkpoint(in_route, *args, **kwargs)


Route = str | None | Sequence[str | None]


@contextlib.contextmanager
def route(model: nn.Module, names: Route) -> Iterator[None]:
    """Choose the delta of each row of the batches inside the `with`; None is the bare base.

    Args:
        names: one name (or None) for all rows, or a list with one for each row. Rows of different deltas in one
            batch are not supported yet; a list must name one delta throughout.

    Raises:
        ConfigError: a name that is not attached; a list with more than one delta; the bare base under a fully
            tuned one of which no copy was kept.
    """
    registry = Registry.of(model)
    wanted = [names] if names is None or isinstance(names, str) else list(names)
    attached = {} if registry is None else registry.deltas
    for name in wanted:
        if name is not None and name not in attached:
            raise ConfigError(f"no delta {name!r} is attached; attached are: {', '.join(attached) or 'none'}")
    if not wanted:
        raise ConfigError("an empty route: give a name, None, or one of them for each row")
    if any(name != wanted[0] for name in wanted):
        raise ConfigError(
            f"one batch with rows of different deltas ({', '.join(map(str, dict.fromkeys(wanted)))}) is not supported "
            "yet; route each delta's rows in a batch of their own"
        )
    if registry is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        for name, delta in attached.items():
            if name != wanted[0] and delta.method.trains_base:
                stack.enter_context(delta.suspended())
        stack.enter_context(registry.routed(wanted[0]))
        yield
