"""Quantised linears, ours and other libraries': which weights of a model are, and what they stand for."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spectune.compute.frozen import FrozenLinear
from spectune.families.module_kinds import linear_shape

_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def base_precision(model: nn.Module) -> str | None:
    """The `base_precision` that the model was loaded with: "fp8", "nf4", "int8"; None for every other model."""
    return next((module.precision for module in model.modules() if isinstance(module, FrozenLinear)), None)


def quantised_weights(model: nn.Module) -> dict[str, str]:
    """Modules that hold quantised weights, by path, each with what it holds; deltas' left out.

    By the parameters' types, whoever quantised them: integers and float8, or tensors of a class of their own
    (torchao's say that they are floating point)."""
    return {
        path: f"{type(parameter).__name__} of {parameter.dtype}"
        for path, module in model.named_modules()
        if ".deltas." not in f".{path}."
        for parameter in module.parameters(recurse=False)
        if not is_plain(parameter)
    }


def dense_weight(module: nn.Module) -> Tensor | None:
    """The weight of a linear map, `[out_features, in_features]`, float32, decoded where it is quantised; None where
    the encoding is not known here."""
    if isinstance(module, FrozenLinear):
        return module.dequantised()
    weight: Any = module.weight
    if not isinstance(weight, Tensor):
        return None
    if is_plain(weight):
        return weight.float().T if isinstance(module, Conv1D) else weight.float()
    if type(weight).dequantize is not Tensor.dequantize:  # torchao's
        return weight.dequantize().float()
    state = getattr(weight, "quant_state", None)
    if state is not None and not getattr(state, "packing_format_for_cpu", False):  # bitsandbytes' 4 bit
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, state).float()
    return None


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear map's weight is `[in_features, out_features]` in the base, however it is stored here."""
    return module.transposed if isinstance(module, FrozenLinear) else isinstance(module, Conv1D)


def packed_away(model: PreTrainedModel) -> int:
    """Weights that a count of `numel` misses, because linears hold several in one number (4 bit)."""
    shapes = [(module.weight, shape) for module in model.modules() if (shape := linear_shape(module)) is not None]
    packed = [(weight, shape) for weight, shape in shapes if isinstance(weight, nn.Parameter) and not is_plain(weight)]
    return sum(shape[0] * shape[1] - weight.numel() for weight, shape in packed)


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is not quantised: of a floating type, and of torch's own class."""
    return type(weight) in (nn.Parameter, Tensor) and weight.dtype in _PLAIN
