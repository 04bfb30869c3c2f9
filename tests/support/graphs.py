"""A compiler's two graphs of a block, cut as training cuts them, and run without kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.decomposition import select_decomp_table

from spectune.blocks.partition import partition

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}


class Cut:
    """A backend of `torch.compile`. Notes the products of the graphs that it is given."""

    def __init__(self) -> None:
        self.forward: list[int] = []
        self.backward: list[int] = []

    def __call__(self, graph: fx.GraphModule, inputs: Any) -> Any:
        backend = aot_autograd(
            fw_compiler=self._noting(self.forward),
            bw_compiler=self._noting(self.backward),
            partition_fn=partition,
            decompositions=select_decomp_table(),
        )
        return backend(graph, inputs)

    @staticmethod
    def _noting(counts: list[int]) -> Callable[..., Any]:
        def compile_graph(graph: fx.GraphModule, _: Any) -> Any:
            counts.append(sum(node.target in PRODUCTS for node in graph.graph.nodes))
            return make_boxed_func(graph.forward)

        return compile_graph
