"""A training loop of transformers alone, as its users write it: rows padded on the right with a mask, bfloat16, AdamW,
from the shape of gpt2-27m. With cuDNN's attention and without: where the first number is that is not finite."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

SIZES = {"vocab_size": 16384, "n_embd": 448, "n_head": 7, "n_layer": 8, "n_positions": 1024}
TINY = {"vocab_size": 64, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}
#: tokens of the longest row of each step's batch, of 192
WIDTHS = (1.0, 1.0, 0.975, 0.92, 1.0, 0.83, 1.0, 0.99)


#: padding on the right or the left; what was freed before a step holds NaN or what it held
LOOPS = tuple(itertools.product(("right", "left"), (False, True)))


def plain_loop(device: torch.device, *, cudnn: bool, side: str, spoilt: bool, tiny: bool = False) -> dict[str, Any]:
    """Losses by step; the first step with a gradient that is not finite (None: none was), how many weights have one
    there, and the calls of attention that were given finite numbers and gave others.

    Args:
        side: where rows are padded.
        spoilt: the memory that a step takes held NaN before: what a kernel does not write stays so. Without it, it
            holds what earlier steps left there.
    """
    torch.manual_seed(0)
    sizes, rows, longest = (TINY, 4, 24) if tiny else (SIZES, 64, 192)
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model: Any = GPT2LMHeadModel(GPT2Config(**sizes, **dropout, bos_token_id=0, eos_token_id=0))
    model = model.to(device, torch.bfloat16).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    before, losses, broken = torch.backends.cuda.cudnn_sdp_enabled(), [], None
    calls: list[dict[str, Any]] = []
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    try:
        for step, share in enumerate(WIDTHS, start=1):
            width = round(share * longest)
            ids = torch.randint(1, sizes["vocab_size"], (rows, width), generator=generator)
            lengths = torch.randint(longest // 8, width + 1, (rows, 1), generator=generator)
            lengths[0] = width
            place = torch.arange(width)
            mask = (place < lengths if side == "right" else place >= width - lengths).long()
            if spoilt:
                spoil(device, tiny)
            batch = {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
            with watched(calls):
                loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
                loss.backward()
            losses.append(float(loss.detach()))
            bad = [n for n, p in model.named_parameters() if p.grad is not None and not bool(p.grad.isfinite().all())]
            if bad or losses[-1] != losses[-1]:
                broken = {"step": step, "weights": len(bad), "of": len(list(model.parameters())), "first": bad[:3]}
                break
            calls.clear()
            optimizer.step()
            optimizer.zero_grad()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    return {"losses": losses, "broken": broken, "calls": [call for call in calls if call["at_fault"]][:8]}


def spoil(device: torch.device, tiny: bool) -> None:
    """Leave NaN in memory that the allocator has free, in large blocks and small ones."""
    counts = (2**10, 2**14) if tiny else (2**12, 2**18, 2**22, 2**24, 2**26)
    kept = [torch.full((count,), torch.nan, device=device) for count in counts for _ in range(8)]
    del kept


@contextlib.contextmanager
def watched(calls: list[dict[str, Any]]) -> Iterator[None]:
    """Note of each call of attention whether what went in was finite and what came out was not."""
    attend = F.scaled_dot_product_attention

    def noted(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **settings: Any) -> Tensor:
        parts = {"query": query, "key": key, "value": value}
        out: Tensor = attend(query, key, value, attn_mask, **settings)
        call: dict[str, Any] = {
            "call": len(calls), "mask": None if attn_mask is None else list(attn_mask.shape),
            "shape": list(query.shape), "strides": list(query.stride()),
            "inputs": all(_finite(part) for part in parts.values()), "out": _finite(out), "gradients": {},
        }  # fmt: skip
        calls.append(call)

        def given(grad: Tensor) -> None:
            call["grad_out"] = _finite(grad)

        if out.requires_grad:
            # a gradient of its own for each of the three: others may be added to theirs
            out.register_hook(given)  # type: ignore[no-untyped-call]
            for name, part in parts.items():
                part.register_hook(lambda grad, name=name: call["gradients"].update({name: _finite(grad)}))
        return out

    F.scaled_dot_product_attention = noted
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attend
        for call in calls:
            fed = call["inputs"] and call.get("grad_out", True)
            call["at_fault"] = fed and not (call["out"] and all(call["gradients"].values()))


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.detach().isfinite().all())
