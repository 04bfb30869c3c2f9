"""Attach a method to a model, and take it off again: all or nothing, bit for bit."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectune.compute.evaluating import evaluating
from spectune.deltas.delta import Delta
from spectune.deltas.method import Method, Setting
from spectune.deltas.probe import can_run
from spectune.deltas.proof import prove_that_sites_fire
from spectune.deltas.registry import Registry
from spectune.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9_.-]+")


def attach(
    model: PreTrainedModel,
    method: Method,
    name: str = "default",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    keep_base: bool = False,
) -> Delta:
    """Attach `method` to `model` as delta `name` and make it the active one, alone.

    Args:
        model: a transformers causal language model, on any device, not compiled yet.
        method: a config such as `LoRA(r=16)`.
        tokenizer: needed where a method starts from a text (`PromptTuning(init="text")`).
        seed: of the first weights; the same seed gives the same delta on every device.
        keep_base: for `FullFineTuning`: keep a copy of the base in host memory, which `detach` needs.

    Raises:
        ConfigError: a name in use or not `[A-Za-z0-9_.-]+`, a target that matches nothing, a base the method cannot
            take, a compiled model. The model is then as it was.
    """

    def first_weights(delta: Delta) -> None:
        generator = torch.Generator().manual_seed(seed)
        with evaluating(model):
            delta.initialise(Setting(model, delta.family, generator, tokenizer))

    return place(model, method, name, keep_base=keep_base, fill=first_weights)


def place(
    model: PreTrainedModel, method: Method, name: str, *, fill: Callable[[Delta], None], keep_base: bool = False
) -> Delta:
    """Attach with weights that `fill` writes: first ones, or a stored delta's. All or nothing."""
    _check(model, method, name)
    make_hooks_visible_to_the_compiler()
    registry = Registry.of(model) or Registry(model)
    delta = None
    try:
        delta = method.bind(model, registry.family, name, keep_base=keep_base)
        registry.deltas[name] = delta
        delta.open(registry)
        with registry.routed(None):
            fill(delta)
            if can_run(model):
                method.prove(delta, model)
        with registry.routed(name):
            prove_that_sites_fire(registry, delta)
    except BaseException:
        if delta is not None:
            delta.close(registry)
        registry.deltas.pop(name, None)
        if not registry.deltas:
            registry.close()
        raise
    registry.active = name
    return delta


def detach(model: PreTrainedModel, name: str) -> None:
    """Take delta `name` off. The base is bit for bit what it was, `requires_grad` included; if the delta was the
    active one, the bare base is active now.

    Raises:
        ConfigError: no such delta; or a fully tuned base of which no copy was kept (`attach(..., keep_base=True)`).
    """
    registry = Registry.of(model)
    if registry is None or name not in registry.deltas:
        known = ", ".join(repr(known) for known in registry.deltas) if registry else "none"
        raise ConfigError(f"no delta {name!r} is attached; attached are: {known}")
    if registry.in_use(name):
        raise ConfigError(f"delta {name!r} is in use by a `with spectune.route(...)`: detach it outside of that")
    registry.deltas[name].close(registry)
    del registry.deltas[name]
    if registry.active == name:
        registry.active = None
    if not registry.deltas:
        registry.close()


def attached(model: nn.Module) -> dict[str, Delta]:
    """The deltas on a model by name, in the order of attachment; empty where there are none."""
    registry = Registry.of(model)
    return {} if registry is None else dict(registry.deltas)


def _check(model: PreTrainedModel, method: Method, name: str) -> None:
    if any(getattr(m, "_compiled_call_impl", None) is not None or hasattr(m, "_orig_mod") for m in model.modules()):
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
    tuned = [other for other, delta in others.items() if delta.method.trains_base]
    if tuned:
        raise ConfigError(
            f"the base is fully tuned as {tuned[0]!r}; no other delta can stand beside it. Detach it first."
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
    before now has no such guards, so it is thrown away.
    """
    import torch._dynamo

    if torch._dynamo.config.skip_nnmodule_hook_guards:
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        with contextlib.suppress(AttributeError):
            torch._dynamo.reset()
