"""Products of rows with a matrix each."""

import torch
from torch import Tensor


def row_products(matrices: Tensor, x: Tensor) -> Tensor:
    """`x @ matrix^T` for each row.

    Args:
        matrices: `[rows, out, in]`, of any dtype.
        x: `[rows, tokens, in]`.

    Returns:
        `[rows, tokens, out]`, in the dtype of `x`.
    """
    matrices = matrices.to(x.dtype)
    if x.shape[1] == 1 and torch.compiler.is_compiling():
        # the compiler fuses this with the choice of the matrices, which is then never written; run as it is, it would
        # write a tensor as large as they are
        return (matrices * x).sum(-1, dtype=torch.float32).to(x.dtype)[:, None]
    return torch.bmm(x, matrices.mT)
