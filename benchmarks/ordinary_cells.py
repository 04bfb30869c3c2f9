"""The cells of `ordinary.py`, the most important first: what a user would type, and what the card is asked for."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

DATA = ("short", "packed", "text", "chat")


@dataclass(frozen=True)
class Base:
    """A base of the benchmark.

    Attributes:
        config: of `benchmarks.shapes.CONFIGS`; None for weights that were carried here.
        window: tokens of a window of text.
        methods: that are run alone, the most important first.
        claims: GB of the card that a run on rows of each kind is let in with; generous, since what does not fit fails.
    """

    name: str
    config: str | None
    window: int
    methods: tuple[str, ...]
    claims: dict[str, float]

    @property
    def packs_by_itself(self) -> bool:
        """Whether `packing=auto` packs short rows: steps of small models take as long as their launches, whatever the
        rows."""
        return "Llama" in (self.config or "") or "llama" in (self.config or "")


def _claims(short: float, packed: float, text: float, chat: float) -> dict[str, float]:
    return dict(zip(DATA, (short, packed, text, chat), strict=True))


BASES = {
    base.name: base
    for base in (
        Base("8B", "Llama-3-8B", 2048, ("lora", "prompt", "adapter"), _claims(46, 46, 46, 46)),
        Base("1B", "Llama 1B", 2048, ("lora", "prompt", "full"), _claims(28, 28, 47, 34)),
        Base("124M", "GPT-2 124M", 1024, ("lora", "prompt", "full"), _claims(8, 8, 10, 15)),
        Base("27M", None, 1024, ("lora", "prompt", "full"), _claims(4, 4, 5, 6)),
    )
}
SMALL = {
    base.name: base
    for base in (
        Base("tiny-llama", "tiny llama", 128, ("lora", "prompt", "full"), _claims(1, 1, 1, 1)),
        Base("tiny-gpt2", "tiny gpt2", 128, ("lora", "prompt", "full"), _claims(1, 1, 1, 1)),
    )
}
#: rows of a step, by kind; the 8B takes half of those that are long
ROWS = {"short": 64, "packed": 64, "text": 8, "chat": 16}


@dataclass(frozen=True)
class Cell:
    """One command that a user types.

    Attributes:
        command: "train" or "compare".
        settings: `--set` of it.
        claim: GB of the card that it is let in with.
    """

    base: str
    data: str
    command: str
    methods: tuple[str, ...]
    settings: tuple[str, ...]
    claim: float
    note: str = ""

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.base, self.data, self.command, "+".join(self.methods), self.note)))

    @property
    def folder(self) -> str:
        """Of its base: chats need a tokenizer with a template."""
        return f"{self.base}-chat" if self.data == "chat" else self.base

    def line(self, bases: Path, rows: Path, output: Path, device: str) -> list[str]:
        """The command line."""
        file = rows / {"text": "text.txt", "chat": "chat.jsonl"}.get(self.data, "rows.jsonl")
        words = [sys.executable, "-m", "spectune", self.command, "--model", str(bases / self.folder)]
        words += ["--data", str(file), "--output-dir", str(output)]
        if device != "auto":
            words += ["--device", device]
        if self.command == "train":
            words += ["--method", *self.methods]
        else:
            valid = rows / {"text": "valid.txt", "chat": "valid-chat.jsonl"}.get(self.data, "valid.jsonl")
            words += ["--quick", "--valid", str(valid), "--methods", ",".join(self.methods), "--generate-rows", "8"]
        return [*words, *(word for setting in self.settings for word in ("--set", setting))]


def _cell(
    base: Base,
    data: str,
    methods: tuple[str, ...],
    command: str,
    steps: int,
    more: tuple[str, ...] = (),
    note: str = "",
) -> Cell:
    rows = ROWS[data] // 2 if base.name == "8B" and data in ("text", "chat") else ROWS[data]
    if base.name.startswith("tiny"):
        rows = min(rows, 8)
    settings = [f"per_device_train_batch_size={rows}", f"max_steps={steps}"]
    # the default is the base's context, less virtual tokens, and at most 1,024
    if data == "text" and base.window > 1024:
        settings.append(f"max_length={base.window}")
    # rows as short as these are packed on a large base and padded on a small one, by themselves: both are looked at
    if data == "short" and base.packs_by_itself:
        settings.append("packing=false")
    if data == "packed" and not base.packs_by_itself:
        settings.append("packing=true")
    return Cell(base.name, data, command, methods, (*settings, *more), base.claims[data], note)


def cells(bases: dict[str, Base], steps: int = 24, only: str = "") -> list[Cell]:
    """All cells: each base and kind of rows with the first method, then with the others, then comparisons of the three,
    then runs that are compiled whatever their length. `only`: a regular expression that names are searched for."""
    found = [
        _cell(base, data, (base.methods[number],), "train", steps)
        for number in range(3)
        for base in bases.values()
        for data in DATA
    ]
    small = [base for base in bases.values() if base.name != "8B"]
    found += [_cell(base, data, base.methods, "compare", max(8, steps // 2)) for data in DATA for base in small]
    compiled = ("torch_compile=true",)
    for base in bases.values():
        found += [_cell(base, data, ("lora",), "train", steps, compiled, "compiled") for data in ("packed", "text")]
    if "8B" in bases:  # minutes each
        found += [_cell(bases["8B"], data, bases["8B"].methods, "compare", 8) for data in ("packed", "short")]
    return [cell for cell in found if re.search(only, cell.name)]
