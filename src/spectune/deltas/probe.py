"""Looking at a base by running it: does every site of a delta fire, and which keys and values does text make?"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectune.deltas.delta import Delta
from spectune.deltas.method import AttentionSite, OutputSite
from spectune.deltas.registry import Registry
from spectune.errors import ConfigError, SpectuneError, first_line
from spectune.families import token_embedding

log = logging.getLogger("spectune")
#: places named in an error or a warning; the others are counted
_NAMED = 5


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own training flag is put back, as the caller may mix them."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def can_run(model: nn.Module) -> bool:
    """Whether the model has weights to run with: none stands on the meta device."""
    return not any(parameter.device.type == "meta" for parameter in model.parameters())


def prove_that_sites_fire(registry: Registry, delta: Delta) -> None:
    """Run two tokens through the model and check that each of the delta's sites is reached, and gradients each weight.

    Where the base does not call a module (it uses its parameters some other way), or with tensors of other widths
    (groups apart), the delta changes the parameter in place of the output, if it can.

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
        s.path for s in outputs if not calls.get(s.path, False) and delta.act_on_parameter(s.path, registry)
    ]
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
        _run(model, [0, 1])
        attended = set(registry.attention_calls)
    finally:
        registry.attention_calls = None
    silent = [s.path for s in outputs if s.path not in calls and s.path not in on_parameters]
    silent = [path for path in silent if not registry.gathers_tokens(path)]  # an expert that two tokens did not go to
    deaf = [
        site.path
        for site, _ in delta.sites
        if isinstance(site, AttentionSite) and id(model.get_submodule(site.path)) not in attended
    ]
    reached = _reached_by_gradients(registry, delta)
    unused = {path for path in on_parameters if reached and not any(n.startswith(path + ".") for n in reached)}
    silent += [path for path in on_parameters if path in unused and not registry.gathers_tokens(path)]
    if silent or deaf:
        lines = [f"{path}: is never called in a forward pass" for path in silent]
        lines += [f"{path}: does not use the attention function set by set_attn_implementation" for path in deaf]
        raise ConfigError(
            f"{delta.method.label} would not act on every site of this {registry.family.model_type} model:\n"
            + "\n".join(lines)
            + "\nChoose other targets, or another method."
        )
    _tell_of_unreached(registry, delta, reached)


def _calls(model: PreTrainedModel, wanted: dict[str, OutputSite]) -> dict[str, bool]:
    """Which of the modules are called for two tokens, and whether with tensors of their sites' widths. Some are called
    in evaluation and not in training: these count as not called."""
    if not wanted:
        return {}
    found = _calls_now(model, wanted)
    try:
        in_training = _calls_now(model, wanted, training=True)
    except Exception:  # some types want more than a text there; what trains them meets that itself
        return found
    return {path: fits for path, fits in found.items() if path in in_training}


def _calls_now(model: PreTrainedModel, wanted: dict[str, OutputSite], *, training: bool = False) -> dict[str, bool]:
    found: dict[str, bool] = {}

    def seen(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if type(output) in (tuple, list) else output
            found[path] = isinstance(first, Tensor) and first.shape[-1:] == (wanted[path].out_features,)

        return hook

    handles = [model.get_submodule(path).register_forward_hook(seen(path)) for path in wanted]
    try:
        if training:
            _run_in_training(model, [0, 1])
        else:
            _run(model, [0, 1])
    finally:
        for handle in handles:
            handle.remove()
    return found


def _run_in_training(model: PreTrainedModel, ids: list[int]) -> None:
    """Without gradients; random state and modes are put back."""
    still = [module for module in model.modules() if not module.training]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        try:
            model.train()
            _logits(model, ids)
        finally:
            for module in still:
                module.training = False


def _reached_by_gradients(registry: Registry, delta: Delta) -> set[str]:
    """The delta's weights that the logits depend on in a differentiable way. Empty where it cannot be found out."""
    named = dict(delta.named_parameters())
    if delta.method.trains_base or not named:
        return set()
    model = registry.model
    before = {name: p.requires_grad for name, p in named.items()}
    for parameter in named.values():
        parameter.requires_grad_(True)
    try:
        with evaluating(model), torch.enable_grad():
            logits = _logits(model, [0, 1, 0, 1])
            if not logits.requires_grad:
                return set()
            gradients = torch.autograd.grad(logits.float().sum(), list(named.values()), allow_unused=True)
    finally:
        for name, parameter in named.items():
            parameter.requires_grad_(before[name])
    return {name for name, gradient in zip(named, gradients, strict=True) if gradient is not None}


def _tell_of_unreached(registry: Registry, delta: Delta, reached: set[str]) -> None:
    names = [name for name, _ in delta.named_parameters()]
    if delta.method.trains_base or not names:
        return
    label, kind = delta.method.label, registry.family.model_type
    if not reached:
        raise ConfigError(
            f"{label} is refused: no gradient comes from the logits of this {kind} model to any of its weights (its "
            "own code takes them off the graph), so nothing would be trained. Use full fine-tuning or another model."
        )
    still = [name for name in names if name not in reached and not registry.gathers_tokens(name.rpartition(".")[0])]
    if still:
        shown = ", ".join(still[:_NAMED]) + (f" and {len(still) - _NAMED} more" if len(still) > _NAMED else "")
        log.warning(
            "%s: %d of its %d tensors get no gradient from this %s model and stay as they are: what they change is "
            "only which tokens or experts are chosen, or is not used for the logits (%s)",
            label, len(still), len(names), kind, shown,
        )  # fmt: skip


def capture_keys_and_values(
    model: PreTrainedModel, paths: list[str], ids: list[int]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The keys and values `[kv_heads, len(ids), dim]` that the bare base makes of a text, for each attention module.

    They are taken where attention uses them, after rotary positions. The modules must be open attention sites.
    """
    registry = Registry.of(model)
    assert registry is not None, "capture is called from initialise, when the model has a registry"
    registry.attention_calls = {}
    try:
        with registry.routed(None):
            _run(model, ids)
        calls = registry.attention_calls
    finally:
        registry.attention_calls = None
    modules = {path: model.get_submodule(path) for path in paths}
    return {
        path: (calls[id(module)][0][0].float(), calls[id(module)][1][0].float())
        for path, module in modules.items()
        if id(module) in calls
    }


def cached_values(model: PreTrainedModel, watched: list[str]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """What modules at `watched` give for three tokens, `[3, features]`, and the values that the bare base then caches,
    layer by layer, `[3, kv_heads * dim]`: values go from their projection into the cache unchanged."""
    seen: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        return lambda module, args, output: seen.__setitem__(path, output.detach()[0])

    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in watched]
    try:
        with evaluating(model):
            tokens = torch.tensor([[1, 2, 3]], device=token_embedding(model).weight.device)
            out = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=True)
    finally:
        for handle in handles:
            handle.remove()
    cache = getattr(out, "past_key_values", None) or getattr(out, "cache", None)
    layers = getattr(cache, "layers", [])
    return seen, [layer.values[0].transpose(0, 1).flatten(1) for layer in layers if hasattr(layer, "values")]


def counts_padding(model: PreTrainedModel) -> bool:
    """Whether the bare base's own positions, where the caller gives none, are the index in the batch, padding counted
    (True), or the count of real tokens (False).

    Raises:
        ConfigError: neither; then a caller must give position_ids.
    """
    registry = Registry.of(model)
    assert registry is not None, "asked by the decoder's hook, when the model has a registry"
    device = token_embedding(model).weight.device
    ids = torch.tensor([[1, 2, 3]], device=device)
    mask = torch.tensor([[0, 1, 1]], device=device)
    with registry.routed(None), evaluating(model):
        own, index, count = (
            model(input_ids=ids, attention_mask=mask, use_cache=False, **given).logits[:, -1].float()
            for given in (
                {},
                {"position_ids": torch.tensor([[0, 1, 2]], device=device)},
                {"position_ids": torch.tensor([[0, 0, 1]], device=device)},
            )
        )
    if torch.allclose(own, index, rtol=1e-4, atol=1e-5):
        return True
    if torch.allclose(own, count, rtol=1e-4, atol=1e-5):
        return False
    raise ConfigError(
        f"{type(model).__name__} numbers the positions of a left-padded batch in a way of its own: give position_ids "
        "where rows with virtual tokens share a left-padded batch with others"
    )


def _run(model: PreTrainedModel, ids: list[int]) -> None:
    with evaluating(model):
        _logits(model, ids)


def _logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Of one row, without cache.

    Raises:
        ConfigError: the model's own code fails on it with the delta that is on now, and without it does not.
    """
    tokens = torch.tensor([ids], device=token_embedding(model).weight.device)

    def run() -> Tensor:
        found: Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
        return found

    registry = Registry.of(model)
    name = None if registry is None else registry.current.name
    try:
        return run()
    except (SpectuneError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        if registry is None or name is None:
            raise
        if not _runs(registry, run):
            raise
        raise _refused(registry, name, error) from error


def _runs(registry: Registry, run: Callable[[], Tensor]) -> bool:
    """Whether the bare base runs."""
    try:
        with registry.routed(None):
            run()
    except Exception:
        return False
    return True


def _refused(registry: Registry, name: str, error: Exception) -> ConfigError:
    """The model's own code fails where a delta is on, and without it does not."""
    kind = registry.family.model_type
    return ConfigError(
        f"{registry.deltas[name].method.label} is refused: this {kind} model's own code does not take it "
        f"({type(error).__name__}: {first_line(error)}). The bare model runs. Use another method, such as LoRA."
    )
