"""A block's call is exchanged in one order, and put back as it was."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import nn

from spectune.blocks.call import Wrapper, call_of, unwrap, wrap, wrapped


class Adds(nn.Module):
    """Its hooks are part of its call."""

    def forward(self, x: int) -> int:
        return x + 1


def blocks(count: int = 3) -> list[nn.Module]:
    return [Adds() for _ in range(count)]


@contextmanager
def noting(layers: list[nn.Module], wrapper: Wrapper, seen: list[str]) -> Iterator[None]:
    def make(index: int, layer: nn.Module, inner: Any) -> Any:
        def call(x: int) -> Any:
            seen.append(f"{wrapper.name}{index}")
            return inner(x)

        return call

    with wrapped(layers, wrapper, make):
        yield


def test_the_outermost_is_called_first_and_the_block_with_its_hooks_last() -> None:
    layers, seen = blocks(2), list[str]()
    layers[0].register_forward_hook(lambda *_: seen.append("hook"))
    with (
        noting(layers, Wrapper.COMPILED, seen),
        noting(layers, Wrapper.RECOMPUTED, seen),
        noting(layers, Wrapper.CAPTURED, seen),
        noting(layers, Wrapper.MARKED, seen),
    ):
        assert layers[0](1) == 2
        assert layers[1](2) == 3
    assert seen == [
        "MARKED0", "CAPTURED0", "RECOMPUTED0", "COMPILED0", "hook", "MARKED1", "CAPTURED1", "RECOMPUTED1", "COMPILED1",
    ]  # fmt: skip


@pytest.mark.parametrize(("first", "second"), list(itertools.product(Wrapper, Wrapper)), ids=str)
def test_any_other_order_is_refused(first: Wrapper, second: Wrapper) -> None:
    layers = blocks()
    with wrapped(layers, first, lambda _, layer, inner: inner):
        there = [layer.__dict__["_compiled_call_impl"] for layer in layers]
        if second > first:
            with wrapped(layers, second, lambda _, layer, inner: inner):
                pass
        else:
            with pytest.raises(RuntimeError, match=f"{first.name.lower()} already and cannot be {second.name.lower()}"):
                wrap([*blocks(), *layers], second, lambda _, layer, inner: inner)
        assert [layer.__dict__["_compiled_call_impl"] for layer in layers] == there


def test_what_was_there_is_put_back_exactly_whatever_happens() -> None:
    layers = blocks()
    layers[1].compile(backend="eager")  # the user's
    before = [dict(vars(layer)) for layer in layers]
    own = layers[1]._compiled_call_impl
    with pytest.raises(ZeroDivisionError), noting(layers, Wrapper.COMPILED, []), noting(layers, Wrapper.CAPTURED, []):
        raise ZeroDivisionError
    assert [dict(vars(layer)) for layer in layers] == before
    assert call_of(layers[0]) is None
    assert call_of(layers[1]) is own is layers[1]._compiled_call_impl

    def fails(index: int, layer: nn.Module, inner: Any) -> Any:
        return inner if index < 2 else 1 / 0

    with pytest.raises(ZeroDivisionError):
        wrap(layers, Wrapper.RECOMPUTED, fails)
    assert [dict(vars(layer)) for layer in layers] == before
    calls = wrap(layers, Wrapper.RECOMPUTED, lambda _, layer, inner: inner)
    assert unwrap(calls) == []
    assert [dict(vars(layer)) for layer in layers] == before


def test_what_takes_its_place_is_an_error_and_all_is_put_back() -> None:
    layers = blocks()
    took_its_place = "compiled while it was recomputed, which took its place: compile before that"
    with pytest.raises(RuntimeError, match=took_its_place), noting(layers, Wrapper.RECOMPUTED, []):
        layers[1].compile(backend="eager")
    assert not any("_compiled_call_impl" in vars(layer) for layer in layers)
    # an error of what ran inside is not hidden by it
    with pytest.raises(ZeroDivisionError), noting(layers, Wrapper.RECOMPUTED, []):
        _compile_and_fail(layers[1])
    assert not any("_compiled_call_impl" in vars(layer) for layer in layers)


def _compile_and_fail(layer: nn.Module) -> None:
    layer.compile(backend="eager")
    raise ZeroDivisionError


def test_copies_and_pickles_are_bare() -> None:
    seen: list[str] = []
    layers = blocks(1)
    with noting(layers, Wrapper.COMPILED, seen):
        for copied in (copy.deepcopy(layers[0]), pickle.loads(pickle.dumps(layers[0]))):
            assert copied(1) == 2
            assert "_compiled_call_impl" not in vars(copied)
    assert seen == []
