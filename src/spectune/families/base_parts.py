"""Which weights make a base what it is, and how each of them can be read, quantised or sharded as it may be."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spectune.compute.frozen import FrozenLinear
from spectune.families.family import Family
from spectune.families.module_kinds import is_norm, linear_shape
from spectune.families.quantised import dense_weight, is_plain
from spectune.families.weight_digest import TABLES

Kind = Literal["linears", "experts", "embeddings", "head", "position tables", "norms", "biases", "other weights"]


@dataclass(frozen=True)
class BasePart:
    """One weight of a base.

    Attributes:
        name: as the model has it.
        kind: for messages, and what may be added to it.
        module, leaf: where it stands.
    """

    name: str
    kind: Kind
    module: nn.Module
    leaf: str

    @property
    def stored(self) -> Tensor:
        """As the module holds it."""
        found: Tensor = getattr(self.module, self.leaf)
        return found

    @property
    def is_table(self) -> bool:
        """Whether it has a row for each token: more of them may be added."""
        return self.kind in TABLES

    @property
    def stored_as(self) -> str:
        """The precision: a dtype's name, a `base_precision`, or a tensor class of another library's."""
        if isinstance(self.module, FrozenLinear) and self.leaf == "weight":
            return self.module.precision
        weight = self.stored
        plain = is_plain(weight) or _is_sharded(weight)
        kind = "" if plain else f"{type(weight).__name__} of "
        return kind + str(weight.dtype).removeprefix("torch.")

    @property
    def shape(self) -> list[int]:
        """Of the map, not of its storage: a quantised linear packs its weight otherwise, and GPT-2's is transposed."""
        shape = linear_shape(self.module)
        return [shape[1], shape[0]] if self.kind == "linears" and shape is not None else list(self.stored.shape)

    @property
    def scale(self) -> Tensor | None:
        """Of each row, where `read` gives the codes that it multiplies: few of them need to be decoded."""
        if isinstance(self.module, FrozenLinear) and self.leaf == "weight":
            return self.module._buffers.get("weight_scale")
        return None

    def read(self) -> Tensor | None:
        """The weight as a matrix, `[out_features, in_features]` of a linear, a row for each token of a table; None
        where nobody here can read it (on the meta device, or in an unknown encoding). Sharded ones are put together:
        all processes have to ask."""
        weight: Any = self.stored
        if weight.device.type == "meta":
            return None
        if _is_sharded(weight):
            weight = weight.full_tensor()
        elif self.scale is not None:
            return self.stored
        elif not is_plain(weight):
            return dense_weight(self.module) if self.kind == "linears" else None
        whole: Tensor = weight.detach()
        if isinstance(self.module, Conv1D) and self.leaf == "weight":
            return whole.T
        if whole.dim() < 2:
            return whole.reshape(-1, 1) if self.is_table else whole.reshape(1, -1)
        # the experts of a layer, or a convolution's kernel
        return whole.flatten(0, -2) if self.kind == "experts" else whole.flatten(1)


def base_parts(model: PreTrainedModel, family: Family) -> Iterator[BasePart]:
    """All weights of a base but deltas' and the heads that stand on it for a task: parameters, and the buffers that are
    stored with them. A tied one is given under each of its names."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    tops = _tops(model, family, head)
    for path, module in model.named_modules(remove_duplicate=False):
        if ".deltas." in f".{path}." or (tops is not None and path.partition(".")[0] not in tops):
            continue
        own: dict[str, Tensor | None] = {**module._parameters}
        if linear_shape(module) is not None:  # whatever else it has is a quantised weight's scales
            own = {leaf: own[leaf] for leaf in ("weight", "bias") if leaf in own}
        else:
            learned = (name for name in module._buffers if name not in module._non_persistent_buffers_set)
            own |= {name: module._buffers[name] for name in learned}
        for leaf, weight in own.items():
            # integers are counters and ids; a quantised linear's weight may be integers
            if weight is None or (not weight.is_floating_point() and linear_shape(module) is None):
                continue
            name = f"{path}.{leaf}".removeprefix(".")
            yield BasePart(name, _kind(module, leaf, path == family.embedding, module is head), module, leaf)


def _tops(model: PreTrainedModel, family: Family, head: nn.Module | None) -> set[str] | None:
    """The model's children that are parts of the base; None: all of them. Those that hold the decoder, the embeddings
    and a language model's head; and beside such a head other towers, which are stacks. What is left is a head."""
    paths = [family.decoder, family.embedding]
    if "" in paths:
        return None
    if head is not None:
        paths += [path for path, module in model.named_modules() if module is head]
        paths += [name for name, child in model.named_children() if _is_stack(child)]
    return {path.partition(".")[0] for path in paths}


def _is_stack(module: nn.Module) -> bool:
    return any(isinstance(part, nn.ModuleList) for part in module.modules())


def _kind(module: nn.Module, leaf: str, embeds: bool, is_head: bool) -> Kind:
    if is_head:
        return "head"
    if embeds and leaf == "weight":
        return "embeddings"
    if isinstance(module, nn.Embedding):
        return "position tables"
    if is_norm(module):
        return "norms"
    if linear_shape(module) is not None:
        return "biases" if leaf == "bias" else "linears"
    weight = getattr(module, leaf)
    return "experts" if weight.dim() == 3 else "other weights"


def _is_sharded(weight: Tensor) -> bool:
    distributed: Any = torch.distributed
    if not distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(weight, DTensor)
