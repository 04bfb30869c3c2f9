"""What compiled code writes to memory, on graphs that are small enough to count by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from spectune.planning.fusion import MOST_READS, REUSED_OPERATIONS, REUSED_READS, Schedule, schedule

ROWS, WIDE, NARROW = 8, 64, 16


def graph_of(function: Callable[..., Any], *shapes: tuple[int, ...], kept: bool = False) -> fx.Graph:
    """The operations of a function of tensors. Its inputs are held elsewhere, or (`kept`) only by this graph."""
    traced = make_fx(function, tracing_mode="fake")(*(torch.empty(shape) for shape in shapes)).graph
    for number, node in enumerate(n for n in traced.nodes if n.op == "placeholder"):
        node.name = f"{'kept' if kept else 'primals'}_{number}"
    [output] = (node for node in traced.nodes if node.op == "output")
    if not isinstance(output.args[0], list | tuple):
        output.args = ((output.args[0],),)
    return traced


def run(
    function: Callable[..., Any],
    *shapes: tuple[int, ...],
    kept: bool = False,
    scratch: Callable[[fx.Node], list[int]] = lambda _: [],
) -> Schedule:
    return schedule(graph_of(function, *shapes, kept=kept), lets_go=kept, scratch=scratch)


def made(plan: Schedule) -> list[int]:
    """Elements of what is written, in the order of writing."""
    return [plan.buffers[number].elements for name, number in plan.steps if name == "make"]


def names(plan: Schedule) -> list[tuple[str, int]]:
    """The steps, with elements in the place of buffers' numbers."""
    return [(name, plan.buffers[n].elements if name in ("make", "drop") else n) for name, n in plan.steps]


def peak(plan: Schedule) -> int:
    """Bytes of what is made here at most."""
    now = most = 0
    for name, number in plan.steps:
        if name == "scratch":
            most = max(most, now + number)
        elif name in ("make", "drop"):
            now += plan.buffers[number].bytes * (1 if name == "make" else -1)
            most = max(most, now)
    return most


A, B = (ROWS, WIDE), (WIDE, NARROW)


def test_pointwise_chains_are_written_once_where_a_product_reads_them() -> None:
    assert made(run(lambda x, w: (x * 2 + 1).relu() @ w, A, B)) == [ROWS * WIDE, ROWS * NARROW]


def test_pointwise_results_that_nobody_needs_whole_stay_in_registers() -> None:
    plan = run(lambda x, y: ((x * 2 + y).relu() * (x - y).exp(),), A, A)
    assert names(plan) == [("make", ROWS * WIDE)]


def test_a_product_is_written_and_what_is_made_of_it_where_it_lay() -> None:
    plan = run(lambda x, w: (x @ w).relu(), A, B)
    assert names(plan) == [("make", ROWS * NARROW), ("drop", ROWS * NARROW), ("make", ROWS * NARROW)]
    assert peak(plan) == 4 * ROWS * NARROW


def test_a_chain_of_products_by_hand() -> None:
    """x w1 is there until x w1 w2 is; the activation lies where that lay; then comes the last product."""
    w1, w2, w3 = (WIDE, 32), (32, 48), (48, 4)
    plan = run(lambda x, a, b, c: torch.relu(x @ a @ b) @ c, A, w1, w2, w3)
    first, second, last = ROWS * 32, ROWS * 48, ROWS * 4
    assert names(plan) == [
        ("make", first), ("make", second), ("drop", first), ("drop", second), ("make", second), ("make", last),
        ("drop", second),
    ]  # fmt: skip
    assert peak(plan) == 4 * (first + second)


def test_a_norm_is_one_kernel_and_writes_its_result_alone() -> None:
    def norm(x: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)

    assert made(run(norm, A)) == [ROWS * WIDE]


def test_what_a_norm_s_backward_needs_is_returned_and_so_written() -> None:
    def norm(x: Tensor) -> tuple[Tensor, Tensor]:
        scale = torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)
        return x * scale, scale

    plan = run(norm, A)
    assert sorted(made(plan)) == [ROWS, ROWS * WIDE]
    assert [plan.buffers[source.number].elements for source in plan.outputs] == [ROWS * WIDE, ROWS]


def test_a_product_between_keeps_kernels_apart() -> None:
    """The second pointwise kernel reads a product of the first one's result: neither may wait for the other."""
    plan = run(lambda x, w: ((y := x * 2) + (y @ w),), A, (WIDE, WIDE))
    assert made(plan) == [ROWS * WIDE] * 3


def test_kernels_over_other_elements_are_not_one() -> None:
    """Both write, and what is read by both is read twice."""
    plan = run(lambda x: (x * 2, x[:, :NARROW].contiguous() + 1), A)
    assert sorted(made(plan)) == [ROWS * NARROW, ROWS * WIDE]


@pytest.mark.parametrize(("count", "written"), [(REUSED_READS, False), (REUSED_READS + 1, True)])
def test_what_reads_much_is_written_down_if_it_is_read_more_than_once(count: int, written: bool) -> None:
    def add(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        total = inputs[0]
        for other in inputs[1:]:
            total = total + other
        return total.amax(-1), (total * 2).amax(0)  # over unlike elements, so not one kernel with the sum

    assert (ROWS * WIDE in [b.elements for b in run(add, *[A] * count).buffers]) is written


@pytest.mark.parametrize(("count", "written"), [(REUSED_OPERATIONS, False), (REUSED_OPERATIONS + 1, True)])
def test_what_takes_many_operations_is_written_down_if_it_is_read_more_than_once(count: int, written: bool) -> None:
    def long(x: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(count):
            x = x.sin()
        return x.amax(-1), (x * 2).amax(0)

    assert (ROWS * WIDE in [b.elements for b in run(long, A).buffers]) is written


@pytest.mark.parametrize(("count", "written"), [(MOST_READS, 0), (MOST_READS + 1, 1)])
def test_what_reads_too_much_is_written_down_at_once(count: int, written: int) -> None:
    def add(*inputs: Tensor) -> Tensor:
        total = inputs[0]
        for other in inputs[1:]:
            total = total + other
        return (total + 1).amax(-1)

    assert [b.elements for b in run(add, *[A] * count).buffers].count(ROWS * WIDE) == written


def test_views_take_nothing_and_are_given_back_as_views() -> None:
    plan = run(lambda x, w: (x @ w).view(2, ROWS // 2, NARROW).transpose(0, 1), A, B)
    [output] = plan.outputs
    assert made(plan) == [ROWS * NARROW]
    assert (output.made, output.shape, output.stride) == (True, (4, 2, NARROW), (NARROW, 4 * NARROW, 1))


def test_an_input_that_is_returned_is_no_buffer() -> None:
    plan = run(lambda x, y: (y.t(), x + y), A, A)
    assert (plan.outputs[0].made, plan.outputs[0].number) == (False, 1)
    assert made(plan) == [ROWS * WIDE]


def test_backward_frees_what_forward_kept_after_its_last_use_and_writes_over_it() -> None:
    """Of two tensors of one size kept from forward, a product ends with the first; the second is written over."""
    plan = run(lambda x, y, w: (x @ w, y.exp()), A, A, B, kept=True)
    steps = names(plan)
    product, second = ("make", ROWS * NARROW), ("make", ROWS * WIDE)
    assert sorted(steps) == sorted([product, second, *(("let go", number) for number in range(3))])
    assert steps.index(product) < min(steps.index(("let go", 0)), steps.index(("let go", 2)))
    assert steps.index(("let go", 1)) == steps.index(second) - 1


def test_forward_lets_nothing_go_that_is_held_elsewhere() -> None:
    plan = run(lambda x, y, w: (x @ w, y.exp()), A, A, B)
    assert {name for name, _ in plan.steps} == {"make"}


def test_gradients_that_come_in_are_freed_and_never_written_over() -> None:
    graph = graph_of(lambda x: (x.exp(),), A, kept=True)
    [node] = (n for n in graph.nodes if n.op == "placeholder")
    node.name = "tangents_1"
    plan = schedule(graph, lets_go=True, scratch=lambda _: [])
    assert [name for name, _ in plan.steps] == ["make", "let go"]


def test_scratch_comes_on_top_of_what_its_operation_makes() -> None:
    def taken(node: fx.Node) -> list[int]:
        return [1000, 24] if node.target is torch.ops.aten.mm.default else []

    plan = run(lambda x, w: (x + 1) @ w, A, B, scratch=taken)
    assert peak(plan) == 4 * (ROWS * WIDE + ROWS * NARROW) + 1024


def test_the_order_is_the_one_that_takes_less() -> None:
    """In the graph's order both wide products are there at once; one is shortened before the other is made."""

    def two(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        one, other = x @ w, (x + 1) @ w
        return one.t() @ x, other.t() @ x

    wide = (4, 256)
    graph = graph_of(two, (1024, 4), wide)
    plan = schedule(graph, lets_go=False, scratch=lambda _: [])
    product, short = 1024 * 256, 256 * 4
    assert peak(plan) < 4 * 2 * product
    assert made(plan).count(product) == made(plan).count(short) == 2
