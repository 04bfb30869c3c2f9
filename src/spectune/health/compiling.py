"""Whether torch compiles a block here, and whether what it compiles is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spectune.errors import first_line
from spectune.health.numbers import here
from spectune.health.outcome import FAILED, NOT_HERE, OK, Outcome

#: in what torch raises where the tools are not there
_NO_TOOLS = ("InvalidCxxCompiler", "No working C++ compiler", "Python.h", "working triton", "TritonMissing",
             "Failed to find C compiler")  # fmt: skip
_WITHOUT = "Train with --set torch_compile=false"
#: float32: sums in another order
_CLOSE = 1e-4


class Block(nn.Module):
    """A small block: a norm, two products, an activation, and what came in added."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return out


def compiled_block(compile: Callable[..., Any] = torch.compile) -> Outcome:
    """Forward and backward of a block compiled, against the block as it is."""
    device, name = here(), "compile"
    torch.manual_seed(0)
    block = Block().to(device)
    x = torch.randn(4, 16, 32, device=device, requires_grad=True)
    wanted = _pass(block, block, x)
    try:
        found = _pass(block, compile(block), x)
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        cost = "20%" if device.type == "cuda" else "10%"
        if any(word in told for word in _NO_TOOLS):
            tools = "Triton and a C compiler" if device.type == "cuda" else "a C++ compiler and Python's headers"
            return Outcome(name, NOT_HERE, f"torch.compile needs {tools}: {first_line(error)}",
                           f"Steps of long runs take about {cost} longer")  # fmt: skip
        return Outcome(name, FAILED, f"{type(error).__name__}: {first_line(error)}", _WITHOUT)
    off = max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))
    if not off <= _CLOSE:
        says = f"a compiled block's output or gradients are off by {off:.1e} of the block's own"
        return Outcome(name, FAILED, says, _WITHOUT)
    return Outcome(name, OK, f"a block compiled on {device.type}, output and gradients off by {off:.0e}")


def _pass(block: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    out = run(x)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *block.parameters()])]


def recorded_graph() -> Outcome:
    """Forward and backward of a block recorded as one CUDA graph, replayed on another input."""
    name = "graphs"
    device = here()
    if device.type != "cuda":
        return Outcome(name, NOT_HERE, "there is no CUDA device", "Nothing: a CPU launches no kernels")
    torch.manual_seed(0)
    block = Block().to(device)
    x, other = (torch.randn(4, 16, 32, device=device) for _ in range(2))
    place = x.clone().requires_grad_()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            _pass(block, block, place)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded = _pass(block, block, place)
        with torch.no_grad():
            place.copy_(other)
        graph.replay()
    except RuntimeError as error:
        return Outcome(name, FAILED, first_line(error), "Train with --set cuda_graphs=false")
    wanted = _pass(block, block, other.requires_grad_())
    off = max(float((a - b).norm() / b.norm()) for a, b in zip(recorded, wanted, strict=True))
    if not off <= _CLOSE:
        return Outcome(name, FAILED, f"a replay is off by {off:.1e}", "Train with --set cuda_graphs=false")
    return Outcome(name, OK, f"recorded and replayed, off by {off:.0e}")
