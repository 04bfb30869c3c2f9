"""A pass through decoder blocks, captured: forward of all blocks in their order, backward in the reverse.

A graph reads and writes always the same memory. A block whose input is another block's output reads it where that one
wrote it, and its gradient is written where the other's backward reads it: nothing is copied between them. As in
`torch.cuda.make_graphed_callables`, which takes no keywords, no module with hooks, and copies in between.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from spectune.blocks.call import Call
from spectune.compute.memory import release_workspaces

#: what a call may hold beside tensors: values that are captured with it
_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)

#: parameters of a block from which on autograd does not handle each one's gradient: for every one it takes a few
#: microseconds of the host in a pass, and runs that are trained together have many
MANY = 24
#: by how much outputs may differ from those of the block itself, of their norm: kernels may be chosen anew
_CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


class CudaCapture:
    """CUDA graphs that share a memory pool, so they are to be replayed in the order in which they were captured.

    All passes run in the stream of the capture: a parameter's gradient is added up in the stream of the first pass
    that used it, and one that reaches out of the capture's stream cannot be captured.
    """

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def running(self, release: Callable[[], None]) -> Iterator[None]:
        """All passes run inside it, those that are not captured too; at its end graphs are let go by `release`."""
        outside = torch.cuda.current_stream()
        release_workspaces()  # both are kept by stream
        torch.cuda.empty_cache()
        self.stream.wait_stream(outside)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            outside.wait_stream(self.stream)
            torch.cuda.synchronize()
            release()
            release_workspaces()
            torch.cuda.empty_cache()

    def warm_up(self, function: Callable[[], None]) -> None:
        """Run it as it will be captured."""
        function()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the graphs' pool takes what the passes before had

    def capture(self, function: Callable[[], list[Any]]) -> tuple[list[Any], Callable[[], None]]:
        """Its result, whose tensors keep their memory, and the replay, which writes it anew."""
        graph = torch.cuda.CUDAGraph()
        # other threads may ask the device something meanwhile: NCCL's watchdog does, where there are several processes
        mode = "thread_local"
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode=mode):
            result = function()
        return result, graph.replay


@dataclass
class TracedCall:
    """A block's arguments in one pass, laid out flat.

    `leaves`: copies of tensors, and numbers. `chained`: leaves that are outputs of earlier blocks, as
    (block, number of the output); their place in `leaves` holds None. `signature`: of the arguments as they came.
    """

    leaves: list[Any]
    spec: TreeSpec
    chained: dict[int, tuple[int, int]]
    signature: Any


def signature(leaves: Sequence[Any]) -> Any:
    """What has to be the same for a graph to serve other arguments. None where they hold something else than tensors
    and constants."""
    if not all(isinstance(leaf, (Tensor, *_CONSTANTS)) for leaf in leaves):
        return None
    return tuple(
        (leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad) if isinstance(leaf, Tensor)
        else (type(leaf), leaf) for leaf in leaves
    )  # fmt: skip


def capture_blocks(
    plain: Sequence[Call], calls: Sequence[TracedCall], parameters: Sequence[nn.Parameter], capture: CudaCapture
) -> list[GraphedBlock]:
    """Capture all blocks (`plain`), given their arguments in one pass and all parameters that are trained. Raises
    RuntimeError where something cannot be captured, or memory does not suffice."""
    inputs: dict[int, Tensor] = {}
    blocks = [GraphedBlock(function, call, inputs) for function, call in zip(plain, calls, strict=True)]
    capture.warm_up(lambda: _warm_up(blocks, parameters))
    for block in blocks:
        block.take_inputs([earlier.outputs for earlier in blocks])
        block.capture_forward(capture)
    for index in range(len(blocks) - 1, -1, -1):
        blocks[index].capture_backward(capture, _read_by(blocks[index + 1 :], index))
    return blocks


def _warm_up(blocks: Sequence[GraphedBlock], parameters: Sequence[nn.Parameter]) -> None:
    """Every block once, forward and backward, which tells which parameters it uses."""
    outputs: list[list[Any]] = []
    for block in blocks:
        block.take_inputs(outputs)
        made = block.run()
        ends = [leaf for leaf in made if _wants_gradient(leaf)]
        starts = [leaf for leaf in block.leaves if _wants_gradient(leaf)]
        if ends:
            sums = [torch.ones_like(end) for end in ends]
            found = torch.autograd.grad(ends, [*starts, *parameters], sums, allow_unused=True)[len(starts) :]
            block.parameters = [p for p, gradient in zip(parameters, found, strict=True) if gradient is not None]
        outputs.append([leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in made])


def _read_by(later: Sequence[GraphedBlock], index: int) -> dict[int, Tensor]:
    """Of the outputs of block `index`, those that exactly one later block reads: number -> where their gradient is."""
    found: dict[int, list[Tensor | None]] = {}
    for block in later:
        for leaf, (source, number) in block.call.chained.items():
            if source == index:
                found.setdefault(number, []).append(block.gradients.of_inputs.get(leaf))
    return {number: places[0] for number, places in found.items() if len(places) == 1 and places[0] is not None}


@dataclass
class Gradients:
    """A block's captured backward: where it reads and writes gradients.

    Attributes:
        starts: numbers of the arguments that get a gradient.
        of_inputs, of_outputs: by the number of an argument and of an output.
        members: numbers of the block's parameters of each dtype.
        of_parameters: theirs, in a row for each dtype.
        views: of each of these rows, the gradients of its members, in their shapes.
        direct: the block gives its parameters their gradients by itself.
        replay: writes all of them but the outputs' anew.
    """

    starts: list[int] = field(default_factory=list)
    of_inputs: dict[int, Tensor] = field(default_factory=dict)
    of_outputs: dict[int, Tensor] = field(default_factory=dict)
    members: list[list[int]] = field(default_factory=list)
    of_parameters: list[Tensor] = field(default_factory=list)
    views: list[list[Tensor]] = field(default_factory=list)
    direct: bool = False
    replay: Callable[[], None] = lambda: None

    def copies(self, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
        """Of the parameters' gradients: they stay until the optimizer takes them, and other replays may come before."""
        copies: dict[int, Tensor] = {}
        for members, row in zip(self.members, self.of_parameters, strict=True):
            copies |= dict(zip(members, _parts(row.clone(), [parameters[n] for n in members]), strict=True))
        return [copies[n] for n in range(len(parameters))]

    def keep(self, parameters: Sequence[nn.Parameter]) -> None:
        """Before a replay: what `give` gave and nobody has taken since is copied, as the replay writes over it."""
        for members, row, views in zip(self.members, self.of_parameters, self.views, strict=True):
            left = [place for place, n in enumerate(members) if parameters[n].grad is views[place]]
            if left:
                parts = _parts(row.clone(), [parameters[n] for n in members])
                for place in left:
                    parameters[members[place]].grad = parts[place]

    def give(self, parameters: Sequence[nn.Parameter]) -> None:
        """After a replay: each parameter's gradient is where it was written, or what is there is added to it."""
        for members, views in zip(self.members, self.views, strict=True):
            added: list[tuple[Tensor, Tensor]] = []
            for n, view in zip(members, views, strict=True):
                before = parameters[n].grad
                if before is None:
                    parameters[n].grad = view
                else:
                    added.append((before, view))
            if added:
                torch._foreach_add_([before for before, _ in added], [view for _, view in added])


class GraphedBlock:
    """One block's graphs, called with the flat arguments of a call with its signature.

    Attributes:
        inputs: shared by all blocks of a pass: which tensor was copied into which place, by the place's `id`. To be
            cleared before each pass.
        passes: how many it was replayed in.
        gradients: backward; empty where no output has a gradient.
    """

    def __init__(self, function: Call, call: TracedCall, inputs: dict[int, Tensor]) -> None:
        self.function, self.call, self.inputs, self.passes = function, call, inputs, 0
        self.parameters: list[nn.Parameter] = []
        self.leaves: list[Any] = []
        self.outputs: list[Any] = []
        self.gradients = Gradients()
        self._spec: TreeSpec | None = None
        self._made: list[Any] = []  # with what autograd keeps of it
        #: numbers of the outputs that are tensors
        self._tensors: list[int] = []
        self._replay_forward: Callable[[], None] = lambda: None

    def take_inputs(self, outputs: Sequence[Sequence[Any]]) -> None:
        """The places of its arguments, given those of the outputs of earlier blocks."""
        self.leaves = list(self.call.leaves)
        for leaf, (block, number) in self.call.chained.items():
            place = outputs[block][number]
            if isinstance(place, Tensor):
                place = place.detach().requires_grad_(self.call.signature[leaf][-1])
            self.leaves[leaf] = place

    def run(self) -> list[Any]:
        """The block itself on these places; its outputs, flat."""
        args, kwargs = tree_unflatten(self.leaves, self.call.spec)
        made, self._spec = tree_flatten(self.function(*args, **kwargs))
        return made

    def capture_forward(self, capture: CudaCapture) -> None:
        def forward() -> list[Any]:
            self._made = self.run()
            return [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in self._made]

        self.outputs, self._replay_forward = capture.capture(forward)
        self._tensors = [n for n, leaf in enumerate(self._made) if isinstance(leaf, Tensor)]

    def capture_backward(self, capture: CudaCapture, read_by: dict[int, Tensor]) -> None:
        """`read_by`: where the gradients of outputs are that a later block's backward writes."""
        numbers = [n for n in self._tensors if self._made[n].requires_grad]
        if not numbers:
            return
        outputs = {n: read_by.get(n, torch.empty_like(self.outputs[n])) for n in numbers}
        starts = [n for n, leaf in enumerate(self.leaves) if _wants_gradient(leaf)]
        groups = _by_dtype(self.parameters)

        def backward() -> list[Any]:
            made, self._made = self._made, []  # what autograd kept is free for the blocks before
            ends, sums = [made[n] for n in numbers], [outputs[n] for n in numbers]
            wanted = [*(self.leaves[n] for n in starts), *self.parameters]
            found = torch.autograd.grad(ends, wanted, sums, allow_unused=True)
            own = found[len(starts) :]
            rows = [torch.cat([own[n].flatten() for n in members]) for members in groups]
            return [*found[: len(starts)], *rows]

        found, replay = capture.capture(backward)
        inputs = {n: gradient for n, gradient in zip(starts, found, strict=False) if gradient is not None}
        rows = found[len(starts) :]
        views = [_parts(row, [self.parameters[n] for n in members]) for row, members in zip(rows, groups, strict=True)]
        direct = len(self.parameters) >= MANY and not any(map(_is_watched, self.parameters))
        self.gradients = Gradients(starts, inputs, outputs, groups, rows, views, direct, replay)

    def takes(self, leaves: Sequence[Any], spec: TreeSpec) -> bool:
        """Whether the graphs serve these arguments."""
        if spec != self.call.spec or signature(leaves) != self.call.signature:
            return False
        # several blocks read one copy of a tensor that all were given
        pairs = zip(leaves, self.leaves, strict=True)
        return all(self.inputs.get(id(place), leaf) is leaf for leaf, place in pairs if isinstance(leaf, Tensor))

    def __call__(self, leaves: Sequence[Any]) -> Any:
        self.passes += 1
        starts = [leaf for leaf in leaves if _wants_gradient(leaf)]
        self._put(leaves)
        # one of them tells autograd that there is something to train
        trained = self.parameters[:1] if self.gradients.direct else self.parameters
        tensors = iter(_Replay.apply(self, *starts, *trained))  # type: ignore[no-untyped-call]
        made = [next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in self.outputs]
        assert self._spec is not None
        return tree_unflatten(made, self._spec)

    def agrees(self, leaves: Sequence[Any], output: Any) -> bool:
        """Whether a replay gives `output`, what the block itself gave for these arguments."""
        self._put(leaves)
        self._replay_forward()
        expected, spec = tree_flatten(output)
        return spec == self._spec and all(
            not isinstance(e, Tensor) or _close(e.detach(), o) for e, o in zip(expected, self.outputs, strict=True)
        )

    def _put(self, leaves: Sequence[Any]) -> None:
        for leaf, place in zip(leaves, self.leaves, strict=True):
            if isinstance(leaf, Tensor) and leaf.data_ptr() != place.data_ptr() and id(place) not in self.inputs:
                place.detach().copy_(leaf.detach())
                self.inputs[id(place)] = leaf

    def replay_backward(self, gradients: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients of arguments that want one, in memory that the next replay writes, and copies of parameters'; of
        these none where they have been given theirs."""
        own = self.gradients
        for number, gradient in zip(self._tensors, gradients, strict=True):
            place = own.of_outputs.get(number)
            if place is not None and gradient.data_ptr() != place.data_ptr():
                place.copy_(gradient)
        if own.direct:
            own.keep(self.parameters)
        own.replay()
        passed = [own.of_inputs[n].detach() if n in own.of_inputs else None for n in own.starts]
        if own.direct:
            own.give(self.parameters)
            return [*passed, None]
        return [*passed, *own.copies(self.parameters)]

    def replay_forward(self) -> list[Tensor]:
        self._replay_forward()
        return [self.outputs[n].detach() for n in self._tensors]

    def without_gradient(self, made: Sequence[Tensor]) -> list[Tensor]:
        """Those of the outputs `made` that have none."""
        return [tensor for n, tensor in zip(self._tensors, made, strict=True) if n not in self.gradients.of_outputs]


class _Replay(torch.autograd.Function):
    """A graphed block for autograd. The tensors given are those that get a gradient."""

    @staticmethod
    def forward(ctx: Any, block: GraphedBlock, *_: Tensor) -> tuple[Tensor, ...]:
        ctx.block = block
        made = block.replay_forward()
        ctx.mark_non_differentiable(*block.without_gradient(made))
        return tuple(made)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *ctx.block.replay_backward(gradients))


def _by_dtype(parameters: Sequence[nn.Parameter]) -> list[list[int]]:
    """Numbers of the parameters of each dtype."""
    found: dict[torch.dtype, list[int]] = {}
    for number, parameter in enumerate(parameters):
        found.setdefault(parameter.dtype, []).append(number)
    return list(found.values())


def _parts(row: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Of a row, what is each parameter's, in its shape."""
    parts = torch.split(row, [parameter.numel() for parameter in parameters])
    return [part.view(parameter.shape) for part, parameter in zip(parts, parameters, strict=True)]


def _is_watched(parameter: nn.Parameter) -> bool:
    """Whether somebody waits for autograd to have its gradient."""
    return bool(parameter._backward_hooks) or bool(parameter._post_accumulate_grad_hooks)


def _wants_gradient(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _close(expected: Tensor, found: Tensor) -> bool:
    if not expected.is_floating_point():
        return bool(torch.equal(expected, found))
    difference = (expected.double() - found.double()).norm()
    return bool(difference <= _CLOSE.get(expected.dtype, 1e-4) * expected.double().norm())
