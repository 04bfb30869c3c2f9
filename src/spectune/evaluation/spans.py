"""Spans of tags such as B-PER, I-PER, O: counted as seqeval counts them by default, which is conlleval's way.

A span goes on while its type does; one that begins with I- (behind O, or behind another type) is one too. B- begins a
new one, S- is one by itself, E- ends one.
"""

from collections.abc import Iterable, Sequence

_PREFIXES = frozenset("BIES")
Span = tuple[str, int, int]


def are_spans(names: Iterable[str]) -> bool:
    """Whether classes are parts of spans: O, or a prefix out of B-, I-, E-, S-, some of them with one."""
    others = [name for name in names if name != "O"]
    return bool(others) and all(name[:1] in _PREFIXES and name[1:2] == "-" and len(name) > 2 for name in others)


def spans_of(tags: Sequence[str]) -> set[Span]:
    """(type, first word, last word) of each span."""
    found, start, before, type_before = set[Span](), 0, "O", ""
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, type_ = tag.partition("-")
        if before != "O" and _ends(before, prefix, type_before == type_):
            found.add((type_before, start, place - 1))
        if prefix != "O" and _begins(before, prefix, type_before == type_):
            start = place
        before, type_before = prefix, type_
    return found


def _ends(before: str, prefix: str, same_type: bool) -> bool:
    return before in ("E", "S") or prefix in ("B", "S", "O") or not same_type


def _begins(before: str, prefix: str, same_type: bool) -> bool:
    return prefix in ("B", "S") or before in ("O", "E", "S") or not same_type


def span_statistics(predicted: Sequence[str], labelled: Sequence[str]) -> list[int]:
    """Spans found, predicted and labelled in one row."""
    mine, theirs = spans_of(predicted), spans_of(labelled)
    return [len(mine & theirs), len(mine), len(theirs)]
