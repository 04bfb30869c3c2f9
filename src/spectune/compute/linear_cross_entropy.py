"""Cross entropy of a linear head, a chunk of rows at a time, so that the logits of all rows never exist.

The gradient is made in the forward pass, while a chunk's probabilities are there: that of a row's hidden state is
`(softmax(z) - onehot) W`, whose only unknown is the loss's own factor, by which backward multiplies. So nothing is
computed twice, and a head that is not trained costs 4 d V operations a row (its own gradient as much again as one
product). After Liger-Kernel (Hsu et al. 2024, arXiv 2410.10989, section 3.2), which forms its gradients likewise, in
smaller chunks; Wijmans et al. 2024 (arXiv 2411.09009) keep no chunk at all and compute logits twice for it.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spectune.compute.chunk_gradient import chunk_loss, exact_dtype, fused_chunk_loss

HALF = (torch.float16, torch.bfloat16)
#: float32 logits of a chunk, in bytes. A GPU's products want many rows; a CPU wants to find in its cache what it wrote
_CHUNK_BYTES, _CHUNK_BYTES_ON_CPU = 512 * 2**20, 16 * 2**20
#: but at least so many rows: below that, products with a large vocabulary are slow
_CHUNK_ROWS, _CHUNK_ROWS_ON_CPU = 1024, 256
#: rows of logits begin at multiples of so many elements, and in half precision a vocabulary that is no multiple of
#: `_ASKEW` is filled up to one: tensor cores take products with 50,257 columns (GPT-2) at a quarter of their speed
_ALIGNED, _ASKEW = 64, 8
#: elements that are multiplied in float32 at a time in backward
_SCALED_AT_ONCE = 2**24


def linear_cross_entropy_sum(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, *, scale: float = 1.0,
    softcap: float | None = None, chunk_rows: int | None = None, fuse: bool = False,
) -> Tensor:  # fmt: skip
    """Cross entropy of `z = hidden @ weight.T + bias` with `targets`, summed over rows.

    Products run in the dtype of `hidden`, softmax in float32 (float64 where hidden is). The gradient of hidden is kept
    in its dtype from forward to backward. Gradients of weight and bias, where wanted, are added up over chunks in
    float32 and returned in their own dtype. Where no gradient is wanted none is made. There is no second derivative.

    Args:
        hidden: `[N, d]`; N may be 0.
        weight: `[V, d]`, hidden's dtype.
        targets: `[N]` int64, each in `[0, V)`.
        bias: `[V]`, hidden's dtype.
        scale: the logits are `scale * z`.
        softcap: if given, they are `softcap * tanh(scale * z / softcap)` (Gemma 2, arXiv 2408.00118, section 2).
        chunk_rows: rows at a time; by default `rows_of_a_chunk`.
        fuse: compile what is done to a chunk's logits into one kernel (`torch.compile`, once a vocabulary).

    Returns:
        the sum in nats, a float32 scalar (float64 where hidden is); 0 for no rows.

    Raises:
        ValueError: shapes or dtypes do not belong together.
    """
    _check(hidden, weight, targets, bias)
    rows = chunk_rows or rows_of_a_chunk(hidden.shape[0], weight, hidden.device.type)
    # checked here: autograd switches gradients off inside a Function
    on = torch.is_grad_enabled()
    wanted = tuple(on and tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias))
    settings = _Settings(scale, softcap, rows, fuse, wanted)
    if not any(wanted):
        return _sum(_losses_and_gradients(hidden, weight, bias, targets, settings)[0], hidden)
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, targets, settings)  # type: ignore[no-untyped-call]
    return loss


def linear_cross_entropy_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, *, scale: float = 1.0,
    softcap: float | None = None, chunk_rows: int | None = None, fuse: bool = False,
) -> Tensor:  # fmt: skip
    """The losses that `linear_cross_entropy_sum` sums, `[N]` float32 (float64 where hidden is), with the gradient of
    hidden where one is wanted, and of nothing else: whoever weighs rows each by itself has a head that is not trained.
    Arguments and errors are the same; ValueError too where weight or bias want a gradient."""
    _check(hidden, weight, targets, bias)
    rows = chunk_rows or rows_of_a_chunk(hidden.shape[0], weight, hidden.device.type)
    on = torch.is_grad_enabled()
    if on and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError("a trained head has no gradient of each row's loss: use linear_cross_entropy_sum")
    settings = _Settings(scale, softcap, rows, fuse, wanted=(on and hidden.requires_grad, False, False))
    if not any(settings.wanted):
        return _each(_losses_and_gradients(hidden, weight, bias, targets, settings)[0], hidden)
    losses: Tensor = _LinearCrossEntropyOfEach.apply(hidden, weight, bias, targets, settings)  # type: ignore[no-untyped-call]
    return losses


def rows_of_a_chunk(rows: int, weight: Tensor, device_type: str) -> int:
    """How many of `rows` are taken at a time, at least 1, for a head of this weight `[V, d]`: chunks of one size.

    Where the weight is trained, at least d: a chunk's logits then take no more than the weight's float32 gradient, and
    adding to that, which goes through all of it once a chunk, costs little beside the product.
    """
    on_cpu = device_type == "cpu"
    vocabulary, width = weight.shape
    fit = (_CHUNK_BYTES_ON_CPU if on_cpu else _CHUNK_BYTES) // (4 * vocabulary)
    most = max(fit, _CHUNK_ROWS_ON_CPU if on_cpu else _CHUNK_ROWS, width if weight.requires_grad else 0)
    chunks = -(-rows // most)
    return -(-rows // chunks) if chunks else 1


@dataclass(frozen=True)
class _Settings:
    scale: float
    softcap: float | None
    rows: int
    fuse: bool
    #: gradients of hidden, weight, bias
    wanted: tuple[bool, ...]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: _Settings
    ) -> Tensor:
        losses, gradients = _losses_and_gradients(hidden, weight, bias, targets, settings)
        ctx.save_for_backward(*gradients)
        return _sum(losses, hidden)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        # not in place: backward may come here again (retain_graph)
        found = [None if gradient is None else _times(gradient, factor) for gradient in ctx.saved_tensors]
        return (*found, None, None)


class _LinearCrossEntropyOfEach(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: _Settings
    ) -> Tensor:
        losses, [of_hidden, *_] = _losses_and_gradients(hidden, weight, bias, targets, settings)
        ctx.save_for_backward(of_hidden)
        return _each(losses, hidden)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factors: Tensor) -> tuple[Tensor | None, ...]:
        [gradient] = ctx.saved_tensors
        return _times(gradient, factors[:, None]), None, None, None, None


def _each(losses: list[Tensor], hidden: Tensor) -> Tensor:
    """The losses of chunks, one after the other."""
    return torch.cat(losses) if losses else hidden.new_empty(0, dtype=exact_dtype(hidden.dtype))


def _sum(losses: list[Tensor], hidden: Tensor) -> Tensor:
    """Of the losses of chunks; 0 of none."""
    total = torch.zeros((), dtype=exact_dtype(hidden.dtype), device=hidden.device)
    for of_chunk in losses:
        total += of_chunk.sum()
    return total


def _losses_and_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: _Settings
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The losses of each chunk's rows, and their sum's gradients by hidden, weight and bias as far as they are
    wanted."""
    exact, at_once = exact_dtype(hidden.dtype), min(settings.rows, hidden.shape[0])
    found: list[Tensor] = []
    vocabulary, weight = weight.shape[0], _filled_up(weight)
    filled_bias = None if bias is None else F.pad(bias, (0, weight.shape[0] - vocabulary))
    of_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if settings.wanted[0] else None
    # added up over chunks in float32 (float64); that of a single chunk needs no sum
    summed = exact if hidden.shape[0] > at_once else weight.dtype
    of_weight = torch.zeros_like(weight, dtype=summed) if settings.wanted[1] else None
    of_bias = None if bias is None or not settings.wanted[2] else torch.zeros_like(bias, dtype=exact)
    # both are used for every chunk: fresh memory is slow on a CPU, and falls into pieces on a GPU
    buffer = hidden.new_empty(at_once, -(-weight.shape[0] // _ALIGNED) * _ALIGNED)[:, : weight.shape[0]]
    room = None if settings.fuse else torch.empty(at_once, vocabulary, dtype=exact, device=hidden.device)
    for begin in range(0, hidden.shape[0], settings.rows):
        here = slice(begin, begin + settings.rows)
        rows, expected = hidden[here], targets[here]
        wide = buffer[: rows.shape[0]]
        if filled_bias is None:
            torch.mm(rows, weight.t(), out=wide)
        else:
            torch.addmm(filled_bias, rows, weight.t(), out=wide)
        logits = wide[:, :vocabulary]
        losses, gradient = _of_chunk(logits, expected, room, settings)
        if wide.shape != logits.shape:
            gradient = wide  # made in place; what was filled up has logits and gradients of zero
        found.append(losses)
        if of_hidden is not None:
            torch.mm(gradient, weight, out=of_hidden[here])
        if of_weight is not None and of_weight.dtype == gradient.dtype:
            of_weight.addmm_(gradient.t(), rows)
        elif of_weight is not None:
            of_weight += gradient.t() @ rows
        if of_bias is not None:
            of_bias += gradient[:, :vocabulary].sum(0, dtype=exact)
    made = None if of_weight is None else of_weight.to(weight.dtype)[:vocabulary]
    return found, [of_hidden, made, None if of_bias is None else of_bias.to(hidden.dtype)]


def _of_chunk(logits: Tensor, targets: Tensor, room: Tensor | None, settings: _Settings) -> tuple[Tensor, Tensor]:
    """Losses of a chunk's rows and the gradient by its logits, whose memory is used."""
    scale, softcap, with_gradient = settings.scale, settings.softcap, any(settings.wanted)
    if settings.fuse and logits.shape[0] > 1:
        return fused_chunk_loss(logits, targets, scale, softcap, with_gradient), logits
    space = None if room is None else room[: logits.shape[0]]
    return chunk_loss(logits, targets, scale, softcap, space, with_gradient)


def _filled_up(weight: Tensor) -> Tensor:
    """`weight` `[V, d]`, or, where tensor cores want it, a copy with rows of zeros behind."""
    rows, width = weight.shape
    if weight.dtype not in HALF or rows % _ASKEW == 0:
        return weight
    return torch.cat([weight, weight.new_zeros(-rows % _ALIGNED, width)])


def _times(gradient: Tensor, factor: Tensor) -> Tensor:
    """`gradient * factor`, a scalar tensor or one number for each row `[N, 1]`. Lower precision would round the factor
    first, and with it all gradients the same way: so it is multiplied in float32, a part at a time."""
    if gradient.dtype not in HALF:
        return gradient * factor
    result = torch.empty_like(gradient)
    rows = max(1, _SCALED_AT_ONCE // max(1, gradient[:1].numel()))
    for begin in range(0, gradient.shape[0], rows):
        here = slice(begin, begin + rows)
        torch.mul(gradient[here].float(), factor if factor.dim() == 0 else factor[here], out=result[here])
    return result


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    shapes = hidden.dim() == weight.dim() == 2 and hidden.shape[1] == weight.shape[1]
    if not shapes or targets.shape != hidden.shape[:1] or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(
            f"hidden is {list(hidden.shape)}, weight {list(weight.shape)}, targets {list(targets.shape)}"
            f"{'' if bias is None else f', bias {list(bias.shape)}'}; expected [N, d], [V, d], [N] and, if any, [V]"
        )
    if weight.dtype != hidden.dtype or (bias is not None and bias.dtype != hidden.dtype):
        raise ValueError(
            f"hidden is {hidden.dtype}, weight {weight.dtype}{'' if bias is None else f', bias {bias.dtype}'}; "
            "expected one dtype: convert hidden to the weight's"
        )
