"""What a check of the machine found. A leaf: it imports nothing that takes time."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

OK, NOT_HERE, FAILED = "ok", "not here", "failed"


@dataclass(frozen=True)
class Outcome:
    """What a check found.

    Attributes:
        status: "ok"; "not here": this machine has not what the path needs, and runs go without; "failed": it is there
            and does not work.
        says: what was found, a line.
        advice: of "not here" what it costs, of "failed" what to do.
    """

    name: str
    status: str
    says: str
    advice: str = ""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        """For a terminal: `ok        attention    what was found`."""
        status = self.status.upper() if self.status == FAILED else self.status
        text = self.says if not self.advice else f"{self.says}. {self.advice}"
        return f"{status:<9} {self.name:<15} {text} ({self.seconds:.1f} s)"
