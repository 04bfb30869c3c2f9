"""The proof at attach: every site of a delta is reached by a text, and gradients come to its weights."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from spectune.compute.evaluating import evaluating, rehearsing
from spectune.deltas.delta import Delta
from spectune.deltas.method import AttentionSite, OutputSite
from spectune.deltas.probe import can_run, first_logits, run
from spectune.deltas.registry import Registry
from spectune.errors import ConfigError, SpectuneError, first_line
from spectune.families import Family

log = logging.getLogger("spectune")
#: places named in an error or a warning; the others are counted
_NAMED = 5


def prove_that_sites_fire(registry: Registry, delta: Delta) -> None:
    """Run two tokens through the model and check that each of the delta's sites is reached, and gradients each weight.

    Where the base does not call a module (it uses its parameters some other way), or where the output is not its linear
    map (groups apart, a router's scores), the delta changes the parameter in place of the output, if it can.

    Raises:
        ConfigError: a module is never called, an attention module does not go through the registered attention
            function, or no gradient comes to any weight; all of them are named.
    """
    model = registry.model
    if not can_run(model):
        return  # nothing can be run; the first real forward fails loudly where a module is missing
    with registry.routed(None):
        calls = _calls(model, {s.path: s for s, _ in delta.sites if isinstance(s, OutputSite)})
    outputs = [site for site, _ in delta.sites if isinstance(site, OutputSite)]
    on_parameters = [
        s.path
        for s in outputs
        # an expert that two tokens did not go to is called by others
        if (s.path in calls or not registry.family.gathers_tokens(s.path))
        and not calls.get(s.path, False)
        and delta.act_on_parameter(s.path, registry)
    ]
    with_dropout = [
        path
        for path in on_parameters
        if any(isinstance(m, nn.Dropout) for m in delta.module_at(path).modules())  # type: ignore[union-attr]
    ]
    if with_dropout:
        log.warning(
            "%s: dropout does not act at %s: the base uses these weights without a call whose input could be dropped",
            delta.method.label, _some(with_dropout),
        )  # fmt: skip
    misfits = [s for s in outputs if calls.get(s.path) is False and s.path not in on_parameters]
    if misfits:
        raise ConfigError(
            f"{delta.method.label} is refused: "
            + "; ".join(f"{s.path} does not give tensors of {s.out_features} features" for s in misfits[:_NAMED])
            + f" ({len(misfits)} in all): this {registry.family.model_type} model works on several streams or groups "
            "there. Choose other targets or another placement, or another method."
        )
    registry.attention_calls = {}
    try:
        run(model, [0, 1])
        attended = set(registry.attention_calls)
    finally:
        registry.attention_calls = None
    silent = [s.path for s in outputs if s.path not in calls and s.path not in on_parameters]
    silent = [
        path for path in silent if not registry.family.gathers_tokens(path)
    ]  # an expert that two tokens did not go to
    deaf = [
        site.path
        for site, _ in delta.sites
        if isinstance(site, AttentionSite) and id(model.get_submodule(site.path)) not in attended
    ]
    reached = _reached_by_gradients(registry, delta)
    if reached:
        unused = [path for path in on_parameters if not any(name.startswith(path + ".") for name in reached)]
        silent += [path for path in unused if not registry.family.gathers_tokens(path)]
    if silent or deaf:
        lines = [f"{path}: is never called in a forward pass" for path in silent]
        lines += [f"{path}: does not use the attention function set by set_attn_implementation" for path in deaf]
        raise ConfigError(
            f"{delta.method.label} would not act on every site of this {registry.family.model_type} model:\n"
            + "\n".join(lines)
            + "\nChoose other targets, or another method."
        )
    _tell_of_unreached(registry, delta, reached)


def uncalled(model: PreTrainedModel, family: Family) -> list[str]:
    """Linears of the layers that two tokens do not call, in evaluation or not in training: the base uses their weights
    some other way. Experts in a list are left out, which others may call. Empty where the model cannot be run as it is.
    """
    if not can_run(model):
        return []
    sites = {t.path: OutputSite(t.path, t.in_features, t.out_features) for t in family.linears}
    try:
        called = _calls(model, sites)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        log.warning(
            "%s cannot be run on two tokens as it is loaded: whether it calls all of its linears is not known (%s)",
            type(model).__name__, first_line(error),
        )  # fmt: skip
        return []
    return [path for path in sites if path not in called and not family.gathers_tokens(path)]


def _calls(model: PreTrainedModel, wanted: dict[str, OutputSite]) -> dict[str, bool]:
    """Which of the modules are called for two tokens, and whether with tensors of their sites' widths. Some are called
    in evaluation and not in training: these count as not called."""
    if not wanted:
        return {}
    found = _calls_now(model, wanted)
    try:
        in_training = _calls_now(model, wanted, training=True)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception:  # some types want more than a text there; what trains them meets that itself
        return found
    return {path: fits for path, fits in found.items() if path in in_training}


def _calls_now(model: PreTrainedModel, wanted: dict[str, OutputSite], *, training: bool = False) -> dict[str, bool]:
    found: dict[str, bool] = {}

    def seen(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if type(output) in (tuple, list) else output
            wide = isinstance(first, Tensor) and first.shape[-1:] == (wanted[path].out_features,)
            found[path] = wide and _is_its_linear_map(module, args, first)

        return hook

    handles = [model.get_submodule(path).register_forward_hook(seen(path)) for path in wanted]
    try:
        if training:
            with rehearsing(model, model.device):
                first_logits(model, [0, 1])
        else:
            run(model, [0, 1])
    finally:
        for handle in handles:
            handle.remove()
    return found


def _is_its_linear_map(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> bool:
    """Whether what a linear gives is its linear map. One of a class of its own may give something that is made of it
    (routers give scores of the chosen experts)."""
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return True
    weight, bias, x = module.weight, module.bias, args[0] if args else None
    plain = type(weight) is nn.Parameter and weight.is_floating_point() and isinstance(x, Tensor)
    if not plain or x is None or x.shape[-1] != weight.shape[1]:
        return True  # quantised ones are of classes of their own too, and linear maps
    made = F.linear(x.to(weight.dtype), weight, bias)
    return made.shape == output.shape and torch.allclose(made.float(), output.float(), rtol=1e-2, atol=1e-3)


def _reached_by_gradients(registry: Registry, delta: Delta) -> set[str] | None:
    """The delta's weights that the logits depend on in a differentiable way; None where that cannot be found out (no
    gradients may be taken now, or the base has no backward pass, which is for inference alone)."""
    named = dict(delta.named_parameters())
    if delta.method.trains_base or not named or torch.is_inference_mode_enabled():
        return None
    model = registry.model
    before = {name: p.requires_grad for name, p in named.items()}
    for parameter in named.values():
        parameter.requires_grad_(True)
    try:
        with evaluating(model), torch.enable_grad():
            logits = first_logits(model, [0, 1, 0, 1])
            if not logits.requires_grad:
                return set()
            gradients = torch.autograd.grad(logits.float().sum(), list(named.values()), allow_unused=True)
    except (torch.OutOfMemoryError, SpectuneError):
        raise
    except RuntimeError as error:  # what trains it meets the same
        log.info("%s: no backward pass through this base: %s", delta.method.label, first_line(error))
        return None
    finally:
        for name, parameter in named.items():
            parameter.requires_grad_(before[name])
    return {name for name, gradient in zip(named, gradients, strict=True) if gradient is not None}


def _tell_of_unreached(registry: Registry, delta: Delta, reached: set[str] | None) -> None:
    if reached is None:
        return
    names = [name for name, _ in delta.named_parameters()]
    label, kind = delta.method.label, registry.family.model_type
    if not reached:
        raise ConfigError(
            f"{label} is refused: no gradient comes from the logits of this {kind} model to any of its weights (its "
            "own code takes them off the graph), so nothing would be trained. Use full fine-tuning or another model."
        )
    still = [
        name for name in names if name not in reached and not registry.family.gathers_tokens(name.rpartition(".")[0])
    ]
    if still:
        log.warning(
            "%s: %d of its %d tensors get no gradient from this %s model and stay as they are: what they change is "
            "only which tokens or experts are chosen, or is not used for the logits (%s)",
            label, len(still), len(names), kind, _some(still),
        )  # fmt: skip


def _some(paths: list[str]) -> str:
    rest = len(paths) - _NAMED
    return ", ".join(paths[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
