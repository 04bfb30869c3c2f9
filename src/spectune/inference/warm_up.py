"""Steps that are recorded and compiled before somebody waits for them."""

from collections.abc import Sequence

from spectune.blocks.recorded_steps import LEAST_CAPACITY
from spectune.inference.engine import Engine
from spectune.inference.request import Request

#: tokens of a row: the first comes of its prompt, a step is recorded with the second and proved with the third
_TOKENS = 4


def warm_up(engine: Engine, names: Sequence[str]) -> None:
    """Have an engine make its steps for rows of the bare base, of the first of these deltas, and of any mixture of all:
    other mixtures of their kinds are computed as one of these is. It is for engines whose steps are recorded.

    Args:
        names: deltas, attached: one of each method, say.

    Raises:
        whatever a step raises.
    """
    engine.make_room_for(names)
    engine.adds_mixtures(False)  # so that every row is computed with all kinds
    # of one row, of two numbers of them and of two capacities: what is compiled for these serves any
    few, all_of_them = sorted({1, min(2, engine.rows), engine.rows}), _powers(engine.rows)
    longer = engine.most_tokens(names) >= LEAST_CAPACITY + _TOKENS
    for mixture in (names, names[:1] if len(names) > 1 else (), (None,)):
        for rows in few if longer else all_of_them:
            _write(engine, mixture, rows, 1)
        for rows in all_of_them if longer else ():
            _write(engine, mixture, rows, LEAST_CAPACITY)
        engine.adds_mixtures(True)
    engine.adds_mixtures(False)


def _write(engine: Engine, names: Sequence[str | None], rows: int, length: int) -> None:
    """A few tokens for rows of these deltas in turn; none where there is none."""
    for number in range(rows if names else 0):
        engine.submit(Request([0] * length, _TOKENS, names[number % len(names)]))
    while not engine.idle:
        for written in engine.step():
            if written.error is not None:
                raise written.error


def _powers(most: int) -> list[int]:
    """1, 2, 4 and so on, and the most."""
    return [*(1 << power for power in range((most - 1).bit_length())), most]
