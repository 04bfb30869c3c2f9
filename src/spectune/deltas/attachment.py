"""The deltas of one model, the sites that are open for them, and how to leave the model as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch import nn
from transformers import PreTrainedModel

from spectune.deltas import slots
from spectune.deltas.delta import SHARED, Delta
from spectune.deltas.forward_state import ForwardState
from spectune.deltas.hooks.decoder import DecoderHook
from spectune.deltas.hooks.model_methods import ModelMethods
from spectune.deltas.hooks.module_side import remove_copies
from spectune.deltas.hooks.transformers_checkpoint import CheckpointHook
from spectune.deltas.layout import Route
from spectune.deltas.open_sites import OpenSites
from spectune.deltas.places import Places
from spectune.deltas.site import ParameterSite, Site
from spectune.errors import ConfigError
from spectune.families import BaseIdentity, Family, describe

_ATTRIBUTE = "_spectune"


@dataclass
class BaseFacts:
    """What was found out of a base by running it, and what it is. A caller that attaches to one base again and again
    keeps it from one attachment to the next; it holds for as long as nobody changes the base.

    Attributes:
        family: how it is built.
        identity: which base it is: its fingerprint, once somebody has asked for it.
        proved: what probes have found, by what they asked.
    """

    family: Family | None = None
    identity: BaseIdentity | None = None
    proved: dict[Any, Any] = field(default_factory=dict)


class Attachment:
    """The deltas of one model. It exists from the first attach to the last detach, or as long as somebody holds it.

    Attributes:
        deltas: by name, in the order of attachment.
        state: what is in force now.
        sites: the hooks.
        facts: what was found out of the base; asked once for all deltas.
        holders: how many want it to stay, deltas or not.
    """

    def __init__(self, model: PreTrainedModel, facts: BaseFacts | None = None) -> None:
        self.model = model
        self.facts = facts or BaseFacts()
        self.facts.family = self.facts.family or describe(model)
        self.family: Family = self.facts.family
        self.facts.identity = self.facts.identity or BaseIdentity(model, self.family)
        self.holders = 0
        self.deltas: dict[str, Delta] = {}
        self.state = ForwardState()
        self.base_modules = list(model.modules())
        named = model.named_parameters(remove_duplicate=False)
        self._requires_grad = {name: (parameter, parameter.requires_grad) for name, parameter in named}
        self.places = Places(model)
        self.sites = OpenSites(model, self.family, self.state)
        self.state.forget = self.sites.prepare
        checkpoints = CheckpointHook(self.base_modules, self.keeping_pass)
        before_pass = (self._check_places, checkpoints.keep, self.sites.keep_attention)
        self.decoder = DecoderHook(model, self.family, self.state, before_pass=before_pass, prepare=self.sites.prepare)
        methods = ModelMethods(model, self.state, self.decoder.puts_tokens_in, self._refuse_save_pretrained)
        self._hooks: tuple[CheckpointHook | DecoderHook | ModelMethods, ...] = (checkpoints, self.decoder, methods)
        for parameter, _ in self._requires_grad.values():
            parameter.requires_grad_(False)
        setattr(model, _ATTRIBUTE, self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "holders": 0}  # who holds a model does not hold a copy of it

    @staticmethod
    def of(model: nn.Module) -> Attachment | None:
        """The attachment of a model, None where nothing is attached."""
        found = model.__dict__.get(_ATTRIBUTE)
        return found if isinstance(found, Attachment) else None

    def close_unused(self) -> None:
        """Close it where no delta is left, and nobody holds it."""
        if not self.deltas and not self.holders:
            self.close()

    def close(self) -> None:
        """Leave the model as it was before the first attach, `requires_grad` included. What was added to it since then
        stays as it is; what was put in a weight's place takes a gradient again if that weight did."""
        for hook in self._hooks:
            hook.close()
        remove_copies(self.model)
        for parameter, trainable in self._requires_grad.values():
            parameter.requires_grad_(trainable)
            if not trainable:
                parameter.grad = None
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            before, trainable = self._requires_grad.get(name, (parameter, False))
            if parameter is not before and trainable and parameter.is_floating_point():
                parameter.requires_grad_(True)
        del self.model.__dict__[_ATTRIBUTE]

    @property
    def tuned(self) -> Delta | None:
        """The delta that is the base itself, fully tuned; it is the only one then."""
        return next((delta for delta in list(self.deltas.values())[:1] if delta.method.trains_base), None)

    @property
    def proved(self) -> dict[Any, Any]:
        """What probes have found of the base, by what they asked."""
        return self.facts.proved

    def add(self, delta: Delta, sites: Sequence[Site]) -> None:
        """Put a delta's modules at `sites`. Where that fails, `remove` takes off what stands on the model."""
        self.deltas[delta.name] = delta
        if delta.method.virtual_tokens:
            self.state.virtual_tokens[delta.name] = delta.method.virtual_tokens
        delta.put_on(sites, self.sites.open)
        self.places.add(delta.name, delta.hosts)

    def remove(self, delta: Delta, *, undo: bool = False) -> None:
        """Take a delta off, and with the last one everything else. `undo`: of an attach that failed. Raises
        ConfigError: it is the base itself, and no copy was kept."""
        parts = {"", SHARED, *(site.name for site, _ in delta.sites if isinstance(site, ParameterSite))}
        delta.take_off(self.sites.close, undo=undo)
        slots.take_copies(self.model, delta.name, parts)
        self.places.remove(delta.name)
        del self.deltas[delta.name]
        self.state.virtual_tokens.pop(delta.name, None)
        if self.state.active.name == delta.name:
            self.state.active = Route.of(None)
        self.close_unused()

    def modules_in_force(self) -> list[nn.Module]:
        """The modules that a forward pass runs now: the base's, and those of the deltas of the current route."""
        found = list(self.base_modules)
        for name in dict.fromkeys(self.state.current.names):
            if name is not None:
                found += [part for _, module in self.deltas[name].sites for part in module.modules()]
        return found

    def keeping_pass(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with what is in force in the pass that runs now, whenever it is called: for recomputation, when
        the route is another one."""
        return self.keeping()(function)

    def keeping(self) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """`keeping_pass` of the pass that runs now, for functions that are not known yet."""
        captured = self.state.current, self.state.layout
        # the layers that run now: their hooks stand outside of a function that is called again
        holding = self.sites.running()

        def kept(function: Callable[..., Any]) -> Callable[..., Any]:
            def in_pass(*inputs: Any, **named: Any) -> Any:
                with contextlib.ExitStack() as stack:
                    stack.enter_context(self.state.recomputing(captured))
                    for hook in holding:
                        stack.enter_context(hook.changed())
                    return function(*inputs, **named)

            return in_pass

        return kept

    def _check_places(self) -> None:
        route = self.state.current
        names = route.names
        for name in dict.fromkeys(names):
            if name is not None and name not in self.deltas:
                raise ConfigError(
                    f"the route of this task names delta {name!r}, which was detached since: it was taken along out of "
                    "the `with spectune.route(...)` that it is from"
                )
        if route.mixed:
            route.means(tuple(self.deltas[name] for name in dict.fromkeys(names) if name is not None))
        self.places.check(names)

    def _refuse_save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        names = ", ".join(repr(name) for name in self.deltas)
        raise ConfigError(
            f"save_pretrained would write the base mixed with its deltas ({names}). "
            "To save a delta: delta.save(folder). To save a plain model: "
            "spectune.merge(model, name).save_pretrained(folder), or spectune.detach(model, name) first."
        )
