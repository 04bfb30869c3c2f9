"""A frozen linear whose weight is int8, one scale for each output; activations stay as they are.

As LLM.int8()'s row-wise absmax quantisation of weights (Dettmers et al. 2022, arXiv 2208.07339, section 2.1), without
quantised activations: `y = (x W_qᵀ) s_w`, `dx = (dy s_wᵀ) W_q`, with `W_q` cast to the input's dtype, exactly, for each
product. torchao's weight-only int8 computes the same, but its cast weight is kept from forward to backward by
autograd, so that training over it takes the memory of an unquantised base; here the int8 weight is what is kept.
"""

import torch
from torch import Tensor

from spectune.compute.frozen import Context, FrozenLinear, Gradients, like, rows_of

LARGEST = 127


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return like((rows_of(x) @ weight.to(x.dtype).t()) * scale.t(), x)

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> Gradients:
        [grad] = gradients
        weight, scale = ctx.saved_tensors
        folded = (rows_of(grad) * scale.t()).to(grad.dtype)
        return like(folded @ weight.to(grad.dtype), grad), None, None


class FrozenInt8Linear(FrozenLinear):
    """`weight` int8 `[out_features, in_features]`, `weight_scale` float32 `[out_features, 1]`."""

    precision = "int8"
    weight_scale: Tensor

    def store(self, weight: Tensor) -> Tensor:
        weight = weight.float()
        scale = weight.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny * 2**20) / LARGEST
        self.register_buffer("weight_scale", scale)
        return (weight / scale).round().to(torch.int8).contiguous()

    def product(self, x: Tensor) -> Tensor:
        found: Tensor = _Product.apply(x, self.weight, self.weight_scale)  # type: ignore[no-untyped-call]
        return found

    def dequantised(self) -> Tensor:
        return self.weight.float() * self.weight_scale
