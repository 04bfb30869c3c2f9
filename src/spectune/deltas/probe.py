"""Looking at a base by running it: does every site of a delta fire, and which keys and values does text make?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectune.deltas.delta import Delta
from spectune.deltas.method import AttentionSite, OutputSite
from spectune.deltas.registry import Registry
from spectune.errors import ConfigError
from spectune.families import token_embedding


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
    """Run two tokens through the model and check that each of the delta's sites is reached.

    Raises:
        ConfigError: a module is never called (its weights are used some other way), or an attention module does not
            go through the registered attention function; all of them are named.
    """
    model = registry.model
    if not can_run(model):
        return  # nothing can be run; the first real forward fails loudly where a module is missing
    wanted = {site.path: model.get_submodule(site.path) for site, _ in delta.sites if isinstance(site, OutputSite)}
    called: set[str] = set()
    handles = [module.register_forward_hook(lambda *_, path=path: called.add(path)) for path, module in wanted.items()]
    registry.attention_calls = {}
    try:
        _run(model, [0, 1])
        attended = set(registry.attention_calls)
    finally:
        registry.attention_calls = None
        for handle in handles:
            handle.remove()
    silent = [path for path in wanted if path not in called]
    deaf = [
        site.path
        for site, _ in delta.sites
        if isinstance(site, AttentionSite) and id(model.get_submodule(site.path)) not in attended
    ]
    if silent or deaf:
        lines = [f"{path}: is never called in a forward pass" for path in silent]
        lines += [f"{path}: does not use the attention function set by set_attn_implementation" for path in deaf]
        raise ConfigError(
            f"{delta.method.label} would not act on every site of this {registry.family.model_type} model:\n"
            + "\n".join(lines)
            + "\nChoose other targets, or another method."
        )


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
        tokens = torch.tensor([ids], device=token_embedding(model).weight.device)
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
