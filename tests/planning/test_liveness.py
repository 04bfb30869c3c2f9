"""What compiled code writes to memory, on graphs that are small enough to count by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from spectune.planning.liveness import Schedule, schedule

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
    scratch: Callable[[fx.Node], int] = lambda _: 0,
) -> Schedule:
    return schedule(graph_of(function, *shapes, kept=kept), donates_inputs=kept, scratch=scratch)


def made(plan: Schedule) -> list[int]:
    """Elements of what is written, in the order of writing."""
    return [plan.buffers[number].elements for name, number in plan.steps if name == "allocate"]


def names(plan: Schedule) -> list[tuple[str, int]]:
    """The steps, with elements in the place of buffers' numbers."""
    return [(name, n if n < 0 or name == "scratch" else plan.buffers[n].elements) for name, n in plan.steps]


def peak(plan: Schedule) -> int:
    """Bytes of what is made here at most."""
    now = most = 0
    for name, number in plan.steps:
        if name == "scratch":
            most = max(most, now + number)
        elif number >= 0:
            now += plan.buffers[number].bytes * (1 if name == "allocate" else -1)
            most = max(most, now)
    return most


A, B = (ROWS, WIDE), (WIDE, NARROW)


def test_pointwise_chains_are_written_once_where_a_product_reads_them() -> None:
    assert made(run(lambda x, w: (x * 2 + 1).relu() @ w, A, B)) == [ROWS * WIDE, ROWS * NARROW]


def test_pointwise_results_that_nobody_needs_whole_stay_in_registers() -> None:
    plan = run(lambda x, y: ((x * 2 + y).relu() * (x - y).exp(),), A, A)
    assert names(plan) == [("allocate", ROWS * WIDE)]


def test_a_product_is_written_and_what_is_made_of_it_where_it_lay() -> None:
    plan = run(lambda x, w: (x @ w).relu(), A, B)
    assert names(plan) == [("allocate", ROWS * NARROW), ("free", ROWS * NARROW), ("allocate", ROWS * NARROW)]
    assert peak(plan) == 4 * ROWS * NARROW


def test_a_chain_of_products_by_hand() -> None:
    """x w1 is there until x w1 w2 is; the activation lies where that lay; then comes the last product."""
    w1, w2, w3 = (WIDE, 32), (32, 48), (48, 4)
    plan = run(lambda x, a, b, c: torch.relu(x @ a @ b) @ c, A, w1, w2, w3)
    first, second, last = ROWS * 32, ROWS * 48, ROWS * 4
    assert names(plan) == [
        ("allocate", first), ("allocate", second), ("free", first), ("free", second), ("allocate", second),
        ("allocate", last), ("free", second),
    ]  # fmt: skip
    assert peak(plan) == 4 * (first + second)


def test_a_norm_writes_a_number_a_row_beside_its_result() -> None:
    def norm(x: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)

    assert made(run(norm, A)) == [ROWS, ROWS * WIDE]


def test_what_a_norm_s_backward_needs_is_returned_and_so_written() -> None:
    def norm(x: Tensor) -> tuple[Tensor, Tensor]:
        scale = torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)
        return x * scale, scale

    plan = run(norm, A)
    assert sorted(made(plan)) == [ROWS, ROWS, ROWS * WIDE]
    assert [plan.buffers[number].elements for number, _ in plan.outputs] == [ROWS * WIDE, ROWS]


def test_a_product_between_keeps_kernels_apart() -> None:
    """The second pointwise kernel reads a product of the first one's result: neither may wait for the other."""
    plan = run(lambda x, w: ((y := x * 2) + (y @ w),), A, (WIDE, WIDE))
    assert made(plan) == [ROWS * WIDE] * 3


def test_views_take_nothing_and_are_given_back_as_views() -> None:
    plan = run(lambda x, w: (x @ w).view(2, ROWS // 2, NARROW).transpose(0, 1), A, B)
    [(number, view)] = plan.outputs
    assert made(plan) == [ROWS * NARROW]
    assert (number, view.shape, view.stride()) == (0, (4, 2, NARROW), (NARROW, 4 * NARROW, 1))


def test_an_input_that_is_returned_is_no_buffer() -> None:
    plan = run(lambda x, y: (y.t(), x + y), A, A)
    assert plan.outputs[0][0] == ~1
    assert made(plan) == [ROWS * WIDE]


def test_backward_frees_what_forward_kept_after_its_last_use_and_writes_over_it() -> None:
    """Of two tensors of one size kept from forward, a product ends with the first; the second is written over."""
    plan = run(lambda x, y, w: (x @ w, y.exp()), A, A, B, kept=True)
    steps = names(plan)
    product, second = ("allocate", ROWS * NARROW), ("allocate", ROWS * WIDE)
    assert sorted(steps) == sorted([product, second, *(("free", ~number) for number in range(3))])
    assert steps.index(product) < min(steps.index(("free", ~0)), steps.index(("free", ~2)))
    assert steps.index(("free", ~1)) == steps.index(second) - 1


def test_forward_lets_nothing_go_that_is_held_elsewhere() -> None:
    plan = run(lambda x, y, w: (x @ w, y.exp()), A, A, B)
    assert {name for name, _ in plan.steps} == {"allocate"}


def test_gradients_that_come_in_are_freed_and_never_written_over() -> None:
    graph = graph_of(lambda x: (x.exp(),), A, kept=True)
    [node] = (n for n in graph.nodes if n.op == "placeholder")
    node.name = "tangents_1"
    plan = schedule(graph, donates_inputs=True, scratch=lambda _: 0)
    assert [name for name, _ in plan.steps] == ["allocate", "free"]


def test_scratch_comes_on_top_of_what_its_operation_makes() -> None:
    def taken(node: fx.Node) -> int:
        return 1024 if node.target is torch.ops.aten.mm.default else 0

    plan = run(lambda x, w: (x + 1) @ w, A, B, scratch=taken)
    assert peak(plan) == 4 * (ROWS * WIDE + ROWS * NARROW) + 1024
