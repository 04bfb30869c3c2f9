"""Whether an attention kernel is finite and right on this machine: forward and gradients against float64.

A kernel is right if output and gradients are finite everywhere, also in padding and for queries that see nothing (what
is not finite there reaches the rest through the values of the next layer: 0 * NaN is NaN), and differ from the
reference by no more than their type's rounding makes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from spectune.compute.cudnn import cudnn_attention
from spectune.compute.pack_layout import Kernel
from spectune.compute.varlen import flash_by_document, flash_takes, loop_by_document
from spectune.errors import first_line
from spectune.health.attention_cases import AttentionCase, Inputs

#: root of the mean square error, by that of the reference, of output or a gradient. 16 bits: a few roundings of 2^-9
#: (bfloat16) or 2^-12 (float16), and gradients cancel; what is wrong by one key of many is off by more
BOUNDS = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 2e-2}
#: torch's kernels; "cudnn" with a mask is looked at and never taken
BACKENDS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
#: what a run may take: "chosen" is what torch chooses where cuDNN's attention is off; "documents" and "loop" attend
#: within packs
KERNELS = (*BACKENDS, "chosen", "documents", "loop")
RIGHT, WRONG, NOT_FINITE, REFUSED = "right", "wrong", "not finite", "refused"


@dataclass(frozen=True)
class Finding:
    """What a kernel did with a case.

    Attributes:
        status: "right", "wrong", "not finite" or "refused" (by torch, which would take another kernel).
        errors: of "out", "query", "key", "value", relative; those that are finite.
        why: of a refusal its first line; else which of the four are not finite or off, and whether the queries of
            padding alone are.
    """

    case: AttentionCase
    kernel: str
    status: str
    errors: dict[str, float] = field(default_factory=dict)
    why: str = ""

    @property
    def worst(self) -> float:
        return max(self.errors.values(), default=0.0)

    @property
    def asked(self) -> bool:
        """Whether a run may make such a call of this kernel: cuDNN's is for no mask, and for no dropout."""
        if not self.kernel.startswith("cudnn"):
            return True
        return (self.case.mask == "causal" or "zero queries" in self.kernel) and not self.case.dropout


def kernels_for(case: AttentionCase) -> list[str]:
    """The kernels that a case is for. What takes no mask is asked where a run asks it: never for what needs one."""
    found = ["math", "flash", "efficient", "cudnn", "chosen"]
    if case.mask not in ("causal", "prefix"):
        found.remove("flash")
    return [*found, "documents", "loop"] if case.mask == "packs" and not case.dropout else found


def check_case(case: AttentionCase, device: torch.device) -> list[Finding]:
    """What every kernel that a case is for does with it."""
    inputs = Inputs(case, device)
    wanted = None if case.dropout else _reference(inputs, None)
    found = []
    for kernel in kernels_for(case):
        # a mask and a kernel that can do without one are two calls
        masks = (True, False) if case.mask == "prefix" and kernel not in ("math", "flash") else (None,)
        for masked in masks:
            name = kernel if masked is None else f"{kernel}, {'mask' if masked else 'zero queries'}"
            found.append(_check(name, kernel, inputs, wanted, masked=masked))
    return found


def _check(name: str, kernel: str, inputs: Inputs, wanted: list[Tensor] | None, *, masked: bool | None) -> Finding:
    case = inputs.case

    def run(value: Tensor | None = None) -> Tensor:
        torch.manual_seed(1)  # dropout's
        query, key, own = inputs.tensors
        return _attend(kernel, inputs, query, key, own if value is None else value, masked=masked)

    try:
        if case.dropout:
            kept = _kept(run, inputs)
            share = float(kept[inputs.visible.expand_as(kept)].float().mean())
            if abs(share - (1 - case.dropout)) > 0.03:
                return Finding(case, name, WRONG, why=f"dropout keeps {share:.3f} of the weights")
            wanted = _reference(inputs, kept / (1 - case.dropout))
        spoil_free_memory(inputs)
        out = run()
        spoil_free_memory(inputs)
        found = [out.detach(), *torch.autograd.grad(out, inputs.tensors, inputs.grad)]
        found = [tensor.double() for tensor in found]
    except RuntimeError as error:
        if torch.cuda.is_available() and "CUDA error" in str(error):
            raise  # nothing on this device works any more
        return Finding(case, name, REFUSED, why=first_line(error))
    assert wanted is not None
    return judge(name, inputs, found, wanted)


def spoil_free_memory(inputs: Inputs) -> None:
    """Leave NaN where the allocator takes the next tensors from: a kernel that does not write all of its output, as one
    may that skips what a mask hides, is found out now, and not in the second step of some run."""
    shapes = {tensor.shape for tensor in (inputs.grad, *inputs.tensors)} | {inputs.grad.shape[:-1]}
    kept = [
        torch.full(shape, torch.nan, dtype=dtype, device=inputs.device)
        for shape in shapes for dtype in (inputs.grad.dtype, torch.float32) for _ in range(4)
    ]  # fmt: skip
    del kept


def judge(kernel: str, inputs: Inputs, found: list[Tensor], wanted: list[Tensor]) -> Finding:
    """A kernel's output and gradients, in float64, beside the reference's."""
    names = ("out", "query", "key", "value")
    broken = [name for name, tensor in zip(names, found, strict=True) if not bool(tensor.isfinite().all())]
    errors = {}
    for name, ours, theirs in zip(names, found, wanted, strict=True):
        if name in broken:
            continue
        # what a query that sees nothing gives is nobody's
        off = (ours - theirs) * inputs.scored if name == "out" else ours - theirs
        # few keys: gradients of the scores cancel to nothing, and rounding is of what cancelled
        least = (theirs.numel() / inputs.case.length) ** 0.5
        errors[name] = float(off.norm()) / max(float(theirs.norm()), least)
    bound = BOUNDS[inputs.case.dtype]
    wrong = [name for name, error in errors.items() if error > bound]
    status = NOT_FINITE if broken else WRONG if wrong else RIGHT
    why = ", ".join(broken or wrong)
    seen = inputs.scored & inputs.real[:, None, :, None]
    by_query = [tensor for name, tensor in zip(names[:2], found, strict=False) if name in broken]
    if broken and set(broken) <= set(names[:2]) and all(bool(t[seen.expand_as(t)].isfinite().all()) for t in by_query):
        why += ", in padding alone"
    return Finding(inputs.case, kernel, status, errors, why)


def _attend(kernel: str, inputs: Inputs, query: Tensor, key: Tensor, value: Tensor, *, masked: bool | None) -> Tensor:
    case = inputs.case
    if kernel in ("documents", "loop"):
        return _by_document(kernel, inputs, query, key, value)
    needs_mask = case.mask != "causal" if masked is None else masked
    if kernel == "flash":
        needs_mask = False
    mask = inputs.visible if needs_mask else None
    groups = case.heads // case.kv_heads
    if mask is not None and groups > 1:  # as transformers does
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    before = 0 if needs_mask else case.lead
    if before:  # queries of zeros make it square, see deltas/hooks/prefix_kernel
        query = F.pad(query, (0, 0, before, 0))
    causal = mask is None and query.shape[2] > 1
    settings: dict[str, Any] = {
        "dropout_p": case.dropout,
        "is_causal": causal,
        "enable_gqa": mask is None and groups > 1,
    }
    if kernel == "chosen":
        with cudnn_attention(False):
            out = F.scaled_dot_product_attention(query, key, value, mask, **settings)
    else:
        with sdpa_kernel([BACKENDS[kernel]]):
            out = F.scaled_dot_product_attention(query, key, value, mask, **settings)
    return out[:, :, before:]


def _by_document(kernel: str, inputs: Inputs, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if kernel == "documents" and not flash_takes(query, key, value):
        raise RuntimeError("flash attention does not take these")
    one, two, three = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    attend: Kernel = flash_by_document if kernel == "documents" else loop_by_document
    found = attend(one, two, three, inputs.spans, inputs.spans)
    rows, heads, length, dim = query.shape
    return found.reshape(rows, length, heads, dim).transpose(1, 2)


def _reference(inputs: Inputs, kept: Tensor | None) -> list[Tensor]:
    """Output and gradients in float64, as it is defined. `kept`: by what dropout multiplies each weight."""
    tensors = [tensor.detach().double().requires_grad_() for tensor in inputs.tensors]
    query, key, value = tensors
    groups = inputs.case.heads // inputs.case.kv_heads
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~inputs.visible, -torch.inf).masked_fill(~inputs.scored, 0)
    weights = scores.softmax(-1) * inputs.scored  # of a query that sees nothing
    out = (weights if kept is None else weights * kept) @ value
    return [out.detach(), *torch.autograd.grad(out, tensors, inputs.grad.double())]


def _kept(run: Callable[[Tensor], Tensor], inputs: Inputs) -> Tensor:
    """Which weights dropout keeps, boolean `[rows, heads, length, keys]`: with the unit matrix for values (as many keys
    as a head is wide) the output is the weights."""
    rows, heads, keys, dim = inputs.tensors[2].shape
    assert keys == dim, "weights are read off where a head is as wide as there are keys"
    unit = torch.eye(dim, dtype=inputs.tensors[2].dtype, device=inputs.device).expand(rows, heads, keys, dim)
    return run(unit).detach() != 0
