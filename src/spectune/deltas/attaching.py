"""Attach a method to a model, and take it off again: all or nothing, bit for bit."""

import contextlib
import logging
import re
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectune.compute.evaluating import evaluating
from spectune.compute.usual_settings import usual_settings
from spectune.deltas.absent_weights import offloaded, refuse_absent_weights
from spectune.deltas.attachment import Attachment, BaseFacts
from spectune.deltas.delta import Delta, ModuleDelta
from spectune.deltas.foreign_layers import refuse_foreign_layers
from spectune.deltas.layout import Route
from spectune.deltas.method import InitContext, Method
from spectune.deltas.probes.base_runs import can_run
from spectune.deltas.probes.head_input import prove_head_follows_decoder
from spectune.deltas.probes.sites import prove_that_sites_fire
from spectune.deltas.probes.survey import settled_sites
from spectune.deltas.trained_copy import HeadSite
from spectune.deltas.tuned_base import TunedBase
from spectune.errors import ConfigError, first_line, some
from spectune.families import BaseIdentity, describe

log = logging.getLogger("spectune")
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

    What the method has to say of this base (`Method.notice`) is logged as a warning.

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

    delta = place(model, method, name, keep_base=keep_base, fill=first_weights, facts=facts)
    _tell(delta)
    return delta


def _tell(delta: Delta) -> None:
    """Log what the user should read of this method on this base, once for the same facts of the base."""
    attachment, notice = Attachment.of(delta.model), delta.method.notice(delta.family)
    if notice is not None and attachment is not None and attachment.proved.setdefault(("told", notice), delta) is delta:
        log.warning("%s: %s", delta.method.label, notice)


def place(
    model: PreTrainedModel, method: Method, name: str, *, fill: Callable[[Delta], None], keep_base: bool = False,
    facts: BaseFacts | None = None, without_weights: bool = False, serving: bool = False,
) -> Delta:  # fmt: skip
    """Attach with weights that `fill` writes: first ones, or a stored delta's. All or nothing. `without_weights`: the
    model is on the meta device, and only planned with. `serving`: it is not made the active one, and will not be
    trained, so that nothing is proved of gradients."""
    check_can_attach(model, method, name, without_weights=without_weights)
    make_hooks_visible_to_the_compiler()
    with contextlib.nullcontext() if without_weights else usual_settings(model.device):
        delta = _placed(Attachment.of(model) or Attachment(model, facts), method, name, fill, keep_base, serving)
    if not serving and (attachment := Attachment.of(model)) is not None:
        attachment.state.active = Route.of(name)
    return delta


def _placed(
    attachment: Attachment, method: Method, name: str, fill: Callable[[Delta], None], keep_base: bool, serving: bool
) -> Delta:  # fmt: skip
    model, delta = attachment.model, None
    try:
        delta = unplaced(model, method, name, keep_base=keep_base, facts=attachment.facts)
        prove_head_follows_decoder(attachment)
        attachment.add(delta, settled_sites(attachment, method))
        if method.trains_base:
            prove_that_sites_fire(attachment, delta)  # before its weights are written over
        with attachment.state.routed(None), evaluating(model, attachment.base_modules):
            fill(delta)
        if not method.trains_base:
            _prove(attachment, delta, gradients=not serving)
    except BaseException as error:
        if delta is not None and name in attachment.deltas:
            attachment.remove(delta, undo=True)
        else:
            attachment.close_unused()
        failed = error.__cause__ if isinstance(error, ConfigError) else error
        if isinstance(failed, RuntimeError) and not isinstance(failed, torch.OutOfMemoryError):
            _say_what_is_offloaded(model, method, failed)
        raise
    return delta


def _say_what_is_offloaded(model: PreTrainedModel, method: Method, error: Exception) -> None:
    """Raise ConfigError where an attach failed on a model whose weights are not all there: the likely reason."""
    if loaded := offloaded(model):
        raise ConfigError(
            f"{method.label} is refused on this model: accelerate loads the weights of {len(loaded)} modules for each "
            f"call ({some(list(loaded))}), and a delta that reads or changes them finds none ({first_line(error)}). "
            "Load the model without offload (no device_map), or use LoRA."
        ) from error


def unplaced(
    model: PreTrainedModel, method: Method, name: str, *, keep_base: bool = False, facts: BaseFacts | None = None
) -> Delta:  # fmt: skip
    """The delta of this method on `model`, not on it yet: it knows what is stored. What it finds out of the base is put
    into `facts`. Raises ConfigError: `keep_base` of a method that leaves the base as it is, or a base that cannot be
    trained."""
    attachment = Attachment.of(model)
    facts = attachment.facts if attachment is not None else facts or BaseFacts()
    with usual_settings(model.device):
        family = facts.family = facts.family or describe(model)
        base = facts.identity = facts.identity or BaseIdentity(model, family)
    if method.trains_base:
        return TunedBase(method, model, family, name, base, keep_base=keep_base)
    if keep_base:
        raise ConfigError(
            f"keep_base=True is for methods that train the base itself; {method.label} leaves it as it is. Drop it."
        )
    return ModuleDelta(method, model, family, name, base)


def _prove(attachment: Attachment, delta: Delta, *, gradients: bool) -> None:
    """What `sites` took from names and shapes, and that each site is reached."""
    prove_method(attachment, delta.method)
    with attachment.state.routed(delta.name):
        prove_that_sites_fire(attachment, delta, gradients=gradients)


def prove_method(attachment: Attachment, method: Method) -> None:
    """What a method's `sites` takes from names and shapes, proved once for a base. Raises ConfigError: this base is
    built otherwise."""
    key = "base", type(method)
    if key not in attachment.proved and can_run(attachment.model):
        with attachment.state.routed(None):
            method.prove(attachment.model, attachment.family)
        attachment.proved[key] = True


def detach(model: PreTrainedModel, name: str) -> None:
    """Take delta `name` off. The base is bit for bit what it was, `requires_grad` included; if the delta was the
    active one, the bare base is active now. What was added to the model since stays.

    Raises:
        ConfigError: no such delta; one that a `with route` names, in any thread; or a fully tuned base of which no copy
            was kept (`attach(..., keep_base=True)`).
    """
    attachment, delta = unused(model, name)
    attachment.remove(delta)


def unused(model: PreTrainedModel, name: str) -> tuple[Attachment, Delta]:
    """A delta that may be taken off. Raises ConfigError: there is none, or it is in use."""
    attachment = Attachment.of(model)
    if attachment is None or name not in attachment.deltas:
        known = ", ".join(repr(known) for known in attached(model)) or "none"
        raise ConfigError(f"no delta {name!r} is attached; attached are: {known}")
    if attachment.state.in_use(name):
        raise ConfigError(f"delta {name!r} is in use by a `with spectune.route(...)`: detach it outside of that")
    return attachment, attachment.deltas[name]


def attached(model: nn.Module) -> dict[str, Delta]:
    """The deltas on a model by name, in the order of attachment; empty where there are none."""
    attachment = Attachment.of(model)
    return {} if attachment is None else dict(attachment.deltas)


def check_can_attach(model: PreTrainedModel, method: Method, name: str, *, without_weights: bool = False) -> None:
    """Raise ConfigError where a delta of this method and name cannot be put on the model, as far as that can be seen
    without building it. `without_weights`: the model is only planned with."""
    _check(model, method, name)
    if not without_weights and Attachment.of(model) is None:
        refuse_absent_weights(model, method.label, trains_base=method.trains_base)


def _check(model: PreTrainedModel, method: Method, name: str) -> None:
    attachment = Attachment.of(model)
    modules = model.modules() if attachment is None else attachment.base_modules
    if any(getattr(m, "_compiled_call_impl", None) is not None or hasattr(m, "_orig_mod") for m in modules):
        raise ConfigError(
            "the model is compiled already: hooks added now would be ignored in silence. "
            "Attach first, compile after (torch.compile or model.compile())."
        )
    if attachment is None and isinstance(model, nn.Module):
        refuse_foreign_layers(model)
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
    if attachment is not None:
        attachment.places.check(others)  # else it would be at modules that are no longer there
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
