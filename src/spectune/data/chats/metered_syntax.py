"""A chat template's syntax tree with its steps counted and its values looked at.

What stands in a loop or a macro is counted as a whole, when it is entered: that costs an honest template next to
nothing, and needs no hook at each operation. Hooks stand where a value is made that may be larger than its parts, or
where one is written.
"""

from typing import Any

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

#: hooks are filters, as jinja calls those directly; no template can write these names
MADE, SLICED, SHOWN, ROUNDS, STEP, APPLIED = (
    f"spectune {name}" for name in ("made", "sliced", "shown", "rounds", "step", "applied")
)
#: filters that give text
_TEXT = frozenset(
    {MADE, SHOWN, "trim", "tojson", "upper", "lower", "capitalize", "replace", "indent", "join", "string"}
)
#: so many additions stand in one expression without a look at what they make
_ADDITIONS = 8
#: nodes of the tree that are one step
_NODES_A_STEP = 8


def meter(tree: nodes.Template) -> nodes.Template:
    """The tree, changed in place. Raises RecursionError: it is nested too deeply."""
    _Metered().visit(tree)
    return tree


def _hook(name: str, node: Any, *given: int) -> nodes.Filter:
    arguments: list[nodes.Expr] = [nodes.Const(value) for value in given]
    return nodes.Filter(node, name, arguments, [], None, None, lineno=node.lineno, environment=node.environment)


def _is_hooked(node: nodes.Node) -> bool:
    """Whether what a node gives is text, and is looked at where it is made."""
    return isinstance(node, nodes.Const | nodes.TemplateData) or (
        isinstance(node, nodes.Filter)
        and node.name in _TEXT
        and (node.name != MADE or isinstance(node.node, nodes.Add | nodes.Concat))
    )


class _Metered(NodeTransformer):
    def __init__(self) -> None:
        #: nodes and characters that were seen so far
        self._seen = 0
        self._visitors: dict[type[nodes.Node], Any] = {
            nodes.TemplateData: self._text, nodes.Const: self._constant, nodes.For: self._for,
            nodes.Output: self._output, nodes.Concat: self._concat, nodes.Add: self._add, nodes.Sub: self._sub,
            nodes.Getitem: self._getitem, **dict.fromkeys((nodes.Macro, nodes.CallBlock, nodes.Block), self._entered),
            **dict.fromkeys((nodes.List, nodes.Tuple, nodes.Dict), self._built),
        }  # fmt: skip

    def get_visitor(self, node: nodes.Node) -> Any:
        return self._visitors.get(type(node))

    def generic_visit(self, node: Any, *args: Any, **kwargs: Any) -> Any:
        self._seen += 1
        return super().generic_visit(node, *args, **kwargs)

    def _cost(self, before: int) -> int:
        return 1 + (self._seen - before) // _NODES_A_STEP

    def _text(self, node: nodes.TemplateData) -> nodes.Node:
        self._seen += 1 + len(node.data) // 128
        return node

    def _constant(self, node: nodes.Const) -> nodes.Node:
        self._seen += 1 + (len(node.value) // 128 if isinstance(node.value, str) else 0)
        return node

    def _for(self, node: nodes.For) -> nodes.Node:
        before = self._seen
        self.generic_visit(node)
        node.iter = _hook(ROUNDS, node.iter, self._cost(before))
        if node.recursive:
            self._step(node, before)
        return node

    def _entered(self, node: Any) -> nodes.Node:
        before = self._seen
        self.generic_visit(node)
        self._step(node, before)
        return node  # type: ignore[no-any-return]

    def _step(self, node: Any, before: int) -> None:
        count = _hook(STEP, nodes.Const(None, lineno=node.lineno, environment=node.environment), self._cost(before))
        node.body.insert(0, nodes.ExprStmt(count, lineno=node.lineno, environment=node.environment))

    def _output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [part if _is_hooked(part) else _hook(SHOWN, part) for part in node.nodes]
        return node

    def _concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        if all(isinstance(part, nodes.Const) for part in node.nodes):
            return node
        node.nodes = [part if isinstance(part, nodes.Const) else _hook(SHOWN, part) for part in node.nodes]
        return _hook(MADE, node)

    def _add(self, node: nodes.Add) -> nodes.Node:
        left: nodes.Expr = node
        chain: list[nodes.Add] = []
        while isinstance(left, nodes.Add):  # not by recursion: there may be thousands
            chain.append(left)
            left = left.left
        found: nodes.Expr = self.visit(left)
        plain = isinstance(found, nodes.Const)
        since = 0
        for add in reversed(chain):
            self._seen += 1
            add.left, add.right = found, self.visit(add.right)
            plain = plain and isinstance(add.right, nodes.Const)
            since = 0 if plain or _is_number(add.left) or _is_number(add.right) else since + 1
            found = add
            if since == _ADDITIONS:
                found, since = _hook(MADE, add), 0
        return _hook(MADE, found) if since else found

    def _sub(self, node: nodes.Sub) -> nodes.Node:
        self.generic_visit(node)
        return node if _is_number(node.left) or _is_number(node.right) else _hook(MADE, node)

    def _getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _hook(SLICED, node) if isinstance(node.arg, nodes.Slice) else node

    def _built(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        stored = getattr(node, "ctx", "load") != "load"
        constant = all(isinstance(part, nodes.Const) for part in node.iter_child_nodes())
        return node if stored or constant else _hook(MADE, node)


def _is_number(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Const) and isinstance(node.value, int | float)
