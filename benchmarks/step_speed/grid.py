"""What is measured: shapes, systems, methods, and which comes first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from benchmarks.shapes import CONFIGS
from transformers import PretrainedConfig

from spectune.methods import BY_NAME

#: what PEFT has of our methods
PEFT_METHODS = ("lora", "prefix", "prompt", "dora", "ia3", "oft", "miss")


class RefusedError(Exception):
    """A system cannot run a case, and says why: a row of the table, not a fault of the benchmark."""


@dataclass(frozen=True)
class Shape:
    """A model and a batch: `rows` of `length` tokens (virtual tokens come off where positions would run out)."""

    model: str
    rows: int
    length: int
    dtype: str = "bfloat16"
    device: str = "cuda"

    def config(self) -> PretrainedConfig:
        return CONFIGS[self.model]()


SHAPES = {
    "Llama-3-8B": Shape("Llama-3-8B", 4, 2048),
    "GPT-2 124M": Shape("GPT-2 124M", 8, 1024),
    "Llama 1B": Shape("Llama 1B", 4, 2048),
    "Llama-3-8B 8k": Shape("Llama-3-8B", 1, 8192),
    "spectune-tiny": Shape("spectune-tiny", 8, 256, "float32", "cpu"),
    "spectune-tiny bf16": Shape("spectune-tiny", 8, 256, "bfloat16", "cpu"),
}
TINY = {
    "tiny gpt2": Shape("tiny gpt2", 2, 32, "float32", "cpu"),
    "tiny llama": Shape("tiny llama", 2, 32, "float32", "cpu"),
}


@dataclass(frozen=True)
class System:
    """A way to train. `tier` 0 is measured first."""

    label: str
    tier: int
    methods: tuple[str, ...]
    only_on: str | None = None

    @property
    def compiles(self) -> bool:
        """Whether a measurement without a compiled graph is none of this system."""
        return "compile" in self.label


def _ours(what: str, tier: int, *, frozen_only: bool = False, only_on: str | None = None) -> System:
    names = tuple(n for n, m in BY_NAME.items() if not (frozen_only and m.trains_base))
    return System(f"spectune, {what}", tier, names, only_on)


SYSTEMS = {
    "ours-compiled": _ours("compiled", 0),
    "ours-graphs": _ours("compiled, CUDA graphs", 0, only_on="cuda"),
    "unsloth": System("Unsloth", 0, ("lora",), "cuda"),
    "peft-liger-compiled": System("PEFT + Liger + per-block compile", 0, PEFT_METHODS, "cuda"),
    "ours-checkpointed": _ours("compiled, checkpointed", 1),
    "ours-selective": _ours("compiled, selectively recomputed", 1),
    "ours-offload": _ours("compiled, checkpointed to host memory", 1, only_on="cuda"),
    "unsloth-checkpointed": System("Unsloth, its checkpointing", 1, ("lora",), "cuda"),
    "ours-fp8": _ours("compiled, fp8 base", 2, frozen_only=True, only_on="cuda"),
    "ours-fp8-graphs": _ours("compiled, fp8 base, CUDA graphs", 2, frozen_only=True, only_on="cuda"),
    "peft-compiled": System("PEFT + per-block compile", 2, PEFT_METHODS),
    "peft": System("PEFT, plain loop", 2, PEFT_METHODS),
    "plain": System("plain loop", 2, ("full",)),
    "plain-compiled": System("plain loop + per-block compile", 2, ("full",)),
    "ours-eager": _ours("eager", 3),
    "ours-eager-graphs": _ours("eager, CUDA graphs", 3, only_on="cuda"),
    "ours-fp8-checkpointed": _ours("compiled, fp8 base, checkpointed", 3, frozen_only=True, only_on="cuda"),
    "ours-8bit": System("spectune, compiled, checkpointed, 8-bit AdamW", 3, ("full",)),
    "ours-in-backward": System("spectune, compiled, checkpointed, AdamW in backward, no clipping", 3, ("full",)),
    "ours-eager-checkpointed": _ours("eager, checkpointed", 4),
    "peft-trainer": System("PEFT + Trainer", 4, PEFT_METHODS),
    "peft-trainer-checkpointed": System("PEFT + Trainer, checkpointed", 4, PEFT_METHODS),
    "plain-masters": System("plain loop, float32 weights under autocast", 4, ("full",)),
}
#: tiers of what is compared first of all, and of what every method is compared in
FIRST_TIERS, MAIN_TIERS = 2, (0, 2)
#: on rows as short as E2E's, of which only the completion is a target (`real_data.py`)
REAL_SYSTEMS = {
    "real-ours-packed": _ours("packed, loss on completions", 0),
    "real-ours-padded": _ours("padded, loss on completions", 0),
    "real-ours-padded-all": _ours("padded, every token a target", 0),
    "real-peft": System("PEFT, plain loop, padded", 1, PEFT_METHODS),
    "real-peft-compiled": System("PEFT + per-block compile, padded", 1, PEFT_METHODS, "cuda"),
}
#: rows of a batch of them
REAL_ROWS = 32
#: of several methods at one shape and tier, which come first
METHOD_ORDER = ("lora", "prompt", "prefix", "dora", "ia3", "oft", "miss", "ln", "full", "adapter", "bitfit")


def system(name: str) -> System:
    """The system of a name, of either table."""
    return (SYSTEMS | REAL_SYSTEMS)[name]


@dataclass(frozen=True)
class Case:
    """One line of a table."""

    shape: str
    method: str
    system: str

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def text_length(shape: Shape, method: str) -> int:
    """Tokens of a row: the shape's, less virtual tokens where both together would run past the base's positions."""
    room = shape.config().max_position_embeddings - BY_NAME[method]().virtual_tokens
    return min(shape.length, room)


def cases(
    shapes: dict[str, Shape],
    device: str,
    *,
    names: Iterable[str],
    systems: Iterable[str],
    methods: Iterable[str],
    known_systems: dict[str, System] = SYSTEMS,
) -> list[Case]:
    """The cases asked for, the most important first. A shape for another kind of device is left out unless named."""
    wanted, systems, methods = list(names), list(systems) or list(known_systems), list(methods) or list(METHOD_ORDER)
    for given, known in ((wanted, shapes), (systems, known_systems), (methods, BY_NAME)):
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise SystemExit(f"unknown: {', '.join(unknown)}; there are: {', '.join(known)}")
    chosen = wanted or [name for name, shape in shapes.items() if shape.device == device]
    found = [
        Case(shape, method, system)
        for shape in chosen
        for system in systems
        for method in methods
        if method in known_systems[system].methods and known_systems[system].only_on in (None, device)
    ]

    def place(case: Case) -> tuple[int, ...]:
        """The first shape's LoRA; then every method's fast ways, ours and others', shape by shape; then the rest."""
        shape, method = chosen.index(case.shape), METHOD_ORDER.index(case.method)
        tier = known_systems[case.system].tier
        if shape == 0 and case.method == "lora" and tier <= FIRST_TIERS:
            return 0, tier
        return (1, shape, method, tier) if tier in MAIN_TIERS else (2, shape, tier, method)

    return sorted(found, key=place)
