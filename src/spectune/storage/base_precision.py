"""A frozen base in few bits: its layers' linears replaced in place, one after the other."""

import logging
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spectune.compute import fp8
from spectune.compute.fp8 import FrozenFp8Linear
from spectune.compute.frozen import FrozenLinear
from spectune.compute.int8 import FrozenInt8Linear
from spectune.compute.nf4 import FrozenNf4Linear, bitsandbytes_functions
from spectune.deltas import attached, uncalled
from spectune.errors import ConfigError, some
from spectune.families import Family, Linear, describe, quantised_weights
from spectune.storage.devices import resolve_dtype

log = logging.getLogger("spectune")

KINDS: dict[str, type[FrozenLinear]] = {
    kind.precision: kind for kind in (FrozenFp8Linear, FrozenNf4Linear, FrozenInt8Linear)
}
PRECISIONS = tuple(KINDS)


def check_precision(precision: str | None) -> None:
    """Raise ConfigError if there is no such `base_precision`; None means not quantised."""
    if precision is not None and precision not in KINDS:
        raise ConfigError(f"base_precision {precision!r} is unknown; expected one of {', '.join(KINDS)}")


def base_dtype(
    dtype: str | torch.dtype, device: torch.device, checkpoint_dtype: str | torch.dtype | None, precision: str | None
) -> torch.dtype:
    """What the base computes in: as `resolve_dtype` has it; "auto" with fp8 or nf4 is bfloat16 on CUDA."""
    if precision in ("fp8", "nf4") and device.type == "cuda" and dtype == "auto":
        return torch.bfloat16
    return resolve_dtype(dtype, device, checkpoint_dtype)


def quantise_base(model: PreTrainedModel, precision: str, *, device: torch.device | None = None) -> None:
    """Replace every linear inside the layers by one whose frozen weight is stored in `precision`, in place.

    Embeddings, norms, biases and the head stay as they are, and so do experts that are 3-D parameters, and linears
    whose weights the base uses without calling them, as a run of two tokens shows (both are logged). Each weight is
    freed before the next one is quantised. The fingerprint stays that of the base, so deltas go from one precision to
    another.

    Args:
        model: a base without deltas, not compiled, in the dtype it is to compute in.
        precision: "fp8", "nf4" (needs bitsandbytes) or "int8".
        device: where each weight is quantised and stays; None is where it is. The rest of the model is not moved.

    Raises:
        ConfigError: an unknown precision; deltas are attached; the base is quantised already; this device or these
            shapes cannot take the precision; a linear is of a kind of its own. The model is then as it was.
    """
    check_precision(precision)
    if attached(model):
        raise ConfigError(
            f"the base cannot be quantised under its deltas ({', '.join(attached(model))} attached): quantise first, "
            "attach after"
        )
    if held := quantised_weights(model):
        path, kind = next(iter(held.items()))
        raise ConfigError(f"this base is quantised already ({path}: {kind}); load it without base_precision")
    family = describe(model)
    places = [device] if device is not None else sorted({p.device for p in model.parameters()}, key=str)
    for place in places:
        if precision == "fp8":
            fp8.check_device(place, model.dtype)
        if precision == "nf4" and place.type != "meta":
            bitsandbytes_functions()
    versions = {linear.path: model.get_submodule(linear.path).weight._version for linear in family.linears}
    used_by_weight = uncalled(model, family)
    if written := [p for p, version in versions.items() if model.get_submodule(p).weight._version != version]:
        raise ConfigError(
            f"base_precision = {precision} is refused for this base: its own code writes into its weights when it goes "
            f"from training to evaluation ({some(written)}), which quantised ones cannot take. Load it without."
        )
    linears = [linear for linear in family.linears if linear.path not in used_by_weight]
    _check_linears(model, linears, precision)
    for linear in linears:
        _replace(model, linear.path, KINDS[precision], device)
    _tell_of_experts(model, family, precision)
    if used_by_weight:
        log.warning(
            "base_precision = %s: these linears' weights are used without their being called, and stay in %s: %s",
            precision, model.dtype, some(used_by_weight),
        )  # fmt: skip
    # transformers would write tensors that it cannot read again
    model.__dict__["save_pretrained"] = partial(_refuse_save_pretrained, precision)


def _check_linears(model: PreTrainedModel, linears: list[Linear], precision: str) -> None:
    problems: dict[str, list[str]] = {}
    for linear in linears:
        module = model.get_submodule(linear.path)
        reason = None
        if type(module) not in (nn.Linear, Conv1D):
            reason = f"{type(module).__name__} is a linear of its own kind, which a quantised one cannot stand in for"
        elif module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
            reason = "it has hooks (of accelerate?), which the quantised linear would lose: load the base without"
        elif precision == "fp8" and (linear.in_features % fp8.MULTIPLE or linear.out_features % fp8.MULTIPLE):
            reason = (
                f"fp8 products need sizes that are multiples of {fp8.MULTIPLE}, and it has {linear.in_features} "
                f"inputs and {linear.out_features} outputs: use int8 or nf4"
            )
        if reason is not None:
            problems.setdefault(reason, []).append(linear.path)
    if not linears:
        problems["no linear was found inside its layers"] = [type(model).__name__]
    if problems:
        lines = [f"{some(paths)}: {reason}" for reason, paths in problems.items()]
        raise ConfigError(f"base_precision = {precision} is refused for this base:\n" + "\n".join(lines))


def _replace(model: PreTrainedModel, path: str, kind: type[FrozenLinear], device: torch.device | None) -> None:
    parent_path, _, leaf = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    old = getattr(parent, leaf)
    weight, bias = old.weight.detach().to(device), old.bias  # to(None) leaves it where it is
    if bias is not None and device is not None:
        bias = nn.Parameter(bias.detach().to(device), requires_grad=bias.requires_grad)
    transposed = isinstance(old, Conv1D)
    new = kind(weight.T.contiguous() if transposed else weight, bias, transposed=transposed)
    setattr(parent, leaf, new.train(old.training))


def _tell_of_experts(model: PreTrainedModel, family: Family, precision: str) -> None:
    """Experts in one 3-D parameter are no linears: their weights stay in the base's dtype."""
    layers = tuple(layer.path + "." for layer in family.layers)
    if kept := [name for name, p in model.named_parameters() if p.dim() == 3 and name.startswith(layers)]:
        log.warning(
            "base_precision = %s: these experts' weights are 3-D parameters and stay in %s: %s",
            precision, model.dtype, some(kept),
        )  # fmt: skip


def _refuse_save_pretrained(precision: str, *_: Any, **__: Any) -> NoReturn:
    raise ConfigError(
        f"save_pretrained is refused: this base is in {precision}, which transformers could not read again. Save "
        "deltas with delta.save(folder); to save a model, load the base without base_precision."
    )
