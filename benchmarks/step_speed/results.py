"""Lines of a result file, put together: repeats of a case to medians, what stands beside what."""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from benchmarks.step_speed.grid import METHOD_ORDER, REAL_SYSTEMS, SYSTEMS

GIB = 2**30
#: largest relative difference of the first losses to the reference's, by compute dtype; beyond it a row is not valid
TOLERANCES = {"float32": 1e-3, "bfloat16": 1e-2}
#: the same for the first loss alone, where the base is quantised: from then on it learns these random tokens in another
#: way. What it comes to on real rows is `benchmarks.parity`'s to say
FP8_TOLERANCE = 1e-2
#: which system's losses are the reference: the first that was measured. Full fine-tuning: with float32 weights, which
#: a plain loop on bf16 weights lacks (small steps round to none)
REFERENCES = ("peft", "plain-masters", "peft-compiled", "peft-liger-compiled", "ours-eager", "plain")
REAL_REFERENCES = ("real-peft", "real-ours-padded")


@dataclass
class Measured:
    """All repeats of one case."""

    lines: list[dict[str, Any]]

    @property
    def done(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "tokens_per_second" in line]

    @property
    def reason(self) -> str:
        """Why there is no measurement."""
        line = self.lines[-1]
        return str(line.get("refused") or line["failed"])

    @property
    def speed(self) -> float:
        """Tokens/s, median of repeats."""
        return self.median("tokens_per_second")

    @property
    def spread(self) -> float | None:
        """(largest - smallest) / median of tokens/s; None for a single measurement."""
        speeds = [line["tokens_per_second"] for line in self.done]
        return (max(speeds) - min(speeds)) / self.speed if len(speeds) > 1 else None

    @property
    def share(self) -> float | None:
        """Of the physical limit."""
        line = self.done[0]
        if not line["peak_tflops"] or "flops_per_token" not in line:
            return None
        return float(self.speed * line["flops_per_token"] / (line["peak_tflops"] * 1e12))

    def median(self, key: str) -> float:
        return statistics.median(line[key] for line in self.done)

    def gib(self, key: str) -> float | None:
        """The largest of the repeats in GiB; None where the device does not tell, or did not tell all: the first runs
        with CUDA graphs did not count what those hold."""
        blind = key == "peak_allocated" and "graphs" in self.done[0]["system"]
        sizes = [line[key] for line in self.done if key in line and not (blind and "recorded_bytes" not in line)]
        return max(sizes) / GIB if sizes else None


@dataclass(frozen=True)
class Difference:
    """Of losses, relative: the `largest`, and what is `judged` by a tolerance."""

    largest: float
    judged: float
    tolerance: float


Key = tuple[str, str, str]


class Results:
    """Everything measured on one kind of device."""

    def __init__(self, lines: list[dict[str, Any]]) -> None:
        found: dict[Key, list[dict[str, Any]]] = defaultdict(list)
        for line in lines:
            found[line["shape"], line["method"], line["system"]].append(line)
        systems = [*SYSTEMS, *REAL_SYSTEMS]
        order = sorted(found, key=lambda k: (METHOD_ORDER.index(k[1]), systems.index(k[2])))
        self.cases = {key: Measured(found[key]) for key in order}
        self.shapes = list(dict.fromkeys(line["shape"] for line in lines))

    def get(self, shape: str, method: str, system: str) -> Measured | None:
        """The measurement of a case, None where there is none that succeeded."""
        found = self.cases.get((shape, method, system))
        return found if found is not None and found.done else None

    def best(self, shape: str, method: str, prefix: str) -> tuple[str, Measured] | None:
        """The fastest system whose name begins with `prefix`."""
        found = [(k[2], m) for k, m in self.cases.items() if k[:2] == (shape, method) and k[2].startswith(prefix)]
        return max((pair for pair in found if pair[1].done), key=lambda pair: pair[1].speed, default=None)

    def peer(self, shape: str, method: str) -> tuple[str, Measured] | None:
        """What a ratio is against: PEFT's fastest of the same method, for full fine-tuning the fastest plain loop."""
        return self.best(shape, method, "plain" if method == "full" else "peft")

    def short(self) -> Results:
        """What was measured on short rows."""
        return Results([x for m in self.cases.values() for x in m.lines if x["system"] in REAL_SYSTEMS])

    def reference(self, shape: str, method: str, system: str) -> str | None:
        """The system whose losses those of a case are held against; None where none was measured."""
        known = REAL_REFERENCES if system in REAL_SYSTEMS else REFERENCES
        return next((s for s in known if self.get(shape, method, s)), None)

    def difference(self, shape: str, method: str, system: str) -> Difference | None:
        """How far a case's first losses are from the reference's. None for the reference itself, where there is none,
        and where other tokens are targets."""
        reference = self.reference(shape, method, system)
        mine, other = self.get(shape, method, system), reference and self.get(shape, method, reference)
        if mine is None or not other or reference == system or system.endswith("-all"):
            return None
        pairs = zip(mine.done[0]["losses"], other.done[0]["losses"], strict=False)
        apart = [abs(a - b) / abs(b) for a, b in pairs]
        if "fp8" in system:
            return Difference(max(apart), apart[0], FP8_TOLERANCE)
        return Difference(max(apart), max(apart), TOLERANCES[mine.done[0]["dtype"]])
