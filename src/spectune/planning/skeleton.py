"""A base and a delta without weights, on the meta device: few layers to run, and what the whole model holds."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from spectune.blocks.call import decoder_blocks
from spectune.blocks.compile import memory_budget
from spectune.blocks.execution import Execution
from spectune.blocks.offload import MetaTransfers
from spectune.blocks.recompute import recompute
from spectune.deltas import Delta, place
from spectune.families import Family
from spectune.planning.compiled_blocks import CompiledBlocks
from spectune.planning.graph_memory import BlockTensors
from spectune.planning.workload import Workload, tensor_bytes
from spectune.storage.base_precision import quantise_base

#: layers of a kind that run, and which of them stands for the rest: the first and the last of a model may differ, and
#: it takes equal neighbours to see what a layer does to its neighbours' tensors
FEW = 4
REPEATED = 2


@dataclass(frozen=True)
class WholeModel:
    """What base and delta hold at full depth.

    Attributes:
        weights: bytes of each tensor of the base (parameters, buffers), tied ones once, and of the delta's weights.
        base: of these the base's own, in all.
        trained: weights that are trained, on the meta device.
        in_blocks: bytes of the gradients of those that stand inside of layers.
    """

    family: Family
    weights: tuple[int, ...]
    trained: tuple[nn.Parameter, ...]
    in_blocks: tuple[int, ...]
    base: int

    @property
    def depth(self) -> int:
        return len(self.family.layers)


@dataclass
class Skeleton:
    """What runs: the model's own code, with a few layers of each kind where they stand for the others.

    Attributes:
        repeats: which of the layers that run stand for how many others; empty where all run.
        compiled: the blocks, where they are compiled.
        transfers: copies to host memory, where recomputation keeps blocks' inputs there.
        block_tensors: arguments and outputs of the blocks in the last step that was traced.
    """

    workload: Workload
    execution: Execution
    whole: WholeModel
    model: PreTrainedModel
    delta: Delta
    repeats: list[tuple[int, int]]
    compiled: CompiledBlocks | None = None
    transfers: MetaTransfers = field(default_factory=MetaTransfers)
    block_tensors: BlockTensors = field(default_factory=BlockTensors)

    def __post_init__(self) -> None:
        mode = self.execution.recomputation
        if self.execution.compiled:
            self.compiled = CompiledBlocks(self.layers, memory_budget(mode))
        recompute(self.model, mode, transfers=self.transfers)

    @property
    def layers(self) -> list[nn.Module]:
        """The layers that run."""
        return decoder_blocks(self.model, self.delta.family)

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory for the inputs of all blocks but the last, once a step was traced."""
        return self.transfers.host_bytes * (self.whole.depth - 1) // max(1, len(self.layers) - 1)


def skeleton(workload: Workload, execution: Execution, longest: int, *, all_layers: bool = False) -> Skeleton:
    """Build base and delta without weights.

    Args:
        longest: tokens of a row; layers with sliding windows differ from others where it is longer than the window.
        all_layers: run all, not a few of each kind.

    Raises:
        ConfigError: the method cannot act on this base.
    """
    model = _base(workload)
    held, delta = workload.weights or tensor_bytes(model), _placed(model, workload)
    trained, family = tuple(delta.parameters()), delta.family
    beside = [*trained, *(buffer for _, module in delta.sites for buffer in module.buffers())]
    own = () if workload.method.trains_base else (p.numel() * p.element_size() for p in beside)
    inside = {id(p) for layer in family.layers for p in model.get_submodule(layer.path).parameters()}
    in_blocks = tuple(p.numel() * p.element_size() for p in trained if id(p) in inside)
    whole = WholeModel(family, (*held, *own), trained, in_blocks, sum(held))
    kinds = [] if all_layers else _kinds(model, delta, longest)
    if all(len(kind) <= FEW for kind in kinds):
        return Skeleton(workload, execution, whole, model, delta, [])
    kept, repeats = list[int](), []
    for kind in kinds:
        if len(kind) > FEW:
            repeats.append((len(kept) + REPEATED, len(kind) - FEW))
        kept += kind[:FEW]
    model = _base(workload)
    _keep_layers(model, family, kept)
    return Skeleton(workload, execution, whole, model, _placed(model, workload), repeats)


def _base(workload: Workload) -> PreTrainedModel:
    model = workload.model()
    if workload.base_precision is not None:
        quantise_base(model, workload.base_precision)
    return model


def _placed(model: PreTrainedModel, workload: Workload) -> Delta:
    with torch.device("meta"):
        return place(model, workload.method, "plan", fill=lambda _: None, without_weights=True)


def _keep_layers(model: PreTrainedModel, family: Family, kept: Sequence[int]) -> None:
    """Take all other layers out of the model, and out of what its config says of each."""
    stack = model.get_submodule(family.layers[0].path.rpartition(".")[0])
    assert isinstance(stack, nn.ModuleList)
    depth, layers = len(stack), [stack[number] for number in kept]
    del stack[:]
    stack.extend(layers)
    text: Any = model.config.get_text_config()
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == depth:
            setattr(text, name, [value[number] for number in kept])
    if getattr(text, "num_hidden_layers", None) == depth:
        text.num_hidden_layers = len(kept)


def _kinds(model: PreTrainedModel, delta: Delta, longest: int) -> list[list[int]]:
    """Numbers of the layers that hold the same modules and weights, deltas' included, and see as far back. Empty if
    only some layers are trainable: the position of a layer then affects what is kept for backward."""
    family = delta.family
    window = family.sliding_window
    layer_types = getattr(model.config.get_text_config(), "layer_types", None)
    trained = {id(parameter) for parameter in delta.parameters()}
    kinds: dict[object, list[int]] = {}
    trains = set()
    for number, layer in enumerate(family.layers):
        module = model.get_submodule(layer.path)
        parts = tuple((name, type(part).__name__) for name, part in module.named_modules())
        sizes = tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters())
        sees = layer_types[number] if layer_types is not None and (window is None or longest > window) else None
        kinds.setdefault((parts, sizes, sees), []).append(number)
        trains.add(any(id(parameter) in trained for parameter in module.parameters()))
    return list(kinds.values()) if len(trains) == 1 else []
