"""The fast paths, which methods each is run with, and what is tolerated of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

METHODS = ("lora", "full", "prefix", "prompt", "bitfit", "adapter")
FROZEN = ("lora", "prefix", "prompt", "bitfit", "adapter")

#: "exact": the same mathematics in float32; "rounding": the same in bfloat16, so that it rounds in other places;
#: "approximate": other mathematics (a base or an optimizer in few bits)
Kind = Literal["exact", "rounding", "approximate"]


@dataclass(frozen=True)
class Path:
    """One way to train.

    Attributes:
        settings: of `TrainingConfig`.
        methods: that it is run with; `why` says why not with all.
        precision: `base_precision`. Such a base computes in bfloat16 on CUDA, in float32 elsewhere.
        devices: where there is such a path.
        tier: 0 is run first.
        cosine: the least that a gradient's cosine to the plain loop's in float64 may be, for an approximate path.
        valid: what its validation loss may be off, nats a token.
        decoded: its gradient is that over the decoded base, up to rounding: activations are not quantised.
    """

    label: str
    settings: dict[str, Any] = field(default_factory=dict)
    kind: Kind = "exact"
    methods: tuple[str, ...] = METHODS
    precision: str | None = None
    devices: tuple[str, ...] = ("cuda", "cpu")
    tier: int = 0
    cosine: float = 0.0
    valid: float = 0.0
    decoded: bool = False

    @property
    def clip(self) -> float:
        return float(self.settings.get("max_grad_norm", 1.0))

    def dtype_on(self, device: str) -> torch.dtype:
        low = self.kind == "rounding" or (self.precision is not None and device == "cuda")
        return torch.bfloat16 if low else torch.float32


COMPILED = {"torch_compile": True}
PATHS: dict[str, Path] = {
    "eager": Path("chunked loss"),
    "packed": Path("packing (masks; a loop over documents on a CPU)", {"packing": True}),
    "compiled-bf16": Path("compiled, bfloat16", COMPILED, "rounding"),
    "packed-bf16": Path("packing, bfloat16 (flash attention by document on CUDA)", {"packing": True}, "rounding"),
    "compiled": Path("compiled", COMPILED),
    "graphs-bf16": Path(
        "compiled, CUDA graphs, bfloat16", {**COMPILED, "cuda_graphs": True}, "rounding", devices=("cuda",)
    ),
    "checkpointed": Path(
        "gradient_checkpointing true", {"gradient_checkpointing": True}, methods=("lora", "full", "prefix"), tier=1
    ),
    "selective": Path(
        "selective recomputation", {"gradient_checkpointing": "selective"}, methods=("lora", "prefix"), tier=1
    ),
    "offload": Path(
        "block inputs in host memory",
        {"gradient_checkpointing": "offload"},
        methods=("lora", "full"),
        devices=("cuda",),
        tier=1,
    ),
    "in-backward": Path(
        "AdamW in backward", {"optim": "adamw_in_backward", "max_grad_norm": 0.0}, methods=("full", "lora"), tier=1
    ),
    "8bit": Path(
        "8-bit AdamW", {"optim": "adamw_8bit"}, "approximate", ("full", "lora"), tier=1, cosine=0.9999, valid=0.02
    ),
    "fp8": Path(
        "base in fp8",
        kind="approximate",
        methods=("lora", "bitfit", "prefix"),
        precision="fp8",
        tier=1,
        cosine=0.8,
        valid=0.1,
    ),
    "int8": Path(
        "base in int8",
        kind="approximate",
        methods=("lora", "bitfit"),
        precision="int8",
        tier=1,
        cosine=0.98,
        valid=0.02,
        decoded=True,
    ),
    "nf4": Path(
        "base in NF4",
        kind="approximate",
        methods=("lora", "bitfit"),
        precision="nf4",
        tier=1,
        cosine=0.8,
        valid=0.1,
        decoded=True,
    ),
    "packed-compiled-bf16": Path(
        "packing, compiled, bfloat16", {**COMPILED, "packing": True}, "rounding", ("lora", "prefix"), tier=2
    ),
    "selective-compiled-bf16": Path(
        "selective, compiled, bfloat16",
        {**COMPILED, "gradient_checkpointing": "selective"},
        "rounding",
        ("lora",),
        tier=2,
    ),
    "checkpointed-compiled-bf16": Path(
        "gradient_checkpointing true, compiled, bfloat16",
        {**COMPILED, "gradient_checkpointing": True},
        "rounding",
        ("lora",),
        tier=2,
    ),
    "offload-compiled-bf16": Path(
        "block inputs in host memory, compiled, bfloat16",
        {**COMPILED, "gradient_checkpointing": "offload"},
        "rounding",
        ("full",),
        devices=("cuda",),
        tier=2,
    ),
    "in-backward-bf16": Path(
        "AdamW in backward, bfloat16",
        {"optim": "adamw_in_backward", "max_grad_norm": 0.0},
        "rounding",
        ("full",),
        tier=2,
    ),
    "fp8-compiled": Path(
        "base in fp8, compiled", COMPILED, "approximate", ("lora",), "fp8", ("cuda",), tier=2, cosine=0.8, valid=0.1
    ),
}
#: paths that are not run with all methods, and why the others can be left out
SUBSETS = (
    "Not every path is run with every method. Recomputation wraps a block's call, whatever stands in it: run where "
    "a block holds the trained weights beside its own (LoRA), is given keys and values (prefix), or is trained itself "
    "(full). Optimizers see tensors, not methods: the largest set and a small one. A base in few bits is a "
    "linear of another kind: a method that adds to its output (LoRA), one that adds an offset (BitFit), and for fp8 "
    "one that does neither (prefix). Combinations with compiling: one or two methods each."
)

# -- tolerances, set before the runs -------------------------------------------------------------------------------
#: exact paths at given weights, against the plain loop in float64: nats a token. float32 has 6e-8 of a loss near 3;
#: sums over 450 to 16,384 numbers and 8 layers leave some 1e-6.
HELD_LOSS = 2e-5
#: the same for gradients, in times the relative error of the plain float32 loop, and the least that is asked: how much
#: of its rounding a base passes on from layer to layer is the base's (gpt2-27m on a CPU: 2e-5; spectune-tiny: 1e-3)
TIMES_PLAIN, HELD_GRADIENT = 4.0, 1e-6
#: exact paths, free: nats a token in the first 20 steps; later, where rounding has grown; the validation loss
EARLY, LATE, VALID = 1e-4, 5e-3, 2e-3
#: and where two plain runs that differ in rounding alone (another attention kernel) part further than that, so many
#: times their difference
TIMES_CONTROL = 3.0
#: bfloat16 at given weights, errors of loss and gradient against the plain loop in float64: times those of the plain
#: bfloat16 loop, which rounds as often. A fused path rounds less; another order of operations may round worse.
TIMES_BF16 = 1.5
#: nats a token that a bfloat16 loss at given weights may be off in any case: one rounding of the hidden states (2^-9)
#: of a batch of 500 targets
BF16_LOSS = 2e-3
#: bfloat16, free, against the plain bfloat16 loop: times what that parts from the plain float32 loop
TIMES_PARTED = 1.5
#: and in any case nats a token: of a step's loss, of the validation loss
BF16_FREE, BF16_VALID = 2e-2, 5e-3
