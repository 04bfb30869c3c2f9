"""One training step of a method on a base, traced on the meta device: what is made, and when it is freed.

The step is the real one: the model's own forward, the method's own modules and hooks, the loss on labelled positions,
autograd's backward, recomputation where checkpointing is on. Only a few layers run; `repeated_layers.py` repeats them.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spectune.blocks.call import Wrapper, wrapped
from spectune.compute.evaluating import evaluating
from spectune.deltas import packed, packing
from spectune.planning.graph_memory import BlockTensors
from spectune.planning.kernels import kernels_of
from spectune.planning.optimizer_memory import steps_in_backward
from spectune.planning.shape import Shape
from spectune.planning.skeleton import Skeleton
from spectune.planning.trace import Trace
from spectune.planning.tracer import Tracer

#: of which it is found out how the model makes its logits
_TINY = Shape(rows=1, length=2, targets=1, all_targets=1)


def trace_step(built: Skeleton, shape: Shape, *, accumulating: bool = False) -> Trace:
    """Trace forward, loss and backward. Marks: `F<layer>` before a layer, `head` after the last one, `B<layer>` where
    backward comes to a layer. Gradients of what is trained are labelled, and never freed.

    Args:
        accumulating: gradients are there already and are added to; the trace then leaves them out.

    Raises:
        torch._dynamo.exc.TorchDynamoException: layers are compiled, and the compiler cannot trace one as a whole.
    """
    objective = built.workload.objective
    model, trained, device = built.model, list(built.delta.parameters()), built.workload.device
    kernels = partial(kernels_of, device, cudnn=built.execution.cudnn)
    if accumulating:
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
    batch = _batch(built, shape)
    tracer = _tracer(built, shape, [parameter.grad for parameter in trained if parameter.grad is not None])
    trace = tracer.trace
    model.train()
    built.block_tensors = BlockTensors()
    steps = _stepped(tracer, trained) if steps_in_backward(built.workload.optim) else nullcontext()
    with kernels(), Tracer(_TINY, ()):  # found out once a model, before its first step: no part of any
        objective.prepare(model, _batch(built, replace(_TINY, documents=shape.documents, padded=shape.padded)))
    compiled = nullcontext() if built.compiled is None else built.compiled.running(tracer)
    with kernels(), _documents(built, shape), tracer, _marked(tracer, built), steps, compiled:
        loss, _ = objective.loss_sum(model, batch, fuse=built.compiled is not None, device_type=device)
        tracer.backward = True
        torch.autograd.backward(loss / shape.all_targets)
        del loss
        for parameter in trained:
            if parameter.grad is not None:
                tracer.relabel(parameter.grad, "gradients")
        events = len(trace.events)
    for parameter in trained:
        parameter.grad = None
    del trace.events[events:]
    return trace


def trace_validation(built: Skeleton, shape: Shape) -> Trace:
    """Trace the loss of a batch without gradients, as validation takes it. Marks as in `trace_step`, forward only."""
    tracer, device, batch = _tracer(built, shape), built.workload.device, _batch(built, shape, training=False)
    kernels = partial(kernels_of, device, cudnn=built.execution.cudnn)
    with evaluating(built.model):
        with kernels(), Tracer(_TINY, ()):  # found out once a model, before its first batch: no part of any
            built.workload.objective.prepare(built.model, _batch(built, _TINY, training=False))
        with kernels(), tracer, _marked(tracer, built):
            built.workload.objective.token_losses(built.model, batch, device_type=device)
    return tracer.trace


@contextmanager
def _stepped(tracer: Tracer, trained: Iterable[nn.Parameter]) -> Iterator[None]:
    """Hooks that do to memory what stepping in backward does: a float32 copy of a gradient, both freed in the step."""

    def step(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        tracer.relabel(parameter.grad, "gradients")
        tracer.relabel(gradient, "gradients")
        parameter.grad = None
        del gradient

    handles = [parameter.register_post_accumulate_grad_hook(step) for parameter in trained]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tracer(built: Skeleton, shape: Shape, gradients: Iterable[Tensor] = ()) -> Tracer:
    return Tracer(shape, [*built.model.parameters(), *built.model.buffers(), *built.delta.parameters(), *gradients])


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


def _batch(built: Skeleton, shape: Shape, *, training: bool = True) -> dict[str, Tensor]:
    """A batch as the training loop gives it: without a mask where it would hide nothing."""
    names, objective = ["input_ids"], built.workload.objective
    if shape.documents is not None:
        names.append("position_ids")
    elif shape.padded or not training:
        names.append("attention_mask")
    size = (shape.rows, shape.length)
    labels = objective.label_shape(*size)
    targets = min(shape.all_targets, math.prod(labels))  # a plan may take all tokens for targets
    sizes = dict.fromkeys(names, size) | {"labels": labels, "positions": (targets,)}
    return {name: torch.zeros(size, dtype=torch.int64, device="meta") for name, size in sizes.items()}


@contextmanager
def _marked(tracer: Tracer, built: Skeleton) -> Iterator[None]:
    """Mark where each layer begins, forward and backward: around its whole call, compiled or recomputed as it is."""
    last = len(built.layers) - 1

    def arrives(index: int, gradient: Tensor) -> None:
        tracer.in_layers = True
        tracer.mark(f"B{index}")
        hands_over(gradient)

    def hands_over(tensor: Tensor) -> None:
        if (number := tracer.number_of(tensor)) is not None:
            tracer.trace.between_blocks.add(number)

    def marking(index: int, call: Any) -> Any:
        def marked(*args: Any, **kwargs: Any) -> Any:
            tracer.label = "activations"
            tracer.mark(f"F{index}")
            output = call(*args, **kwargs)
            if torch.is_grad_enabled():
                built.block_tensors.note(tracer, (args, kwargs), output)
            if index == last:
                tracer.label = "logits"
                tracer.mark("head")
            out = output[0] if isinstance(output, tuple) else output
            if isinstance(out, Tensor):
                hands_over(out)
                if out.requires_grad:
                    out.register_hook(partial(arrives, index))  # type: ignore[no-untyped-call]
            return output

        return marked

    with wrapped(built.layers, Wrapper.MARKED, lambda index, layer, inner: marking(index, inner)):
        yield
