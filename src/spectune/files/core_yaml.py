"""YAML by the core rules of its version 1.2: `off`, `no`, `12:30` and `2024-01-31` are words, `1e-3` is a number, `010`
is ten. Plain types only, of a bounded depth, and aliases that grow are refused before anything is made of them."""

import math
import re
from collections.abc import Iterator
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from spectune.files.plain_values import MAX_DEPTH, check_plain, whole_number

#: values that a file may expand to, by its aliases too
MAX_NODES = 200_000
_TAG = "tag:yaml.org,2002:"
#: the core schema's: tag, pattern, first characters
_CORE = [
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    ("merge", r"<<", ["<"]),
]
_PATTERNS = [(_TAG + kind, re.compile(f"(?:{pattern})\\Z"), first) for kind, pattern, first in _CORE]


class YamlError(ValueError):
    """What is wrong with YAML text, on one line; with its line and column where they are known."""


class _Loader(yaml.SafeLoader):
    """Keys are text as it is written, each once; scalars by the core rules."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as the base class has it
        first: [(tag, pattern) for tag, pattern, firsts in _PATTERNS if first in firsts]
        for first in {first for _, _, firsts in _PATTERNS for first in firsts}
    }

    #: numbers stay the words that they are written as
    in_words = False

    def plain_mapping(self, node: Node) -> dict[str, Any]:
        if not isinstance(node, MappingNode):
            raise YamlError(f"expected keys with values{_place(node)}")
        seen = set[str]()
        for key, _ in node.value:
            if not isinstance(key, ScalarNode):
                raise YamlError(f"a key is a list or a block, expected text{_place(key)}")
            if key.value in seen and key.tag != _TAG + "merge":
                raise YamlError(f"the key {key.value[:100]!a} stands twice{_place(key)}")
            seen.add(key.value)
        self.flatten_mapping(node)
        return {str(key.value): self.construct_object(value, deep=True) for key, value in node.value}

    def plain_map(self, node: Node) -> Iterator[dict[str, Any]]:
        yield self.plain_mapping(node)

    def refused(self, node: Node) -> None:
        raise YamlError(f"the tag {node.tag} is of no plain type{_place(node)}")

    def plain_int(self, node: ScalarNode) -> int | str:
        if self.in_words:
            return str(node.value)
        text = str(node.value).lower()
        for prefix, base in (("0o", 8), ("0x", 16)):
            if text.startswith(prefix):
                return whole_number(text[2:], base)
        return whole_number(text)

    def plain_float(self, node: ScalarNode) -> float | str:
        if self.in_words:
            return str(node.value)
        text = str(node.value).lower()
        if text.endswith((".inf", ".nan")):
            return float(text.replace(".", ""))
        if not math.isfinite(value := float(text)):
            raise YamlError(f"{text[:40]} is too large a number")
        return value


for _kind, _make in (
    ("map", _Loader.plain_map), ("int", _Loader.plain_int), ("float", _Loader.plain_float),
):  # fmt: skip
    _Loader.add_constructor(_TAG + _kind, _make)
for _kind in ("binary", "timestamp", "set", "omap", "pairs"):  # nothing here has a use for them
    _Loader.add_constructor(_TAG + _kind, _Loader.refused)


class _Dumper(yaml.SafeDumper):
    """Text is quoted wherever a reader of either version would take it for something else."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as the base class has it
        first: yaml.SafeDumper.yaml_implicit_resolvers.get(first, []) + _Loader.yaml_implicit_resolvers.get(first, [])
        for first in yaml.SafeDumper.yaml_implicit_resolvers.keys() | _Loader.yaml_implicit_resolvers.keys()
    }


def compose_yaml(text: str) -> Node | None:
    """The nodes of YAML text, which know their lines; None of an empty text. Raises YamlError: it is none, is too deep,
    or grows beyond `MAX_NODES` where its aliases are followed."""
    try:
        node: Node | None = _Loader(text).get_single_node()
    except RecursionError:
        raise YamlError(_DEEP) from None
    except (yaml.YAMLError, ValueError) as error:
        raise YamlError(_one_line(error)) from error
    if node is not None:
        _check_size(node)
    return node


def yaml_value(node: Node, *, in_words: bool = False) -> Any:
    """What a node stands for: text, a number, true, false, None, a list or a dict. Raises YamlError.

    Args:
        in_words: a number is the text that it is written as, for who takes text: `010`, `1e-3`, `0x1F`.
    """
    loader = _Loader("")
    loader.in_words = in_words
    try:
        found = loader.construct_object(node, deep=True)
        check_plain(found)
    except RecursionError:
        raise YamlError(_DEEP) from None
    except Exception as error:  # constructors raise whatever they meet
        raise YamlError(_one_line(error)) from error
    return found


def yaml_text(value: Any) -> str:
    """YAML of plain values, that readers of version 1.1 and of 1.2 read alike; keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


_DEEP = f"lists and blocks are nested more than {MAX_DEPTH} deep"


def _check_size(root: Node) -> None:
    """Raises YamlError: deeper than `MAX_DEPTH`, in a circle, or more than `MAX_NODES` with every alias written out."""
    sizes = dict[int, int]()
    stack: list[tuple[Node, bool]] = [(root, False)]
    above = set[int]()
    while stack:
        node, leaving = stack.pop()
        children = _children(node)
        if leaving:
            above.discard(id(node))
            sizes[id(node)] = 1 + sum(sizes[id(child)] for child in children)
            if sizes[id(node)] > MAX_NODES:
                raise YamlError(f"it has more than {MAX_NODES:,} values where its aliases are written out")
        elif id(node) in above:
            raise YamlError(f"an alias stands within what it is an alias of{_place(node)}")
        elif id(node) not in sizes:
            if len(above) >= MAX_DEPTH:
                raise YamlError(_DEEP)
            above.add(id(node))
            stack.append((node, True))
            stack += [(child, False) for child in children if isinstance(child, Node)]


def _children(node: Node) -> list[Node]:
    if isinstance(node, MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, SequenceNode) else []


def _place(node: Node) -> str:
    return f" (line {node.start_mark.line + 1})" if node.start_mark is not None else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
