"""What a run logs step by step: `metrics.jsonl`, and TensorBoard's events where they are asked for."""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from spectune.errors import ConfigError, some
from spectune.files.atomic import atomic_write_text
from spectune.files.metadata import read_lines
from spectune.files.plain_text import one_line
from spectune.files.strict_json import strict_json
from spectune.training.event_files import drop_events_after

log = logging.getLogger("spectune")

METRICS_FILE = "metrics.jsonl"
_BOARD_FOLDER = "tensorboard"


class RunLog:
    """Logs into a run's folder, from a step on: what later ones had logged is taken back.

    Args:
        board: TensorBoard's writer (`board_class`); None writes no events.
    """

    def __init__(self, folder: Path, step: int, board: Callable[..., Any] | None) -> None:
        path, events = folder / METRICS_FILE, folder / _BOARD_FOLDER
        if os.path.lexists(path):
            _take_back(path, step)
        # what is written is on its way at once: nothing waits in this process for a disk that is full
        self._metrics = path.open("ab", buffering=0)
        self._board: Any = None
        if board is not None:
            drop_events_after(events, step)
            self._board = board(str(events))

    def write(self, entry: Mapping[str, Any]) -> None:
        line = (strict_json(entry, indent=None) + "\n").encode("utf-8")
        while line:
            line = line[self._metrics.write(line) :]
        if self._board is not None:
            for key, value in entry.items():
                if key not in ("step", "epoch"):
                    self._board.add_scalar(one_line(key, 200), value, entry["step"])

    def sync(self) -> None:
        """Wait until all of it is on the disk."""
        if self._board is not None:
            self._board.flush()
        os.fsync(self._metrics.fileno())

    def close(self) -> None:
        try:
            self.sync()  # what the run's result vouches for is on the disk before it
        finally:
            self._metrics.close()
            if self._board is not None:
                self._board.close()


def board_class() -> Callable[..., Any]:
    """What writes TensorBoard's events. Raises ConfigError: it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter as Board
    except ImportError as error:
        needed = "report_to = tensorboard needs the package: pip install 'spectune[tensorboard]'"
        raise ConfigError(needed) from error
    found: Callable[..., Any] = Board
    return found


def _take_back(path: Path, step: int) -> None:
    """Leave in a file of JSON lines those of the steps up to this one; the others are written again."""
    damaged: list[str] = []
    lines = []
    for number, line in read_lines(path, torn=True, skipped=damaged.append):
        if type(at := line.get("step")) is not int:
            damaged.append(f"{path}:{number} says no step")
        elif at <= step:
            lines.append(strict_json(line, indent=None) + "\n")
    if damaged:
        log.warning("%s has damaged lines, which are left out: %s", path, some(damaged))
    atomic_write_text(path, "".join(lines))
