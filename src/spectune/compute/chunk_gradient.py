"""From the logits of some rows to their losses and, in their place, the gradient by them: eager, and as one kernel.

With `z = scale * logits`, and `y = softcap * tanh(z / softcap)` if there is a soft cap (`y = z` if not), the loss of a
row with target t is `logsumexp(y) - y[t]`; its gradient by the logits is
`(softmax(y) - onehot(t)) * (1 - tanh(z / softcap)^2) * scale`, the middle factor with a soft cap only.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def chunk_loss(
    logits: Tensor, targets: Tensor, scale: float, softcap: float | None, probabilities: Tensor | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Losses of rows, `[rows]` in the exact dtype (float32; float64 of float64), and the gradient by the logits, in
    their dtype: in the memory of `logits` or `probabilities`, both of which are overwritten. Without `with_gradient`
    the second tensor means nothing.

    Args:
        logits: `[rows, V]`, before scale and soft cap.
        targets: `[rows]` int64.
        probabilities: `[rows, V]` of the exact dtype, room to work in; made where there is none.
    """
    exact = exact_dtype(logits.dtype)
    values, plain = logits, scale == 1.0 and softcap is None
    if not plain:
        values = logits if logits.dtype == exact else logits.to(exact)
        values = values.mul_(scale) if softcap is None else values.mul_(scale / softcap).tanh_().mul_(softcap)
    if probabilities is None:
        probabilities = torch.empty_like(logits, dtype=exact)
    expected = targets[:, None]
    # from one type to another, softmax would make a copy of its own beside
    torch.softmax(values if values.dtype == exact else probabilities.copy_(values), -1, out=probabilities)
    # the largest is 1 / sum(exp(y - max)): it gives the sum without a second pass of exponentials, and never underflows
    losses = values.amax(-1).to(exact) - values.gather(1, expected)[:, 0].to(exact) - probabilities.amax(-1).log_()
    if not with_gradient:
        return losses, probabilities
    # softmax at the target less 1, without the loss of digits where it is close to 1
    probabilities.scatter_(1, expected, torch.expm1(-losses)[:, None])
    if softcap is not None:
        probabilities.mul_(values.div_(softcap).square_().neg_().add_(1.0))
    if scale != 1.0:
        probabilities.mul_(scale)
    return losses, (probabilities if logits.dtype == exact else logits.copy_(probabilities))


def fused_chunk_loss(
    logits: Tensor, targets: Tensor, scale: float, softcap: float | None, with_gradient: bool
) -> Tensor:
    """`chunk_loss` as compiled code, which reads the logits twice and writes their gradient over them (with
    `with_gradient`); nothing else is made but the losses. At least 2 rows: the compiler takes 1 for a case of its own.
    """
    if logits.is_meta:  # a trace of memory: compiled code does not run there; it writes the gradient in two places
        _ = logits.new_empty(logits.shape) if with_gradient else None
        return logits.new_empty(logits.shape[0], dtype=exact_dtype(logits.dtype))
    # one graph for any number of rows: the labelled ones are as many as each batch has
    torch._dynamo.mark_dynamic(logits, 0)
    torch._dynamo.mark_dynamic(targets, 0)
    return _compiled(scale, softcap, with_gradient)(logits, targets)


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """What softmax and sums are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.cache
def _compiled(scale: float, softcap: float | None, with_gradient: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """One function for each way of making logits: numbers become part of the code."""

    def written_plainly(logits: Tensor, targets: Tensor) -> Tensor:
        values = logits.to(exact_dtype(logits.dtype)) * scale
        if softcap is not None:
            bounded = torch.tanh(values / softcap)
            values = bounded * softcap
        highest = values.amax(-1, keepdim=True)
        exponentials = (values - highest).exp()
        total = exponentials.sum(-1, keepdim=True)
        expected = targets[:, None]
        losses = highest + total.log() - values.gather(1, expected)
        if with_gradient:
            at_target = torch.arange(values.shape[1], device=values.device) == expected
            gradient = torch.where(at_target, torch.expm1(-losses), exponentials / total)
            if softcap is not None:
                gradient = gradient * (1 - bounded * bounded)
            logits.copy_(gradient * scale)
        return losses[:, 0]

    return torch.compile(written_plainly, dynamic=False, fullgraph=True)
