"""How much of a rendered conversation is the rendering of its first messages, found while it is rendered once.

A template that walks through the messages in one loop has, behind the round of message i, read nothing of those that
follow; so what it has written by then it writes for the first i messages alone, too, and goes on with what stands
behind its loop. Where that part is the same for all conversations, a turn's prompt is known without rendering it.

That is proved and not supposed: the messages are given to the template as a list that notes what is read of it, each
round's end is marked in the template, and the template's syntax tree says what the part behind the loop depends on.
What cannot be proved (a template that looks ahead, or at the last message first) is rendered.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from jinja2 import Template, nodes

from spectune.data.chats.metered_environment import Counted, MeteredEnvironment
from spectune.data.chats.metered_syntax import APPLIED

_LOOP, _ROUND = "spectune_messages_of_loop", "spectune_end_of_round"
#: what can take a template from one part to another, or end a round early
_JUMPS = (
    nodes.Block, nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport, nodes.CallBlock, nodes.Continue,
    nodes.Break,
)  # fmt: skip


class MarkedTemplate:
    """A template whose last loop tells where its rounds end."""

    def __init__(self, template: Template) -> None:
        self._template = template

    @classmethod
    def of(cls, environment: MeteredEnvironment, source: str) -> "MarkedTemplate | None":
        """None: what the template writes behind its last loop may depend on the messages."""
        tree = environment.metered(source)
        if (loop := _last_loop(tree)) is None:
            return None
        loop.iter = nodes.Filter(loop.iter, APPLIED, [nodes.Name(_LOOP, "load")], [], None, None)
        loop.body.append(nodes.Output([nodes.Name(_ROUND, "load")]))  # written as an empty text: a call takes longer
        tree.set_environment(environment).set_lineno(loop.lineno)
        return cls(environment.compiled(tree))

    def render(self, messages: Sequence[Any], given: dict[str, Any]) -> tuple[str, dict[int, int]]:
        """The text without a generation prompt, and by a number of messages where the part of it ends that is written
        for so many alone. Raises whatever the template raises, or one that needs a real list."""
        pieces, ends = list[str](), dict[int, int]()
        seen = _Seen()
        rounds = _Rounds(seen, pieces, ends)

        def looped(value: Any) -> Any:
            if isinstance(value, _Messages):
                rounds.expected = value._first
            else:
                seen.all()
            return value

        context = self._template.new_context(
            {**given, "messages": _Messages(messages, 0, seen), "add_generation_prompt": False, _LOOP: looped,
             _ROUND: rounds}
        )  # fmt: skip
        lengths = [0]
        for piece in self._template.root_render_func(context):
            pieces.append(piece)
            lengths.append(lengths[-1] + len(piece))
        return "".join(pieces), {count: lengths[at] for count, at in ends.items() if count <= len(messages)}


def _last_loop(tree: nodes.Template) -> nodes.For | None:
    """The last loop at the top, if what stands behind it depends on nothing that the template has worked out."""
    loops = [(place, node) for place, node in enumerate(tree.body) if isinstance(node, nodes.For)]
    if not loops or next(tree.find_all(_JUMPS), None) is not None:
        return None
    place, loop = loops[-1]
    before, behind = tree.body[: place + 1], tree.body[place + 1 :]
    names = list(tree.find_all(nodes.Name))
    worked_out = {name.name for name in names if name.ctx != "load"} | {m.name for m in tree.find_all(nodes.Macro)}
    used_behind = {name.name for node in behind for name in _all(node, nodes.Name)}
    if (
        loop.recursive or loop.else_ or loop.test is not None  # a round for each message, and nothing else
        or used_behind & (worked_out | {"messages"})
        or any(True for node in behind for _ in _all(node, nodes.Call))
        or any(name.name == "add_generation_prompt" for node in before for name in _all(node, nodes.Name))
        or {_LOOP, _ROUND} & {name.name for name in names}
    ):  # fmt: skip
        return None
    return loop


def _all(node: nodes.Node, kind: type[Any]) -> Iterator[Any]:
    if isinstance(node, kind):
        yield node
    yield from node.find_all(kind)


class _Seen:
    """How many of the messages, from the first on, a template has asked for."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0

    def one(self, place: int) -> None:
        if place >= self.count:
            self.count = place + 1

    def all(self) -> None:
        self.count = 1 << 60


class _Rounds:
    """What the end of a round writes: nothing. That it is asked for it tells that the round has ended."""

    __slots__ = ("_ends", "_pieces", "_seen", "expected")

    def __init__(self, seen: _Seen, pieces: list[str], ends: dict[int, int]) -> None:
        self._seen, self._pieces, self._ends = seen, pieces, ends
        self.expected = (
            0  # messages that a template has to have read by the end of the round, if it does not look ahead
        )

    def __str__(self) -> str:
        self.expected += 1
        if self._seen.count == self.expected:  # nothing behind this round's was read, not even that there is one
            self._ends[self.expected] = len(self._pieces)
        return ""


class _Messages(Counted):
    """The messages from `first` on, as a template reads them. It is no list on purpose: what would be read of one
    without its own methods (by `+`, `==`, as text or JSON) is an error here."""

    __slots__ = ("_first", "_of", "_seen")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, of: Sequence[Any], first: int, seen: _Seen) -> None:
        self._of, self._first, self._seen = of, first, seen

    @property
    def rounds(self) -> int:
        return max(len(self._of) - self._first, 0)

    def __iter__(self) -> Iterator[Any]:
        for place in range(self._first, len(self._of)):
            self._seen.one(place)
            yield self._of[place]
        self._seen.one(len(self._of))

    def __bool__(self) -> bool:
        self._seen.one(self._first)
        return len(self._of) > self._first

    def __len__(self) -> int:
        self._seen.all()
        return max(len(self._of) - self._first, 0)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice) and key.stop is None and key.step in (None, 1) and (key.start or 0) >= 0:
            return _Messages(self._of, self._first + (key.start or 0), self._seen)
        if isinstance(key, int) and key >= 0:
            self._seen.one(self._first + key)
            return self._of[self._first + key]
        self._seen.all()
        return list(self._of[self._first :])[key]

    def __contains__(self, item: Any) -> bool:
        self._seen.all()
        return item in self._of[self._first :]

    def __reversed__(self) -> Iterator[Any]:
        self._seen.all()
        return iter([*reversed(self._of[self._first :])])

    def __eq__(self, other: Any) -> bool:
        raise TypeError("only a list can be compared")

    def __str__(self) -> str:
        raise TypeError("only a list can be written")

    __repr__ = __str__

    def __format__(self, form: str) -> str:
        raise TypeError("only a list can be written")
