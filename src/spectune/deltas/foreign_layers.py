"""Layers that another library, or the user, has put around a base's own: deltas would act inside of them, too."""

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from spectune.errors import ConfigError, some
from spectune.families import linear_shape

#: libraries whose modules are adapters, whatever they are called
_LIBRARIES = ("peft", "adapters", "loralib", "opendelta")
#: and those whose modules are a base's own
_OF_BASES = ("torch", "transformers", "spectune")


def refuse_foreign_layers(model: Any) -> None:
    """Raise ConfigError where a model is wrapped, or holds adapters of another library, low-rank maps beside a linear,
    or weights that are computed of others in every pass (parametrizations, weight norm, pruning)."""
    found = {path: what for path, module in model.named_modules() if (what := _adapter(module)) is not None}
    if found or _library(model) is not None:
        path, what = next(iter(found.items()), ("the model", f"{type(model).__name__} of {_library(model)}"))
        raise ConfigError(
            f"this model has adapters in it already ({len(found) or 1} modules: {path or 'the model'} is {what}); "
            "deltas would act inside of them, and they would be part of what is trained, stored and merged. Merge them "
            "into the base first (PEFT: model = peft_model.merge_and_unload()), or take them off (PEFT: "
            "model = peft_model.unload()) and load their folder beside other deltas with spectune.load_delta(model, "
            "folder)."
        )
    computed = [path for path, module in model.named_modules() if _is_computed(module)]
    if computed:
        raise ConfigError(
            f"weights of {some(computed)} are computed of other tensors in every pass (a parametrization, weight norm, "
            "spectral norm or pruning), so that a delta could be neither merged into them nor stored for them. Make "
            "them plain first: torch.nn.utils.parametrize.remove_parametrizations(module, 'weight'), "
            "torch.nn.utils.remove_weight_norm(module) or torch.nn.utils.prune.remove(module, 'weight')."
        )


def _library(module: nn.Module) -> str | None:
    """The library of adapters that a module's class, or a class that it is made of, comes from."""
    packages = [kind.__module__.split(".")[0] for kind in type(module).__mro__]
    return next((package for package in packages if package in _LIBRARIES), None)


def _adapter(module: nn.Module) -> str | None:
    """What adapter a module is, None where it is none."""
    library = _library(module)
    if library is not None:
        return f"{type(module).__name__} of {library}"
    if type(module).__module__.split(".")[0] not in _OF_BASES and _has_a_low_rank_path(module):
        return f"{type(module).__name__}, a linear with a low-rank path beside it"
    return None


def _has_a_low_rank_path(module: nn.Module) -> bool:
    """Whether all that a module has is one linear map `in -> out`, itself or inside of it, and maps `in -> r` and
    `r -> out` beside it, with r smaller than both."""
    maps = [shape for part in module.modules() if (shape := linear_shape(part)) is not None]
    # matrices without a module of their own, applied one way or the other
    named = [(name.rpartition(".")[2], p) for name, p in module.named_parameters()]
    own = [p for name, p in named if p.dim() == 2 and name != "weight"]
    if not maps or not 3 <= len(maps) + len(own) <= 9:
        return False
    inner, outer = max(maps, key=lambda shape: shape[0] * shape[1])
    others = list(maps)
    others.remove((inner, outer))
    ranks_in = [r for i, r in others if i == inner and r < min(inner, outer)] + _ranks(own, inner, outer)
    ranks_out = [r for r, o in others if o == outer and r < min(inner, outer)] + _ranks(own, outer, inner)
    fitting = all(i == inner or o == outer for i, o in others)
    return fitting and bool(set(ranks_in) & set(ranks_out))


def _ranks(matrices: list[nn.Parameter], size: int, other: int) -> list[int]:
    """The smaller sides of matrices whose larger one is `size`."""
    shapes = [tuple(matrix.shape) for matrix in matrices]
    return [min(shape) for shape in shapes if max(shape) == size and min(shape) < min(size, other)]


def _is_computed(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.conv._ConvNd):
        return False  # encoders of sound are made that way; no text goes through them
    if parametrize.is_parametrized(module):
        return True
    plain = isinstance(module, nn.Linear | nn.Embedding | Conv1D)
    return plain and "weight" not in module._parameters and isinstance(getattr(module, "weight", None), Tensor)
