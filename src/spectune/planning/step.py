"""One training step of a method on a base, recorded on the meta device: what is made, and when it is freed.

The step is the real one: the model's own forward, the method's own modules and hooks, the loss on labelled positions,
autograd's backward, recomputation where checkpointing is on. Only a few layers run; `timeline.py` repeats one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectune.blocks.call import Wrapper, wrapped
from spectune.blocks.compile import memory_budget
from spectune.blocks.execution import Execution
from spectune.blocks.offload import MetaTransfers
from spectune.blocks.recompute import recompute
from spectune.compute.evaluating import evaluating
from spectune.deltas import Attachment, Delta, packed, packing, place
from spectune.families import Family
from spectune.objectives import CAUSAL_LM
from spectune.planning.compiled import CompiledBlocks
from spectune.planning.kernels import kernels_of
from spectune.planning.recorder import Record, Recorder
from spectune.planning.recordings import Calls
from spectune.planning.shape import Shape
from spectune.planning.stepping import Stepping
from spectune.planning.workload import Workload, tensor_bytes
from spectune.storage.base_precision import quantise_base

#: layers of a kind that run, and which of them stands for the rest: the first and the last of a model may differ, and
#: it takes equal neighbours to see what a layer does to its neighbours' tensors
FEW = 4
REPEATED = 2
#: of which it is found out how the model makes its logits
_TINY = Shape(rows=1, length=2, targets=1, all_targets=1)


@dataclass
class Skeleton:
    """A base and a method's delta without weights, on the meta device, at full depth until `shorten`."""

    workload: Workload
    model: PreTrainedModel
    delta: Delta
    depth: int
    #: bytes of each tensor of the base that stays (parameters, buffers), tied ones once
    weights: list[int]
    #: weights that are trained, on the meta device
    trained: list[nn.Parameter]
    #: bytes of the delta's own weights (empty where the base itself is trained)
    delta_weights: list[int]
    #: numbers of the layers of each kind, in the order of their first ones
    kinds: list[list[int]]

    execution: Execution = field(default_factory=Execution)
    #: copies to host memory, where recomputation keeps blocks' inputs there
    transfers: MetaTransfers = field(default_factory=MetaTransfers)
    #: where blocks are compiled
    blocks: CompiledBlocks | None = None
    #: bytes of gradients of weights that stand inside of layers, at full depth
    in_blocks: list[int] = field(default_factory=list)
    #: of the last step that was recorded
    calls: Calls = field(default_factory=Calls)

    @property
    def family(self) -> Family:
        return self.delta.family

    @property
    def layers(self) -> list[nn.Module]:
        """Those that are left."""
        modules = dict(self.model.named_modules())
        return [modules[layer.path] for layer in self.family.layers if layer.path in modules]

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory for the inputs of all blocks but the last, once a step was recorded."""
        run = len(self.model.get_submodule(self.family.layers[0].path.rpartition(".")[0]))  # type: ignore[arg-type]
        return self.transfers.host_bytes * (self.depth - 1) // max(1, run - 1)

    def run_layers_as(self, execution: Execution) -> None:
        """Compile the layers that are left, and switch their recomputation on, in that order as training does."""
        self.execution = execution
        if execution.compiled:
            self.blocks = CompiledBlocks(self.layers, memory_budget(execution.recomputation))
        self.transfers = MetaTransfers()
        recompute(self.model, execution.recomputation, transfers=self.transfers)

    def shorten(self) -> list[tuple[int, int]]:
        """Cut the model to a few layers of each kind. Returns which of those stand for others, and for how many: none
        where all layers are left."""
        if not self.kinds or all(len(kind) <= FEW for kind in self.kinds):
            return []
        kept: list[int] = []
        repeats = []
        for kind in self.kinds:
            if len(kind) > FEW:
                repeats.append((len(kept) + REPEATED, len(kind) - FEW))
            kept += kind[:FEW]
        path = self.family.layers[0].path.rpartition(".")[0]
        stack = self.model.get_submodule(path)
        assert isinstance(stack, nn.ModuleList)
        layers = [stack[number] for number in kept]
        del stack[len(kept) :]
        for index, layer in enumerate(layers):
            stack[index] = layer
        text: Any = self.model.config.get_text_config()
        for name, value in vars(text).items():  # what a config says of each layer
            if isinstance(value, list) and len(value) == self.depth:
                setattr(text, name, [value[number] for number in kept])
        attachment = Attachment.of(self.model)
        if attachment is not None:  # packing acts in the attentions that are left
            there = dict(self.model.named_modules())
            left = tuple(layer for layer in self.family.layers if layer.path in there)
            attachment.family = replace(attachment.family, layers=left)
        return repeats


def skeleton(workload: Workload, longest: int) -> Skeleton:
    """Build base and delta without weights.

    Args:
        longest: tokens of a row; layers with sliding windows differ from others where it is longer than the window.

    Raises:
        ConfigError: the method cannot act on this base.
    """
    model, method = workload.model(), workload.method
    if workload.base_precision is not None:
        quantise_base(model, workload.base_precision)
    weights = list(workload.weights or tensor_bytes(model))
    with torch.device("meta"):
        delta = place(model, method, "plan", fill=lambda _: None)
    own = [] if method.trains_base else [p.numel() * p.element_size() for p in delta.parameters()]
    trained = list(delta.parameters())
    family = delta.family
    inside = {id(p) for layer in family.layers for p in model.get_submodule(layer.path).parameters()}
    in_blocks = [p.numel() * p.element_size() for p in trained if id(p) in inside]
    kinds = _kinds(model, delta, longest)
    return Skeleton(workload, model, delta, len(family.layers), weights, trained, own, kinds, in_blocks=in_blocks)


def record_step(built: Skeleton, shape: Shape, *, accumulating: bool = False) -> Record:
    """Record forward, loss and backward. Marks: `F<layer>` before a layer, `head` after the last one, `B<layer>` where
    backward comes to a layer. Gradients of what is trained are labelled, and never freed.

    Args:
        accumulating: gradients are there already and are added to; the record then leaves them out.

    Raises:
        torch._dynamo.exc.TorchDynamoException: layers are compiled, and the compiler cannot trace one as a whole.
    """
    model, trained = built.model, list(built.delta.parameters())
    device, kernels = built.workload.device, partial(kernels_of, built.workload.device, cudnn=built.execution.cudnn)
    there = []
    if accumulating:
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
            there.append(parameter.grad)
    batch = _batch(shape)
    batch["positions"] = torch.zeros(shape.all_targets, dtype=torch.int64, device="meta")
    recorder = _recorder(built, shape, there)
    record = recorder.record
    model.train()
    built.calls = Calls()
    stepped = Stepping([], built.workload.optim).in_backward
    steps = _stepped(recorder, trained) if stepped else nullcontext()
    with kernels(), Recorder(_TINY, ()):  # asked once a model, before its first step: no part of any
        CAUSAL_LM.prepare(model, _batch(replace(_TINY, documents=shape.documents, padded=shape.padded)))
    compiled = nullcontext() if built.blocks is None else built.blocks.running(recorder)
    with kernels(), _documents(built, shape), recorder, _marked(recorder, built), steps, compiled:
        loss, _ = CAUSAL_LM.loss_sum(model, batch, fuse=built.blocks is not None, device_type=device)
        recorder.backward = True
        torch.autograd.backward(loss / shape.all_targets)
        del loss
        for parameter in trained:
            if parameter.grad is not None and (number := recorder.number_of(parameter.grad)) is not None:
                record.labels[number] = "gradients"
        events = len(record.events)
    for parameter in trained:
        parameter.grad = None
    del record.events[events:]
    return record


def record_validation(built: Skeleton, shape: Shape) -> Record:
    """Record the loss of a batch without gradients, as validation takes it. Marks as in `record_step`, forward only."""
    recorder, kernels = _recorder(built, shape), kernels_of(built.workload.device, cudnn=built.execution.cudnn)
    with evaluating(built.model), kernels, recorder, _marked(recorder, built):
        CAUSAL_LM.token_losses(built.model, _batch(shape, training=False))
    return recorder.record


@contextmanager
def _stepped(recorder: Recorder, trained: Iterable[nn.Parameter]) -> Iterator[None]:
    """Hooks that do to memory what stepping in backward does: a float32 copy of a gradient of lower precision, which
    then goes; and the copy with the step."""

    def step(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        for made in (parameter.grad, gradient):
            if (number := recorder.number_of(made)) is not None:
                recorder.record.labels[number] = "gradients"
        parameter.grad = None
        del gradient, made

    handles = [parameter.register_post_accumulate_grad_hook(step) for parameter in trained]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _recorder(built: Skeleton, shape: Shape, there: Iterable[Tensor] = ()) -> Recorder:
    return Recorder(shape, [*built.model.parameters(), *built.model.buffers(), *built.delta.parameters(), *there])


@contextmanager
def _documents(built: Skeleton, shape: Shape) -> Iterator[None]:
    """While inside, a batch of this shape is packed, if it is."""
    if shape.documents is None:
        yield
        return
    numbers = [[n for n, length in enumerate(pack) for _ in range(length)] for pack in shape.documents]
    documents = torch.tensor([row + [-1] * (shape.length - len(row)) for row in numbers])
    with packing(built.model, shape.kernel), packed(built.model, documents):
        yield


def _batch(shape: Shape, *, training: bool = True) -> dict[str, Tensor]:
    """What the loop gives: no mask where it would hide nothing."""
    names = ["input_ids", "labels"]
    if shape.documents is not None:
        names.append("position_ids")
    elif shape.padded or not training:
        names.append("attention_mask")
    size = (shape.rows, shape.length)
    return {name: torch.zeros(size, dtype=torch.int64, device="meta") for name in names}


@contextmanager
def _marked(recorder: Recorder, built: Skeleton) -> Iterator[None]:
    """Mark where each layer begins, forward and backward: around its whole call, compiled or recomputed as it is."""
    last = len(built.layers) - 1

    def arrives(index: int) -> None:
        recorder.in_layers = True
        recorder.mark(f"B{index}")

    def marking(index: int, call: Any) -> Any:
        def marked(*args: Any, **kwargs: Any) -> Any:
            recorder.label = "activations"
            recorder.mark(f"F{index}")
            output = call(*args, **kwargs)
            if torch.is_grad_enabled():
                built.calls.note(recorder, (args, kwargs), output)
            if index == last:
                recorder.label = "logits"
                recorder.mark("head")
            out = output[0] if isinstance(output, tuple) else output
            if isinstance(out, Tensor) and out.requires_grad:
                out.register_hook(lambda _: arrives(index))  # type: ignore[no-untyped-call]
            return output

        return marked

    with wrapped(built.layers, Wrapper.MARKED, lambda index, layer, inner: marking(index, inner)):
        yield


def _kinds(model: PreTrainedModel, delta: Delta, longest: int) -> list[list[int]]:
    """Numbers of the layers that hold the same modules and weights, deltas' included, and see as far back. Empty where
    only some layers have something to train: then it counts which stand above them."""
    family = delta.family
    window = family.sliding_window
    told = getattr(model.config.get_text_config(), "layer_types", None)
    trained = {id(parameter) for parameter in delta.parameters()}
    found: dict[object, list[int]] = {}
    trains = set()
    for number, layer in enumerate(family.layers):
        module = model.get_submodule(layer.path)
        parts = tuple((name, type(part).__name__) for name, part in module.named_modules())
        sizes = tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters())
        kind = told[number] if told is not None and (window is None or longest > window) else None
        found.setdefault((parts, sizes, kind), []).append(number)
        trains.add(any(id(parameter) in trained for parameter in module.parameters()))
    return list(found.values()) if len(trains) == 1 else []
