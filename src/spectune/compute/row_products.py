"""Products of rows with a matrix each."""

import torch
from torch import Tensor


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
    if x.shape[1] == 1 and torch.compiler.is_compiling():
        # the compiler fuses this with the choice of the matrices, which is then never written; run as it is, it would
        # write a tensor as large as they are
        made = (matrices * x).sum(-1, dtype=torch.float32).to(x.dtype)[:, None]
        return made if onto is None else onto + made
    return torch.bmm(x, matrices.mT) if onto is None else torch.baddbmm(onto, x, matrices.mT)
