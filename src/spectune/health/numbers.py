"""Whether what computes in few bits, and attention, gives right numbers on this machine's device."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spectune.compute.fp8 import FrozenFp8Linear, check_device
from spectune.compute.frozen import FrozenLinear
from spectune.compute.int8 import FrozenInt8Linear
from spectune.compute.nf4 import FrozenNf4Linear
from spectune.errors import ConfigError
from spectune.health.attention_cases import FEW, AttentionCase
from spectune.health.attention_check import REFUSED, RIGHT, Finding, check_case
from spectune.health.outcome import FAILED, NOT_HERE, OK, Outcome

#: kernel -> what to do where it is wrong
_WITHOUT = {
    "cudnn": "Set TORCH_CUDNN_SDPA_DEPRIORITIZED=1 in the environment: torch then takes another kernel",
    "documents": "Train with --set packing=false",
    "loop": "Train with --set packing=false",
}
#: root mean square error of a product, relative, by what both operands are stored in. e4m3 rounds by 2^-5 on average of
#: each operand, int8 and nf4 are compared with what their own weight stands for, in bfloat16
_BOUNDS = {"fp8": 6e-2, "int8": 1e-2, "nf4": 1e-2}


def here() -> torch.device:
    """The device that a run would take."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def attention(
    check: Callable[[AttentionCase, torch.device], list[Finding]] = check_case, few: Sequence[AttentionCase] = FEW
) -> Outcome:
    """Every attention kernel that a run may take, forward and gradients, against float64."""
    findings = [finding for case in few for finding in check(case, here()) if finding.status != REFUSED]
    asked = [finding for finding in findings if finding.asked]
    wrong = [finding for finding in asked if finding.status != RIGHT]
    if wrong:
        kernels = dict.fromkeys(finding.kernel.split(",")[0] for finding in wrong)
        first = wrong[0]
        says = (
            f"{', '.join(kernels)}: {len(wrong)} of {len(asked)} calls, first {first.case}: {first.status} {first.why}"
        )
        return Outcome("attention", FAILED, says, _advice(kernels))
    counted = Counter(finding.kernel.split(",")[0] for finding in asked)
    worst = max((finding.worst for finding in asked), default=0.0)
    says = f"{', '.join(counted)}: {len(asked)} calls finite and right, worst error {worst:.1%}"
    unasked = [finding for finding in findings if not finding.asked and finding.status != RIGHT]
    if unasked:
        says += (
            f"; cuDNN's with a mask: {unasked[0].status}. spectune never takes it; in loops of your own call "
            "torch.backends.cuda.enable_cudnn_sdp(False)"
        )
    return Outcome("attention", OK, says)


def _advice(kernels: dict[str, None]) -> str:
    known = dict.fromkeys(_WITHOUT[kernel] for kernel in kernels if kernel in _WITHOUT)
    return "; ".join(known) or "Load bases with eager attention (attn_implementation='eager'), or use another torch"


def fp8() -> Outcome:
    """Products in fp8, which a base stored so goes through."""
    device = here()
    if device.type != "cuda":
        return Outcome("fp8", NOT_HERE, f"a {device.type.upper()} has no fp8 products",
                       "A base in fp8 runs through float32 copies, which is slow")  # fmt: skip
    try:
        check_device(device, torch.bfloat16)
    except ConfigError as error:
        return Outcome("fp8", NOT_HERE, str(error), "A base in bfloat16, int8 or nf4 runs")
    return stored_products("fp8", [FrozenFp8Linear])


def codes() -> Outcome:
    """Products with bases in int8 and nf4."""
    kinds: list[type[FrozenLinear]] = [FrozenInt8Linear]
    has_nf4 = importlib.util.find_spec("bitsandbytes") is not None
    if has_nf4:
        kinds.append(FrozenNf4Linear)
    found = stored_products("int8-nf4", kinds)
    if found.status == OK and not has_nf4:
        says = f"{found.says}; nf4 needs bitsandbytes, which is not installed"
        advice = "A base in int8 takes twice the memory of one in nf4: pip install 'spectune[quantised]'"
        return Outcome(found.name, NOT_HERE, says, advice)
    return found


def stored_products(name: str, kinds: Sequence[type[FrozenLinear]]) -> Outcome:
    """Output and input gradient of linears whose weights are stored so, against what the weight stands for."""
    device = here()
    generator = torch.Generator().manual_seed(0)
    weight, x, grad = (torch.randn(shape, generator=generator) for shape in ((256, 128), (64, 128), (64, 256)))
    said = []
    for kind in kinds:
        error = _product_error(kind, [t.to(device, torch.bfloat16) for t in (weight, x, grad)])
        bound = _BOUNDS[kind.precision]
        if not error <= bound:  # NaN is not either
            says = f"{kind.precision}: products are off by {error:.1%}, expected at most {bound:.0%}"
            return Outcome(name, FAILED, says, f"Do not load bases with base_precision={kind.precision} here")
        said.append(f"{kind.precision} off by {error:.1%}")
    return Outcome(name, OK, f"products and input gradients right: {', '.join(said)}")


def _product_error(kind: type[FrozenLinear], given: Sequence[Tensor]) -> float:
    weight, x, grad = given
    linear = kind(weight, None)
    x = x.requires_grad_()
    out = linear(x)
    [found] = torch.autograd.grad(out, [x], grad)
    stored = linear.dequantised().double()
    pairs = ((out.detach(), x.detach().double() @ stored.T), (found, grad.double() @ stored))
    return max(float((ours.double() - theirs).norm() / theirs.norm()) for ours, theirs in pairs)
