"""What is attached to one model, and which delta is on for each row: the route in force."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor, nn
from transformers import PreTrainedModel

from spectune.compute.pack_layout import Kernel, Pack
from spectune.deltas import attention
from spectune.deltas.decoder import DecoderSite
from spectune.deltas.parameters import ParameterHook
from spectune.deltas.rows import Route, Rows
from spectune.deltas.sites import OutputHook
from spectune.errors import ConfigError
from spectune.families import Family, describe

if TYPE_CHECKING:
    from spectune.deltas.delta import Delta

_ATTRIBUTE = "_spectune"


class Registry:
    """The deltas of one model. It exists from the first attach to the last detach."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.family: Family = describe(model)
        self.deltas: dict[str, Delta] = {}
        #: of the delta that was attached last, while no `with route` says otherwise
        self._active = Route.of(None)
        #: rows that generation makes of each row at the moment (beams, return sequences)
        self.copies = 1
        #: keys and values of each attention call by the module's id, while somebody is looking
        self.attention_calls: dict[int, tuple[Tensor, Tensor]] | None = None
        #: attention modules that a packed batch's kernel served, by id, while somebody is looking
        self.kernel_calls: set[int] | None = None
        self._routed: Route | None = None
        self._pinned: tuple[Route, Rows | None] | None = None
        self._rows: Rows | None = None
        #: the documents of the packed batch that the next forward passes are of
        self.pack_ahead: Pack | None = None
        #: packed batches may come; with the kernel for their attention, and the tokens of the longest document of all
        self.packs = False
        self.kernel: Kernel | None = None
        self.longest = 0
        self._positions_by_index: bool | None = None
        #: how far rows move when prompts of unlike lengths share a batch, once it was asked for
        self.prompts_mix: float | None = None
        self._requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        self._attention_before: str | None = None
        self._outputs: dict[str, OutputHook] = {}
        self._parameters: dict[str, ParameterHook] = {}
        self._attention_users: dict[str, int] = {}
        self._checkpoints: list[tuple[nn.Module, Any]] = []
        self.decoder = DecoderSite(self, model)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        setattr(model, _ATTRIBUTE, self)
        # shadows the class's method on this instance; close() takes the shadow away again, down to what was there (a
        # quantised base refuses by itself)
        self._save_before = model.__dict__.get("save_pretrained")
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
        if self._save_before is not None:
            self.model.__dict__["save_pretrained"] = self._save_before
        del self.model.__dict__[_ATTRIBUTE]

    # -- the route ------------------------------------------------------------------------------------------------

    @property
    def active(self) -> str | None:
        """The delta that is on outside of any `with route`."""
        return self._active.name

    @active.setter
    def active(self, name: str | None) -> None:
        self._active = Route.of(name)

    @property
    def current(self) -> Route:
        """The route now: in a recomputation the captured one, else the `with route`'s, else the active delta's."""
        if self._pinned is not None:
            return self._pinned[0]
        return self._active if self._routed is None else self._routed

    @property
    def virtual_tokens(self) -> int:
        """The most virtual tokens of any row's delta under the current route."""
        return max(0 if name is None else self.deltas[name].method.virtual_tokens for name in self.current.names)

    def lay(self, rows: Rows | None, *, static_cache: bool = False) -> None:
        """Note how the current route lies over the batch of the forward pass that begins.

        Args:
            static_cache: keys come with places that are not filled yet.
        """
        self._rows = rows
        attention.now.pack = None if rows is None else rows.pack
        attention.now.causal_flag = self._only_packing or not (self.current.mixed or static_cache)

    def left(self) -> None:
        """The forward pass is over: another model's masks are not of its documents, nor of its route."""
        attention.now.pack, attention.now.causal_flag = None, False

    @property
    def pack(self) -> Pack | None:
        """The documents of the pass that runs, or is recomputed; None where it is not packed."""
        if self._pinned is not None:
            return None if self._pinned[1] is None else self._pinned[1].pack
        return None if self._rows is None else self._rows.pack

    def rows(self, batch: int) -> Rows:
        """The current route over the batch of the forward pass that runs; `batch` is used where a part of the model
        was called by itself. What an earlier pass left behind, under another route, does not count."""
        if self._pinned is not None and self._pinned[1] is not None:
            return self._pinned[1]
        if self._rows is not None and self._rows.route is self.current:
            return self._rows
        return Rows(self.current, batch, copies=self.copies)

    def captured(self, route: Route) -> Rows | None:
        """The rows of the pass that runs, to be kept for its recomputation."""
        return self._rows if self._rows is not None and self._rows.route is route else None

    @contextlib.contextmanager
    def routed(self, route: Route | str | None) -> Iterator[None]:
        """Set the route for a while; a name, or None for the bare base, is for all rows."""
        before = self._routed
        self._routed = route if isinstance(route, Route) else Route.of(route)
        try:
            yield
        finally:
            self._routed = before

    @contextlib.contextmanager
    def pinned(self, route: Route, rows: Rows | None) -> Iterator[None]:
        before, self._pinned = self._pinned, (route, rows)
        try:
            yield
        finally:
            self._pinned = before

    def in_use(self, name: str) -> bool:
        """Whether a `with route` that names the delta is in force."""
        return self._routed is not None and name in self._routed.names

    def positions_by_index(self) -> bool:
        """Whether the base itself counts padding as positions, where the caller gives none. Found out by running it
        once, and kept."""
        if self._positions_by_index is None:
            from spectune.deltas.probe import counts_padding

            self._positions_by_index = counts_padding(self.model)
        return self._positions_by_index

    def keeping_route(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with the route of the pass that runs now, whenever it is called."""
        route = self.current
        # as laid over this pass's batch, which is another by the time that backward runs
        rows = self.captured(route)
        # the layers that run now: their hooks stand outside of a function that is called again
        holding = [hook for hook in self._parameters.values() if hook.running]

        def in_route(*inputs: Any, **named: Any) -> Any:
            with contextlib.ExitStack() as stack:
                stack.enter_context(self.pinned(route, rows))
                for hook in holding:
                    stack.enter_context(hook.changed())
                return function(*inputs, **named)

        return in_route

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
            self._outputs[path] = OutputHook(self, path)
        self._outputs[path].users += 1

    def close_output(self, path: str) -> None:
        hook = self._outputs[path]
        hook.users -= 1
        if hook.users == 0:
            hook.handle.remove()
            del self._outputs[path]

    def can_hold(self, owner: str) -> bool:
        """Whether parameters of the module at `owner` can be changed while something runs that holds it."""
        return self._holder(owner) is not None

    def open_parameter(self, owner: str, name: str) -> None:
        """Let deltas change the parameter `name` of the module at `owner`, while the layer around it runs.

        Raises:
            ConfigError: it stands outside of the decoder.
        """
        holder = self._holder(owner)
        if holder is None:
            raise ConfigError(
                f"{owner}.{name} is refused: it is not what its module adds last, and stands outside of the decoder, "
                "so that it cannot be changed for a forward pass. Use another method, such as LoRA."
            )
        if holder not in self._parameters:
            self._parameters[holder] = ParameterHook(self, holder)
        self._parameters[holder].open(owner, name)

    def close_parameter(self, owner: str, name: str) -> None:
        holder = self._holder(owner)
        assert holder is not None, "it was opened"
        if self._parameters[holder].close(owner, name):
            del self._parameters[holder]

    def _holder(self, owner: str) -> str | None:
        """The layer around a module, else the decoder; None outside of both."""
        around = [layer.path for layer in self.family.layers] + [self.family.decoder]
        return next((path for path in around if owner == path or owner.startswith(path + ".")), None)

    def open_attention(self, path: str, what: str = "prefix tuning") -> None:
        """Let the attention module at `path` find its keys and values; the first one switches the model's attention
        to the registered function that knows prefixes and packs. `what` needs it, for the message of a refusal."""
        if self._attention_before is None:
            self._attention_before = attention.switch_on(self.model, what)
        attention.listen(self.model.get_submodule(path), self)
        self._attention_users[path] = self._attention_users.get(path, 0) + 1

    def open_packing(self, kernel: Kernel | None, longest: int = 0) -> None:
        """Let every attention module know of packed batches, the kernel that they are attended with, and the tokens
        of the longest document of all batches (0: not known).

        Raises:
            ConfigError: no attention was found, or it cannot be exchanged.
        """
        if self.packs:
            raise ConfigError("packing is on already for this model")
        if not self.family.attentions:
            raise ConfigError(f"no attention was found in this {self.family.model_type} model")
        opened = []
        try:
            for site in self.family.attentions:
                self.open_attention(site.path, what="packing")
                opened.append(site.path)
        except BaseException:
            for path in opened:
                self.close_attention(path)
            raise
        self.packs, self.kernel, self.longest = True, kernel, longest

    def close_packing(self) -> None:
        self.packs, self.kernel, self.longest = False, None, 0
        self.lay(None)
        for site in self.family.attentions:
            self.close_attention(site.path)

    @property
    def _only_packing(self) -> bool:
        """Attention was exchanged for packed batches alone: no delta puts keys in front."""
        return self.packs and all(users == 1 for users in self._attention_users.values())

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
        return self.checkpoint(self.registry.keeping_route(function), *args, **kwargs)
