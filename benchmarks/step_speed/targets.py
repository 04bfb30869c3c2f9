"""What was set out to be reached, as data, and whether it was."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.step_speed.grid import PEFT_METHODS, SYSTEMS
from benchmarks.step_speed.results import Results

H_8B, GPT2 = "Llama-3-8B", "GPT-2 124M"


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

    def check(self, results: Results) -> tuple[str, bool | None]:
        found = results.get(self.shape, self.method, self.system)
        if found is None:
            return "not measured", None
        size = found.gib("peak_allocated")
        met = (self.speed is None or found.speed >= self.speed) and (
            self.gib is None or size is None or size <= self.gib
        )
        return f"{found.speed:,.0f} tokens/s" + (f", {size:.1f} GiB" if size is not None else ""), met


@dataclass(frozen=True)
class Ratio:
    """At least `factor` times the tokens/s of the fastest system whose name begins with `against`; `leaner`: and no
    more memory allocated."""

    shape: str
    method: str
    system: str
    against: str
    factor: float
    leaner: bool = False

    def text(self) -> str:
        than = {"peft": "the best PEFT", "plain": "the best plain loop"}.get(self.against)
        words = f"at least {self.factor:g} times {than or SYSTEMS[self.against].label}"
        words += ", in no more memory" if self.leaner else ""
        return f"{self.shape}, {self.method}, {SYSTEMS[self.system].label}: {words}"

    def check(self, results: Results) -> tuple[str, bool | None]:
        found = results.get(self.shape, self.method, self.system)
        named = results.get(self.shape, self.method, self.against) if self.against in SYSTEMS else None
        other = (self.against, named) if named else None
        if self.against in ("peft", "plain") and self.shape not in CPU_SHAPES:
            other = results.best(self.shape, self.method, self.against)
        if found is None or other is None:
            return "not measured", None
        ratio = found.speed / other[1].speed
        words, met = f"{ratio:.2f} times {SYSTEMS[other[0]].label}", ratio >= self.factor
        if self.leaner:
            mine, theirs = found.gib("peak_allocated"), other[1].gib("peak_allocated")
            if mine is not None and theirs is not None:
                words, met = f"{words}, {mine:.1f} against {theirs:.1f} GiB", met and mine <= theirs
        return words, met


#: where PEFT's and the plain loop themselves are meant, not the fastest of their kind
CPU_SHAPES = ("spectune-tiny", "spectune-tiny bf16")
Target = Floor | Ratio
TARGETS: tuple[Target, ...] = (
    Floor(H_8B, "lora", "ours-compiled", 18_000, 42),
    Floor(H_8B, "lora", "ours-fp8", 25_000),
    Floor(H_8B, "lora", "ours-checkpointed", 12_500, 21),
    Floor(H_8B, "lora", "ours-offload", 11_200, 18),
    Ratio(H_8B, "lora", "ours-compiled", "unsloth", 1.0, leaner=True),
    Ratio(H_8B, "lora", "ours-offload", "unsloth-checkpointed", 1.0, leaner=True),
    *(Ratio(H_8B, method, "ours-compiled", "peft", 1.25) for method in PEFT_METHODS),
    *(Ratio(H_8B, method, "ours-fp8", "peft", 1.5) for method in PEFT_METHODS),
    Ratio(GPT2, "lora", "ours-compiled", "peft-compiled", 2.0),
    *(
        Ratio(shape, method, "ours-compiled", "peft", 1.5)
        for shape in CPU_SHAPES
        for method in PEFT_METHODS
    ),
    *(Ratio(shape, "full", "ours-compiled", "plain", 1.1) for shape in CPU_SHAPES),
)  # fmt: skip
