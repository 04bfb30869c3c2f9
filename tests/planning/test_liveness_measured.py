"""What `liveness.py` says that compiled code writes, against the code that the compiler does write."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from spectune.blocks.compile import compiler_settings
from spectune.planning.liveness import Schedule, schedule

TOKENS, WIDTH, INNER, RANK = 64, 128, 512, 4
WIDE = TOKENS * INNER * 4


def gated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A gated feed-forward, frozen but for a product of low rank beside `down`."""
    inner = F.silu(x @ gate.t()) * (x @ up.t())
    return inner @ down.t() + (inner @ a.t()) @ b.t()


def plain(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, a: Tensor, b: Tensor) -> Tensor:
    inner = torch.relu(x @ gate.t())
    return inner @ down.t() + (inner @ a.t()) @ b.t()


def inputs() -> list[Tensor]:
    shapes = [(2, TOKENS // 2, WIDTH), (INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER), (RANK, INNER), (WIDTH, RANK)]
    found = [torch.randn(shape) * 0.1 for shape in shapes]
    for number in (0, 4, 5):
        found[number].requires_grad_()
    return found


def peak(plan: Schedule) -> int:
    now = most = 0
    for name, number in plan.steps:
        if number >= 0:
            now += plan.buffers[number].bytes * (1 if name == "allocate" else -1)
        most = max(most, now)
    return most


def planned(function: Callable[..., Tensor]) -> list[int]:
    """Peaks of what forward and backward make, by `liveness.py`."""
    found: list[int] = []

    def compiler(backward: bool) -> Callable[..., Any]:
        def compile_graph(graph: fx.GraphModule, _: Any) -> Any:
            found.append(peak(schedule(graph.graph, donates_inputs=backward, scratch=lambda _: 0)))
            return make_boxed_func(graph.forward)

        return compile_graph

    def partition(graph: fx.GraphModule, given: Any, **settings: Any) -> Any:
        return min_cut_rematerialization_partition(graph, given, compiler="inductor", **settings)

    backend = aot_autograd(
        fw_compiler=compiler(False), bw_compiler=compiler(True), partition_fn=partition,
        decompositions=select_decomp_table(),
    )  # fmt: skip
    torch._dynamo.reset()
    with compiler_settings(1.0):
        torch.compile(function, backend=backend, fullgraph=True)(*inputs()).sum().backward()
    return found


def written(function: Callable[..., Tensor]) -> list[int]:
    """The same of the code that inductor writes."""
    torch._dynamo.reset()
    given = inputs()

    def run() -> None:
        torch.compile(function, fullgraph=True)(*given).sum().backward()

    with (
        compiler_settings(1.0), torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):  # fmt: skip
        _, codes = run_and_get_code(run)
    return [_peak_of_code(code.split("def call(")[1].splitlines()) for code in codes]


def _peak_of_code(lines: Sequence[str]) -> int:
    live: dict[str, int] = {}
    most = 0
    for line in lines:
        if made := re.search(r"(\w+) = empty_strided_cpu\(\(([\d, ]+)\), .*torch\.(\w+)\)", line):
            elements = math.prod(int(size) for size in made[2].split(",") if size.strip())
            live[made[1]] = elements * getattr(torch, made[3]).itemsize
        elif again := re.search(r"(\w+) = (?:reinterpret_tensor\()?(\w+).*; del \w+  # reuse", line):
            live[again[1]] = live.pop(again[2], WIDE)  # not made here: an input, of which only the wide ones are taken
        elif gone := re.search(r"^\s*del (\w+)", line):
            live.pop(gone[1], None)
        most = max(most, sum(live.values()))
    return most


@pytest.mark.slow
def test_peaks_are_those_of_the_compilers_code() -> None:
    for ours, real in zip(planned(plain), written(plain), strict=True):
        assert ours == pytest.approx(real, rel=0.03), (ours / WIDE, real / WIDE)


@pytest.mark.slow
def test_less_by_no_more_than_what_one_fused_kernel_writes_beside_its_first_result() -> None:
    """The gradients of gate and up, and the gated product again, are one kernel's results: three tensors at once."""
    for ours, real in zip(planned(gated), written(gated), strict=True):
        assert real - 2 * WIDE <= ours <= 1.03 * real, (ours / WIDE, real / WIDE)


def _schedule(function: Callable[..., Any], *given: Tensor) -> Schedule:
    graph = make_fx(function, tracing_mode="fake")(*given)
    for node in graph.graph.nodes:  # as names of what forward kept: may be written over
        if node.op == "placeholder":
            node.name = f"kept_{node.name}"
    return schedule(graph.graph, donates_inputs=True, scratch=lambda _: 0)


def _order(plan: Schedule) -> list[str]:
    return [name for name, _ in plan.steps]


def test_a_kernel_writes_over_what_it_alone_reads() -> None:
    x, weight = torch.randn(8, 8), torch.randn(8, 8)
    plan = _schedule(lambda x, w: [torch.mm((torch.mm(x, w) * 2).sin(), w)], x, weight)
    # the first product goes before its sine is made, in its place
    assert _order(plan) == ["allocate", "free", "free", "allocate", "allocate", "free", "free"]
    assert peak(plan) == 2 * 8 * 8 * 4


def test_memory_is_written_over_only_in_its_own_dtype() -> None:
    def rounded(x: Tensor, weight: Tensor) -> list[Tensor]:
        return [torch.mm(x, weight).to(torch.int32)]

    assert peak(_schedule(rounded, torch.randn(8, 8), torch.randn(8, 8))) == 2 * 8 * 8 * 4
