"""How a run is executed, as one value: decided once, read by training, planning and comparing."""

from __future__ import annotations

from dataclasses import dataclass

from spectune.blocks.recompute import Recomputation


@dataclass(frozen=True)
class Execution:
    """How the decoder blocks of a run are executed.

    Attributes:
        compiled: blocks run through torch.compile.
        graphs: blocks are captured as CUDA graphs and replayed.
        recomputation: what backward computes again instead of keeping it.
        cudnn: attention may take cuDNN's kernels, where the device has them.
        reasons: why, a sentence for each decision that was not the user's.
    """

    compiled: bool = False
    graphs: bool = False
    recomputation: Recomputation = False
    cudnn: bool = True
    reasons: tuple[str, ...] = ()
