"""The biases of a base: which there are on the way of the text, and how each can be reached."""

import math
import re
from collections import defaultdict
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from spectune.families.module_kinds import is_norm, linear_shape

#: a bias of this name is added to routing scores to balance the load: it only has a say in which experts are chosen,
#: and no gradient comes to it (Wang et al. 2024, arXiv 2408.15664)
_BALANCES = re.compile(r"correction_bias$|expert_bias$|balancing_bias(es)?$")


@dataclass(frozen=True)
class Bias:
    """A trainable bias of the base.

    Attributes:
        path: the module that holds it.
        name: its name there.
        shape: most are vectors; experts have a row each.
        additive: it is the last thing that its module adds to its output, so that an offset on the output is an offset
            on the bias. Where it is not (convolutions, state-space steps, experts, routers), the bias itself has to be
            changed.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    additive: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def biases_of(model: PreTrainedModel, decoder: str, head: str | None, beside: frozenset[str]) -> tuple[Bias, ...]:
    """Every parameter called a bias that text goes through: in the decoder, and in what holds the head. One that
    several modules hold (a tied head's) is described where it is added last. Those that balance experts are not
    among them."""
    inside = [decoder, *([head.split(".")[0]] if head else [])]
    owners: dict[int, list[str]] = defaultdict(list)
    tensors: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        on_the_way = any(owner == part or owner.startswith(part + ".") for part in inside)
        trained = leaf.endswith("bias") and not _BALANCES.search(leaf) and parameter.numel()
        if trained and on_the_way and owner not in beside:
            owners[id(parameter)].append(name)
            tensors[id(parameter)] = parameter
    found = []
    for key, held in owners.items():
        described = [_bias(model, name, tuple(tensors[key].shape)) for name in held]
        found.append(next((bias for bias in described if bias.additive), described[0]))
    return tuple(found)


def _bias(model: nn.Module, name: str, shape: tuple[int, ...]) -> Bias:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    linear = linear_shape(module)
    # a subclass of a linear may map groups separately: its output is then not as wide as its bias
    last = is_norm(module) if linear is None else linear[1] == math.prod(shape)
    return Bias(owner, leaf, shape, leaf == "bias" and len(shape) == 1 and last)
