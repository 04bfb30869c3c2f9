"""What the optimizer holds between steps, and what its step makes and frees, in bytes."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from torch import nn

from spectune.compute.dynamic_codes import BLOCK, LEAST
from spectune.compute.step_groups import step_groups

FLOAT = 4
#: what is made or freed: a weight's `gradient`, its float32 `copy`, a `state` that stays, `codes` of one in eight bits
Event = tuple[str, int]


def steps_in_backward(optim: str) -> bool:
    """Whether each weight is stepped, and its gradient freed, in the backward pass."""
    return optim == "adamw_in_backward"


class OptimizerStep:
    """AdamW in one of its forms (the setting `optim`) over some weights.

    Attributes:
        masters: bytes of each float32 master of a weight of lower precision.
        states: of everything else that stays between steps, in the order of making.
    """

    def __init__(self, trained: Sequence[nn.Parameter], optim: str) -> None:
        self.optim = optim
        self.masters = [FLOAT * p.numel() for p in trained if p.element_size() != FLOAT]
        self.groups = [[trained[n] for n in group] for group in stepped_together(trained, optim)]
        self.states = [size for group in self.groups for p in _matrices_first(group) for size in self._stays(p)]

    def events(self, *, first: bool) -> Iterator[Event]:
        """The step after backward: a name and bytes, negative for what is freed; in the `first`, states are made."""
        if steps_in_backward(self.optim):
            if first:
                yield from (("state", size) for size in self.states)
            return
        for group in self.groups:
            if not first:
                for p in group:
                    yield from self._decoding(p)
            for p in group:
                if p.element_size() != FLOAT:
                    yield "copy", FLOAT * p.numel()
                    yield "gradient", -p.numel() * p.element_size()
            if first:
                yield from (("state", size) for p in _matrices_first(group) for size in _moments(p))
            for p in group:
                yield ("gradient" if p.element_size() == FLOAT else "copy"), -FLOAT * p.numel()
            for p in group:
                yield from self._encoding(p)

    def most(self, *, first: bool) -> int:
        """Bytes by which the step takes more than there is before it, at most."""
        return max(accumulate((size for _, size in self.events(first=first)), initial=0))

    def _coded(self, parameter: nn.Parameter) -> bool:
        return self.optim == "adamw_8bit" and parameter.numel() >= LEAST

    def _stays(self, parameter: nn.Parameter) -> tuple[int, ...]:
        return (FLOAT, *_codes(parameter) * 2) if self._coded(parameter) else _moments(parameter)

    def _decoding(self, parameter: nn.Parameter) -> Iterator[Event]:
        if not self._coded(parameter):
            return
        padded = FLOAT * _padded(parameter)
        yield from (("copy", padded), ("state", padded), ("copy", -padded)) * 2
        yield from (("codes", -size) for size in _codes(parameter) * 2)

    def _encoding(self, parameter: nn.Parameter) -> Iterator[Event]:
        if not self._coded(parameter):
            return
        padded, (codes, scales) = FLOAT * _padded(parameter), _codes(parameter)
        make, free = ("copy", padded), ("copy", -padded)
        filled = parameter.numel() % BLOCK > 0
        moment = [make, ("codes", scales), free, make, make, ("codes", codes), free, free]
        state = ("state", -FLOAT * parameter.numel())
        yield from ([make, *moment, free, state] if filled else [*moment, state]) * 2


def stepped_together(trained: Sequence[nn.Parameter], optim: str) -> list[list[int]]:
    """Which weights are stepped at once, by number: those in float32 all, others in groups. In eight bits all are
    in groups, as their moments are decoded for the step."""
    whole = [n for n, p in enumerate(trained) if optim != "adamw_8bit" and p.element_size() == FLOAT]
    rest = [n for n, p in enumerate(trained) if optim == "adamw_8bit" or p.element_size() != FLOAT]
    parts = step_groups([trained[n].numel() for n in rest])
    return [*([whole] if whole else []), *([rest[n] for n in part] for part in parts)]


def _matrices_first(group: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """In the order in which the optimizer makes their states."""
    return sorted(group, key=lambda p: p.dim() <= 1)


def _moments(parameter: nn.Parameter) -> tuple[int, int, int]:
    """The count of steps and two moments."""
    return FLOAT, FLOAT * parameter.numel(), FLOAT * parameter.numel()


def _padded(parameter: nn.Parameter) -> int:
    return -(-parameter.numel() // BLOCK) * BLOCK


def _codes(parameter: nn.Parameter) -> tuple[int, int]:
    """Of one moment: a byte each, and a float32 scale for each block."""
    return _padded(parameter), FLOAT * _padded(parameter) // BLOCK
