"""Products of rows with a matrix each."""

import torch
from torch import Tensor

#: numbers whose sum a compiled kernel writes out (`blocks.step_blocks.Compiling`), and so many that they fill a block
_WRITTEN_OUT, _REDUCED = 32, 512


def row_products(matrices: Tensor, x: Tensor, onto: Tensor | None = None) -> Tensor:
    """`onto + x @ matrix^T` for each row.

    Args:
        matrices: `[rows, out, in]`, of any dtype.
        x: `[rows, tokens, in]`.
        onto: as what is returned; None adds nothing.

    Returns:
        `[rows, tokens, out]`, in the dtype of `x`.
    """
    matrices = matrices.to(x.dtype)
    few, many = matrices.shape[-1] <= _WRITTEN_OUT, matrices.shape[-1] >= _REDUCED
    if x.shape[1] == 1 and (few or many) and torch.compiler.is_compiling():
        # the compiler fuses this with the choice of the matrices, which is then never written; run as it is, it would
        # write a tensor as large as they are. Between few and many it is slower than that: what a sum is of (an
        # adapter's activation) is computed anew for each
        made = (matrices * x).sum(-1, dtype=torch.float32).to(x.dtype)[:, None]
        return made if onto is None else onto + made
    return torch.bmm(x, matrices.mT) if onto is None else torch.baddbmm(onto, x, matrices.mT)
