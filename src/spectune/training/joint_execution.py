"""How steps are executed that several runs share: decided once, of what was decided of each."""

from collections.abc import Sequence
from dataclasses import replace

from spectune.blocks.execution import Execution, Packing
from spectune.blocks.recompute import ORDER
from spectune.training.decisions import needs_no_mask
from spectune.training.joint_batches import joint_lengths
from spectune.training.run_state import RunState


def joint_execution(each: Sequence[Execution], sharing: Sequence[RunState]) -> Execution:
    """The execution of the passes of several runs. Blocks are compiled where it pays for one of them, and captured
    where they are for all; what is recomputed is what the leanest recomputes. Rows are padded.

    Args:
        each: what was decided of each run.
        sharing: those whose rows may be in one pass.
    """
    [first, *others] = each
    if not others:
        return first
    leanest = max((execution.recomputation for execution in each), key=ORDER.index)
    graphs = leanest is False and bool(sharing) and all(execution.graphs for execution in each)
    packing = Packing(
        mask_free=bool(sharing) and all(needs_no_mask(run.delta) for run in sharing),
        lengths=joint_lengths([run.batches for run in sharing]) if graphs else (),
    )
    return replace(
        first, compiled=any(execution.compiled for execution in each), graphs=graphs, recomputation=leanest,
        cudnn=all(execution.cudnn for execution in each), packing=packing,
    )  # fmt: skip
