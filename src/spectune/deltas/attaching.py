"""Attach a method to a model, and take it off again: all or nothing, bit for bit."""

import contextlib
import re
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectune.compute.evaluating import evaluating
from spectune.deltas.attachment import Attachment, BaseFacts
from spectune.deltas.delta import Delta, ModuleDelta
from spectune.deltas.layout import Route
from spectune.deltas.method import InitContext, Method
from spectune.deltas.probes.base_runs import can_run
from spectune.deltas.probes.head_input import prove_head_follows_decoder
from spectune.deltas.probes.sites import prove_that_sites_fire
from spectune.deltas.probes.survey import settled_sites
from spectune.deltas.trained_copy import HeadSite
from spectune.deltas.tuned_base import TunedBase
from spectune.errors import ConfigError
from spectune.families import describe, fingerprint

_NAME = re.compile(r"[A-Za-z0-9_.-]+")


def attach(
    model: PreTrainedModel,
    method: Method,
    name: str = "default",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    keep_base: bool = False,
    facts: BaseFacts | None = None,
) -> Delta:
    """Attach `method` to `model` as delta `name` and make it the active one, alone.

    Args:
        model: a transformers causal language model, on any device, not compiled yet.
        method: a config such as `LoRA(r=16)`.
        tokenizer: needed where a method starts from a text (`PromptTuning(init="text")`).
        seed: of the first weights; the same seed gives the same delta on every device.
        keep_base: for `FullFineTuning`: keep a copy of the base in host memory, which `detach` needs.
        facts: what earlier attachments to this base have proved, of which nothing is proved again; and what this one
            proves is put there.

    Raises:
        ConfigError: a name in use or not `[A-Za-z0-9_.-]+`, a target that matches nothing, a base the method cannot
            take, a compiled model. The model is then as it was.
    """

    def first_weights(delta: Delta) -> None:
        shared = delta.shared if isinstance(delta, ModuleDelta) else None
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            # a head begins as the model's own
            own = [(site, module) for site, module in delta.sites if not isinstance(site, HeadSite)]
            method.initialise(own, InitContext(model, delta.family, generator, tokenizer, shared))

    return place(model, method, name, keep_base=keep_base, fill=first_weights, facts=facts)


def place(
    model: PreTrainedModel, method: Method, name: str, *, fill: Callable[[Delta], None], keep_base: bool = False,
    facts: BaseFacts | None = None,
) -> Delta:  # fmt: skip
    """Attach with weights that `fill` writes: first ones, or a stored delta's. All or nothing."""
    _check(model, method, name)
    make_hooks_visible_to_the_compiler()
    attachment = Attachment.of(model) or Attachment(model, facts)
    delta = None
    try:
        delta = unplaced(model, method, name, keep_base=keep_base)
        prove_head_follows_decoder(attachment)
        attachment.add(delta, settled_sites(attachment, method))
        if method.trains_base:
            prove_that_sites_fire(attachment, delta)  # before its weights are written over
        with attachment.state.routed(None), evaluating(model, attachment.base_modules):
            fill(delta)
        if not method.trains_base:
            _prove(attachment, delta)
    except BaseException:
        if delta is not None and name in attachment.deltas:
            attachment.remove(delta, undo=True)
        elif not attachment.deltas:
            attachment.close()
        raise
    attachment.state.active = Route.of(name)
    return delta


def unplaced(model: PreTrainedModel, method: Method, name: str, *, keep_base: bool = False) -> Delta:
    """The delta of this method on `model`, not on it yet: it knows what is stored. Raises ConfigError: `keep_base` of a
    method that leaves the base as it is, or a base that cannot be trained."""
    attachment = Attachment.of(model)
    family = describe(model) if attachment is None else attachment.family
    base = fingerprint(model, family) if attachment is None else attachment.base_fingerprint
    if method.trains_base:
        return TunedBase(method, model, family, name, base, keep_base=keep_base)
    if keep_base:
        raise ConfigError(
            f"keep_base=True is for methods that train the base itself; {method.label} leaves it as it is. Drop it."
        )
    return ModuleDelta(method, model, family, name, base)


def _prove(attachment: Attachment, delta: Delta) -> None:
    """What `sites` took from names and shapes, and that each site is reached."""
    method, key = delta.method, ("base", type(delta.method))
    if key not in attachment.proved and can_run(attachment.model):
        with attachment.state.routed(None):
            method.prove(attachment.model, attachment.family)
        attachment.proved[key] = True
    with attachment.state.routed(delta.name):
        prove_that_sites_fire(attachment, delta)


def detach(model: PreTrainedModel, name: str) -> None:
    """Take delta `name` off. The base is bit for bit what it was, `requires_grad` included; if the delta was the
    active one, the bare base is active now. What was added to the model since stays.

    Raises:
        ConfigError: no such delta; one that a `with route` names, in any thread; or a fully tuned base of which no copy
            was kept (`attach(..., keep_base=True)`).
    """
    attachment = Attachment.of(model)
    if attachment is None or name not in attachment.deltas:
        known = ", ".join(repr(known) for known in attached(model)) or "none"
        raise ConfigError(f"no delta {name!r} is attached; attached are: {known}")
    if attachment.state.in_use(name):
        raise ConfigError(f"delta {name!r} is in use by a `with spectune.route(...)`: detach it outside of that")
    attachment.remove(attachment.deltas[name])


def attached(model: nn.Module) -> dict[str, Delta]:
    """The deltas on a model by name, in the order of attachment; empty where there are none."""
    attachment = Attachment.of(model)
    return {} if attachment is None else dict(attachment.deltas)


def _check(model: PreTrainedModel, method: Method, name: str) -> None:
    attachment = Attachment.of(model)
    modules = model.modules() if attachment is None else attachment.base_modules
    if any(getattr(m, "_compiled_call_impl", None) is not None or hasattr(m, "_orig_mod") for m in modules):
        raise ConfigError(
            "the model is compiled already: hooks added now would be ignored in silence. "
            "Attach first, compile after (torch.compile or model.compile())."
        )
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"expected a transformers PreTrainedModel, got {type(model).__name__}")
    if not isinstance(method, Method):
        raise ConfigError(f"expected a method such as spectune.LoRA(r=16), got {method!r}")
    if not _NAME.fullmatch(name):
        raise ConfigError(f"a delta's name has letters, digits, '_', '.', '-' only; got {name!r}")
    others = attached(model)
    if name in others:
        raise ConfigError(f"a delta named {name!r} is attached already; choose another name or detach it first")
    if attachment is not None and attachment.tuned is not None:
        raise ConfigError(
            f"the base is fully tuned as {attachment.tuned.name!r}; no other delta can stand beside it. Detach it "
            "first."
        )
    if method.trains_base and others:
        raise ConfigError(
            f"{method.label} trains the base itself and cannot stand beside other deltas "
            f"({', '.join(others)} attached). Detach them first."
        )


def make_hooks_visible_to_the_compiler() -> None:
    """Have torch.compile check hooks again.

    By default Dynamo skips the guards on hooks and reuses a graph across model instances: a bare model that was
    compiled first makes the delta of the next one do nothing, without an error. What it compiled under that setting
    before now has no such guards, so it is thrown away."""
    import torch._dynamo

    if torch._dynamo.config.skip_nnmodule_hook_guards:
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        with contextlib.suppress(AttributeError):
            torch._dynamo.reset()
