"""Products with something narrow, of linears that share their input, made one product: a pass over a compiled graph.

LoRA's `A` of queries, keys and values (and of gate and up) are multiplied with the same tokens, and so are their
gradients; what they add to the tokens' gradient is one sum. Each of these products reads or writes all tokens to do
next to nothing with them. In the graphs that inductor compiles (forward, and backward) this pass finds

- `x b1, x b2, ...` with narrow `b`: `x [b1 b2 ...]`, cut apart after;
- `a1 x, a2 x, ...` with short `a`: `[a1; a2; ...] x`, cut apart after;
- `... + l1 r1 + ... + l2 r2 + ...` with narrow `l`: `... + [l1 l2 ...] [r1; r2; ...] + ...`.

It is in the graph or it is not: routes, dropout (whose inputs differ), ranks and recomputation are the graph's matter.
Up to the rounding of sums the result is the same; in the last case, fewer sums are rounded.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.pattern_matcher import stable_topological_sort

aten = torch.ops.aten
#: products are narrow up to this; a quarter of the other side's width at most
NARROW = 64
_RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)


class GroupNarrowProducts(CustomGraphPass):
    """For `torch._inductor.config.post_grad_custom_pre_pass`. Works in place."""

    def __call__(self, graph: fx.Graph) -> None:
        # one group at a time: what was found before the last change may depend on it now
        while (rewrite := _next(graph)) is not None:
            rewrite()
            stable_topological_sort(graph)
            graph.eliminate_dead_code()

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


def _next(graph: fx.Graph) -> Callable[[], None] | None:
    for side in (0, 1):
        if members := _with_one_input(graph, side):
            return partial(_share_an_input, graph, members, side)
    members = _in_one_sum(graph)
    return partial(_join_summands, graph, members) if members else None


def _shape(node: Any) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _dtype(node: fx.Node) -> torch.dtype | None:
    return getattr(node.meta.get("val"), "dtype", None)


def _is_narrow(narrow: Any, other: Any) -> bool:
    return isinstance(narrow, int) and narrow <= NARROW and (not isinstance(other, int) or other >= 4 * narrow)


def _with_one_input(graph: fx.Graph, side: int) -> list[fx.Node]:
    """Some products that share the input at `side`, and whose others are narrow and independent of each other."""
    groups: dict[Any, list[fx.Node]] = {}
    order = {node: place for place, node in enumerate(graph.nodes)}
    for product in graph.find_nodes(op="call_function", target=aten.mm.default):
        own = product.args[1 - side]
        inner, narrow = _shape(own) if side == 0 else _shape(own)[::-1]
        members = groups.setdefault((product.args[side], _dtype(product)), [])
        if _is_narrow(narrow, inner) and not (members and _depends(product, set(members), order, order[members[0]])):
            members.append(product)
    return next((members for members in groups.values() if len(members) > 1), [])


def _depends(node: fx.Node, others: set[fx.Node], order: dict[fx.Node, int], first: int) -> bool:
    """Whether any of `others`, the first of which stands at place `first`, is among what `node` is made of."""
    pending, seen = list(node.all_input_nodes), set()
    while pending:
        above = pending.pop()
        if above in others:
            return True
        if above not in seen and order[above] > first:
            seen.add(above)
            pending += above.all_input_nodes
    return False


def _share_an_input(graph: fx.Graph, members: list[fx.Node], side: int) -> None:
    shared, dim = members[0].args[side], 1 - side
    with graph.inserting_before(members[0]):
        joined = _cat(graph, [member.args[1 - side] for member in members], dim)
        pair = (shared, joined) if side == 0 else (joined, shared)
        product = _call(graph, aten.mm.default, *pair)
        start = 0
        for member in members:
            width = _shape(member)[dim]
            member.replace_all_uses_with(_call(graph, aten.slice.Tensor, product, dim, start, start + width))
            start += width
    for member in members:
        graph.erase_node(member)


def _in_one_sum(graph: fx.Graph) -> list[fx.Node]:
    """Some products over few numbers that are all added to one sum, and used nowhere else."""
    groups: dict[Any, list[fx.Node]] = {}
    for product in graph.find_nodes(op="call_function", target=aten.mm.default):
        inner, width = _shape(product.args[1])
        if _is_narrow(inner, width) and (above := _sum_of(product)).target is aten.add.Tensor:
            groups.setdefault((above, _dtype(product), width), []).append(product)
    return next((members for members in groups.values() if len(members) > 1), [])


def _sum_of(node: fx.Node) -> fx.Node:
    """The last node of the sum that a node is a summand of: it, and each sum before, is used once."""
    while len(node.users) == 1:
        [user] = node.users
        if user.target is aten.add.Tensor:
            alike = not user.kwargs and all(isinstance(a, fx.Node) and _shape(a) == _shape(user) for a in user.args)
        else:
            alike = user.target in _RESHAPES and node.target is aten.mm.default
        if not alike or _dtype(user) != _dtype(node):
            break
        node = user
    return node


def _join_summands(graph: fx.Graph, members: list[fx.Node]) -> None:
    first, *rest = members
    with graph.inserting_before(first):
        sides = [_cat(graph, [member.args[side] for member in members], 1 - side) for side in (0, 1)]
        product = _call(graph, aten.mm.default, *sides)
    for member in rest:
        [user] = member.users
        summand = user if user.target in _RESHAPES else member
        [total] = summand.users
        [other] = (term for term in total.args if term is not summand)
        total.replace_all_uses_with(other)  # type: ignore[arg-type]
        graph.erase_node(total)
    first.replace_all_uses_with(product)


def _cat(graph: fx.Graph, parts: list[Any], dim: int) -> fx.Node:
    """Put together; what is transposed before it is, so that each part is copied as it lies in memory."""
    if all(part.target is aten.permute.default and list(part.args[1]) == [1, 0] for part in parts):
        return _call(graph, aten.permute.default, _cat(graph, [part.args[0] for part in parts], 1 - dim), [1, 0])
    return _call(graph, aten.cat.default, parts, dim)


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta["val"] = target(*fx.map_arg(args, lambda given: given.meta["val"]))
    return node
