"""Weights that are not where a model's modules hold them: loaded for each call (accelerate's offload), sharded away
(DeepSpeed's ZeRO-3), or not made at all (the meta device).
"""

from typing import Any

import torch
from torch import nn

from spectune.errors import ConfigError, some
from spectune.families import linear_shape, token_embedding


def offloaded(model: nn.Module) -> dict[str, torch.device]:
    """Modules whose weights accelerate's hooks load for each call, by path, with the device that they compute on."""
    found: dict[str, torch.device] = {}
    for path, module in model.named_modules():
        hook = _loading_hook(module)
        if hook is None:
            continue
        parts = module.named_modules(prefix=path) if hook.place_submodules else [(path, module)]
        found.update((name, torch.device(hook.execution_device)) for name, part in parts if _absent(part))
    return found


def execution_device(module: nn.Module) -> torch.device | None:
    """Where a module computes whose weights are loaded for each call; None for other modules."""
    hook = _loading_hook(module)
    return None if hook is None else torch.device(hook.execution_device)


def refuse_absent_weights(model: Any, label: str, *, trains_base: bool) -> None:
    """Raise ConfigError where a method cannot work, or not be proved, since weights are not there. `label`: of the
    method; `trains_base`: it changes the base's own weights. Modules that are offloaded, with the embeddings in place,
    are no obstacle to others."""
    loaded = offloaded(model)
    on_meta = [path for path, module in model.named_modules() if _absent(module)]
    missing = [path for path in on_meta if path not in loaded]
    if missing:
        raise ConfigError(
            f"{label} is refused: {len(missing)} modules of this model have weights on the meta device ({some(missing)}"
            "), which holds no numbers, and nothing that loads them. Load the model with from_pretrained, or fill it "
            "(model.to_empty(device=...), then load_state_dict)."
        )
    if empty := [path for path, module in model.named_modules() if _emptied(module)]:
        raise ConfigError(
            f"{label} is refused: weights of {len(empty)} modules are empty here ({some(empty)}), as DeepSpeed's "
            "ZeRO-3 leaves them. Attach to a model that was loaded without it; spectune shards bases itself (torchrun)."
        )
    if not loaded:
        return
    where = f"accelerate loads the weights of {len(loaded)} modules for each call ({some(list(loaded))})"
    cure = "Load the model without offload (no device_map; base_precision='nf4' or 'fp8' makes it smaller)"
    if trains_base:
        raise ConfigError(f"{label} is refused: it trains the base's own weights, and {where}. {cure}, or use LoRA.")
    if _absent(token_embedding(model)):
        raise ConfigError(
            f"{label} is refused: {where}, its token embeddings among them, so that nothing can be proved by running "
            f"it. {cure}, or with a device_map that keeps the embeddings on a device."
        )


def refuse_offloaded(model: nn.Module, what: str) -> None:
    """Raise ConfigError where weights that `what` has to read are not there."""
    loaded = offloaded(model)
    if loaded:
        raise ConfigError(
            f"{what} is refused: accelerate loads the weights of {len(loaded)} modules for each call "
            f"({some(list(loaded))}), and it needs them. Load the model without offload (no device_map)."
        )


def _loading_hook(module: nn.Module) -> Any:
    """accelerate's hook that loads a module's weights for each call, None where there is none."""
    hook = module.__dict__.get("_hf_hook")
    hooks = [hook, *getattr(hook, "hooks", ())]  # several in one
    return next((one for one in hooks if getattr(one, "offload", False) and hasattr(one, "execution_device")), None)


def _absent(module: nn.Module) -> bool:
    return any(parameter.device.type == "meta" for parameter in module.parameters(recurse=False))


def _emptied(module: nn.Module) -> bool:
    """Whether a linear map or an embedding has a weight of no numbers."""
    sizes = linear_shape(module)
    if isinstance(module, nn.Embedding):
        sizes = module.num_embeddings, module.embedding_dim
    weight = getattr(module, "weight", None)
    return sizes is not None and min(sizes) > 0 and isinstance(weight, nn.Parameter) and weight.numel() == 0
