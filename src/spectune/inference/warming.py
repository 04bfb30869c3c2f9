"""Steps that are recorded and compiled before somebody waits for them."""

from collections.abc import Sequence

from spectune.blocks.recorded_steps import LEAST_CAPACITY
from spectune.deltas import Attachment
from spectune.inference.engine import Engine
from spectune.inference.engine_bases import cache_bytes, text_limit, virtual_tokens
from spectune.inference.request import Request

#: tokens of a row: the first comes of its prompt, a step is recorded with the second and proved with the third
_TOKENS = 4
#: tokens that each row's cache has room for where memory is plenty, and at least
_PLACES, _LEAST_PLACES = 4096, 2 * LEAST_CAPACITY
#: of the memory that is free, for the cache from the beginning
_SHARE = 0.125


def warm_up(
    engine: Engine, names: Sequence[str], free_bytes: int | None = None, table_bytes: int | None = None
) -> None:  # fmt: skip
    """Have an engine make its steps for rows of the bare base, of the first of these deltas, and of any mixture of all:
    other mixtures of their kinds are computed as one of these is. It is for engines whose steps are recorded.

    Args:
        names: deltas, attached: one of each method, say.
        free_bytes: of the device's memory. Rows have room for a few thousand tokens each from the beginning, if that is
            plenty: with longer ones the cache is made anew, and so are the steps. None: as many as are.
        table_bytes: for tables of as many deltas as there are rows, of fewer where that is too little: with more they,
            too, are made anew. None: as many as are.

    Raises:
        whatever a step raises.
    """
    limit = text_limit(engine.model) - virtual_tokens(engine.model, names)
    longest = int(min(limit, _places(engine, free_bytes))) - _TOKENS
    engine.lanes.reserve(names, longest + _TOKENS, _slots(engine, names, table_bytes))
    engine.lanes.adds_mixtures(False)  # so that every row is computed with all kinds
    for mixture in (names, names[:1] if len(names) > 1 else (), (None,)):
        # of two capacities, one row and two numbers of more: what is compiled for these serves any
        for length in sorted({1, min(LEAST_CAPACITY, longest)}):
            for rows in _powers(engine.rows):
                _write(engine, mixture, rows, length)
        engine.lanes.adds_mixtures(True)
    engine.lanes.adds_mixtures(False)


def _write(engine: Engine, names: Sequence[str | None], rows: int, length: int) -> None:
    """A few tokens for rows of these deltas in turn; none where there is none."""
    for number in range(rows if names else 0):
        engine.submit(Request([0] * length, _TOKENS, names[number % len(names)]))
    while not engine.idle:
        for written in engine.step():
            if written.error is not None:
                raise written.error


def _places(engine: Engine, free_bytes: int | None) -> int:
    """A power of two."""
    if free_bytes is None:
        return _PLACES
    room = int(_SHARE * free_bytes) // max(1, engine.rows * cache_bytes(engine.model))
    return max(_LEAST_PLACES, min(_PLACES, 1 << (max(1, room).bit_length() - 1)))


def _slots(engine: Engine, names: Sequence[str], table_bytes: int | None) -> int:
    """For how many deltas, each as large as one of all these kinds."""
    attachment = Attachment.of(engine.model)
    if attachment is None or table_bytes is None:
        return engine.rows
    numbers = sum(p.numel() for name in names for p in attachment.deltas[name].parameters())
    return min(engine.rows, table_bytes // max(1, numbers * engine.model.dtype.itemsize))


def _powers(most: int) -> list[int]:
    """1, 2, 4 and so on, and the most."""
    return [*(1 << power for power in range((most - 1).bit_length())), most]
