"""What was set out to be reached, as data, and whether it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.step_speed.grid import SYSTEMS
from benchmarks.step_speed.results import Measured, Results

H_8B, GPT2 = "Llama-3-8B", "GPT-2 124M"


class Verdict(NamedTuple):
    """What was measured, whether it is enough (None: not measured), and by which system."""

    words: str
    met: bool | None
    system: str


@dataclass(frozen=True)
class Floor:
    """At least so many tokens/s, at no more than so many GiB allocated."""

    shape: str
    method: str
    system: str
    speed: float | None = None
    gib: float | None = None

    def text(self) -> str:
        parts = [f"at least {self.speed:,.0f} tokens/s"] if self.speed else []
        parts += [f"at most {self.gib:g} GiB"] if self.gib else []
        return f"{self.shape}, {self.method}, {SYSTEMS[self.system].label}: {', '.join(parts)}"

    def check(self, results: Results) -> Verdict:
        found = results.get(self.shape, self.method, self.system)
        if found is None:
            return Verdict("not measured", None, self.system)
        size = found.gib("peak_allocated")
        met = (self.speed is None or found.speed >= self.speed) and (
            self.gib is None or size is None or size <= self.gib
        )
        words = f"{found.speed:,.0f} tokens/s" + (f", {size:.1f} GiB" if size is not None else "")
        return Verdict(words, met, self.system)


@dataclass(frozen=True)
class Ratio:
    """At least `factor` times the tokens/s of another system; `leaner`: and no more memory allocated.

    `system` and `against` are names of systems; one that ends with "*" stands for the fastest whose name begins so,
    several with "|" between them for the fastest of these.
    """

    shape: str
    method: str
    system: str
    against: str
    factor: float
    leaner: bool = False

    def text(self) -> str:
        words = f"{_label(self.system)}: at least {self.factor:g} times {_label(self.against)}"
        return f"{self.shape}, {self.method}, {words}" + (", in no more memory" if self.leaner else "")

    def check(self, results: Results) -> Verdict:
        mine, other = (_fastest(results, self, name) for name in (self.system, self.against))
        if mine is None or other is None:
            return Verdict("not measured", None, self.system)
        ratio = mine[1].speed / other[1].speed
        words, met = f"{ratio:.2f} times {SYSTEMS[other[0]].label}", ratio >= self.factor
        if self.leaner:
            sizes = [found.gib("peak_allocated") for _, found in (mine, other)]
            if sizes[0] is not None and sizes[1] is not None:
                words, met = f"{words}, {sizes[0]:.1f} against {sizes[1]:.1f} GiB", met and sizes[0] <= sizes[1]
        return Verdict(words, met, mine[0])


def _fastest(results: Results, target: Ratio, name: str) -> tuple[str, Measured] | None:
    if name.endswith("*"):
        return results.best(target.shape, target.method, name[:-1])
    found = [(each, results.get(target.shape, target.method, each)) for each in name.split("|")]
    return max(((n, m) for n, m in found if m is not None), key=lambda pair: pair[1].speed, default=None)


def _label(name: str) -> str:
    kinds = {
        "peft*": "the fastest PEFT",
        "ours-*": "spectune's fastest",
        FAST: "spectune, compiled (CUDA graphs or not)",
    }
    kinds[FAST_FP8] = "spectune, compiled, fp8 base (CUDA graphs or not)"
    return kinds.get(name) or SYSTEMS[name].label


#: methods that have bars against PEFT
WITH_BARS = ("lora", "prefix", "prompt", "dora", "ia3")
FAST, FAST_FP8 = "ours-compiled|ours-graphs", "ours-fp8|ours-fp8-graphs"
CPU_SHAPES = ("spectune-tiny", "spectune-tiny bf16")
Target = Floor | Ratio
TARGETS: tuple[Target, ...] = (
    Floor(H_8B, "lora", "ours-compiled", 18_000, 42),
    Floor(H_8B, "lora", "ours-fp8", 25_000),
    Floor(H_8B, "lora", "ours-checkpointed", 12_500, 21),
    Floor(H_8B, "lora", "ours-offload", 11_200, 18),
    Ratio(H_8B, "lora", "ours-compiled", "unsloth", 1.0, leaner=True),
    Ratio(H_8B, "lora", "ours-offload", "unsloth-checkpointed", 1.0, leaner=True),
    *(Ratio(H_8B, method, FAST, "peft*", 1.25) for method in WITH_BARS),
    *(Ratio(H_8B, method, FAST_FP8, "peft*", 1.5) for method in WITH_BARS),
    Ratio(GPT2, "lora", "ours-*", "peft-compiled", 2.0),
    *(
        Ratio(shape, method, "ours-*", "peft", 1.5)
        for shape in CPU_SHAPES
        for method in WITH_BARS
    ),
    *(Ratio(shape, "full", "ours-*", "plain", 1.1) for shape in CPU_SHAPES),
)  # fmt: skip
