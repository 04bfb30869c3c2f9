"""What every system gets: the same token ids in the same order, and the same first weights where names agree."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

#: batches that take turns
BATCHES = 4
#: ids come from the first so many of the vocabulary, so that there is something to learn from random tokens
USED_IDS = 1024
#: the plain name of PEFT's table of virtual tokens
VIRTUAL = "prompt_encoder.embedding"
#: of the loop, whatever the method: what is trained does not matter, that losses can be compared does
RATES = {"full": 1e-5}
RATE = 1e-3


def token_batches(rows: int, length: int, vocabulary: int) -> list[Tensor]:
    """`BATCHES` tensors `[rows, length]` of int64 token ids, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    top = min(vocabulary, USED_IDS)
    return [torch.randint(0, top, (rows, length), generator=generator) for _ in range(BATCHES)]


@torch.no_grad()
def fill(named: Iterable[tuple[str, nn.Parameter]]) -> None:
    """First weights of a delta, none of them a matrix of zeros: products with zeros take less power and run faster.

    Every weight has a seed of its own, from its name without what libraries add: LoRA's matrices are then the same in
    every system, and so is the table of virtual tokens. Whatever else is not zero is left as its library made it.
    """
    for name, parameter in named:
        key = plain_name(name)
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        if key == VIRTUAL:
            new = virtual_tokens(parameter.shape)
        elif key.endswith("lora_A"):
            bound = parameter.shape[-1] ** -0.5
            new = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
        elif not parameter.any():
            new = torch.empty(parameter.shape).normal_(0, 0.01, generator=generator)
        else:
            continue
        parameter.copy_(new)


def virtual_tokens(shape: Sequence[int]) -> Tensor:
    """The table of prefix and prompt in PEFT's layout: `[tokens, width]`, normal, of a base's usual deviation."""
    return torch.empty(tuple(shape)).normal_(0, 0.02, generator=torch.Generator().manual_seed(1))


def plain_name(name: str) -> str:
    """`base_model.model.model.layers.0.q_proj.lora_A.default.weight` -> `model.layers.0.q_proj.lora_A`"""
    plain = name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight")
    return plain.replace(".lora.lora_", ".lora_")  # ours, inside DoRA


class Watched:
    """A few trained weights, to see afterwards that the steps changed them."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        every = [p for p in parameters if p.requires_grad]
        self.chosen = [every[0], every[len(every) // 2], every[-1]]
        self.before = [self._sample(p) for p in self.chosen]

    def changed(self) -> bool:
        return any(not torch.equal(self._sample(p), b) for p, b in zip(self.chosen, self.before, strict=True))

    @staticmethod
    def _sample(parameter: nn.Parameter) -> Tensor:
        return parameter.detach().flatten()[-1024:].clone()
