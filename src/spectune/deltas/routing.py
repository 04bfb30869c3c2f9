"""`route`: which delta each row of the batches inside a `with` uses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from spectune.deltas.mixing import prove_prompts_mix
from spectune.deltas.registry import Registry
from spectune.deltas.rows import Route
from spectune.errors import ConfigError

if TYPE_CHECKING:
    from spectune.deltas.delta import Delta

Names = str | None | Sequence[str | None]


@contextlib.contextmanager
def route(model: nn.Module, names: Names) -> Iterator[None]:
    """Choose the delta of each row of the batches inside the `with`; None is the bare base.

    Rows do not touch each other: each has the result that it has alone, whatever the others use and whatever else is
    attached. In `generate` a row's beams and return sequences carry its delta along.

    Args:
        names: one name (or None) for all rows, or a list with one for each row.

    Raises:
        ConfigError: a name that is not attached; a fully tuned base in a batch with others, or the bare base under one
            of which no copy was kept; prompts of unlike lengths in one batch, on a base whose rows do not stay
            themselves then; and, from the model, a batch with another number of rows.
    """
    registry = Registry.of(model)
    wanted = [names] if names is None or isinstance(names, str) else list(names)
    attached = {} if registry is None else registry.deltas
    _check(wanted, attached)
    if registry is None:
        yield
        return
    prove_prompts_mix(registry, wanted)
    chosen = Route(wanted, per_row=not (names is None or isinstance(names, str)))
    with contextlib.ExitStack() as stack:
        for name, delta in attached.items():
            if name != wanted[0] and delta.method.trains_base:
                stack.enter_context(delta.suspended())
        stack.enter_context(registry.routed(chosen))
        if chosen.per_row:
            stack.enter_context(_copies_noted(registry))
        yield


def _check(wanted: list[str | None], attached: dict[str, Delta]) -> None:
    if not wanted:
        raise ConfigError("an empty route: give a name, None, or one of them for each row")
    for name in wanted:
        if name is not None and name not in attached:
            raise ConfigError(f"no delta {name!r} is attached; attached are: {', '.join(attached) or 'none'}")
    tuned = next((n for n in wanted if n is not None and attached[n].method.trains_base), None)
    if tuned is not None and any(name != tuned for name in wanted):
        raise ConfigError(
            f"{tuned!r} is a fully tuned base ({attached[tuned].method.label}): all weights are its own, so it cannot "
            "share a batch with other deltas or the bare base. Route its rows in a batch of their own."
        )


@contextlib.contextmanager
def _copies_noted(registry: Registry) -> Iterator[None]:
    """While `generate` runs, a batch may hold several copies of each row: note how many, on this model alone."""
    model: Any = registry.model
    shadowed = {name: model.__dict__.get(name) for name in ("generate", "_expand_inputs_for_generation")}
    generate, expand = model.generate, model._expand_inputs_for_generation

    def noting_expand(*args: Any, **kwargs: Any) -> Any:
        copies = kwargs.get("expand_size", args[0] if args else 1)
        registry.copies = int(copies)
        return expand(*args, **kwargs)

    def generate_and_forget(*args: Any, **kwargs: Any) -> Any:
        try:
            return generate(*args, **kwargs)
        finally:
            registry.copies = 1

    model.__dict__.update(generate=generate_and_forget, _expand_inputs_for_generation=noting_expand)
    try:
        yield
    finally:
        registry.copies = 1
        for name, before in shadowed.items():
            model.__dict__.pop(name)
            if before is not None:
                model.__dict__[name] = before
