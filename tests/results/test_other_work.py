"""When a machine was too busy for its times to be facts."""

from __future__ import annotations

import pytest

from spectune.results.other_work import MachineLoad


@pytest.mark.parametrize(
    ("ran_share", "load_average", "cores", "busy"),
    [
        (0.98, 2.1, 2, False),  # alone: as many tasks as cores
        (1.0, 0.4, 64, False),
        (0.6, 2.0, 2, True),  # it had to wait for the CPU
        (0.97, 5.1, 2, True),  # others stood in line
        (None, None, None, False),  # the system does not say
        (0.98, 3.0, None, False),
    ],
)
def test_busy(ran_share: float | None, load_average: float | None, cores: int | None, busy: bool) -> None:
    assert MachineLoad(ran_share=ran_share, load_average=load_average, cores=cores).busy is busy
