"""How steps are executed that several runs share: decided once, of what was decided of each."""

from collections.abc import Sequence
from dataclasses import replace

from spectune.blocks.execution import Execution, Packing
from spectune.blocks.recompute import ORDER


def joint_execution(each: Sequence[Execution]) -> Execution:
    """The execution of passes with rows of several runs. Blocks are compiled where it pays for one of them; what is
    recomputed is what the leanest recomputes."""
    [first, *others] = each
    if not others:
        return first
    compiled = any(execution.compiled for execution in each)
    leanest = max((execution.recomputation for execution in each), key=ORDER.index)
    cudnn = all(execution.cudnn for execution in each)
    return replace(first, compiled=compiled, graphs=False, recomputation=leanest, cudnn=cudnn, packing=Packing())
