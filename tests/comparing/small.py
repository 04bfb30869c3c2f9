"""A comparison on a tiny model, as quick as one can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from spectune.comparing import Comparison
from spectune.comparing import compare as compare_function
from spectune.methods import BottleneckAdapter, LoRA, PrefixTuning, PromptTuning
from spectune.training import TrainingConfig
from tests.support import make_model, make_rows, make_tokenizer

QUIET = Console(quiet=True)
#: nothing is predicted: the plan has tests of its own, and one here
SIX_STEPS = TrainingConfig(max_steps=6, learning_rate=1e-2, per_device_train_batch_size=4, memory_check="off")
SEARCHED = TrainingConfig(max_steps=16, per_device_train_batch_size=4, memory_check="off")
SMALL: list[Any] = [
    "full",
    BottleneckAdapter(bottleneck_dim=4),
    PrefixTuning(num_virtual_tokens=4),
    PromptTuning(num_virtual_tokens=4),
    LoRA(r=2),
    "bitfit",
    "dora",
    "ia3",
]


def run(folder: Path, model: Any = None, **changes: Any) -> Comparison:
    given: dict[str, Any] = {
        "methods": SMALL,
        "tokenizer": make_tokenizer(),
        "output_dir": folder,
        "config": SIX_STEPS,
        "seeds": 1,
        "generate_rows": 2,
        "console": QUIET,
        **changes,
    }
    base = model if model is not None else make_model()
    base.config._name_or_path = str(folder.parent / "base")
    if not (folder.parent / "base").exists():
        make_tokenizer().save_pretrained(folder.parent / "base")
    rows, held_out = given.pop("train_rows", make_rows()), given.pop("valid_rows", make_rows(6))
    return compare_function(base, rows, held_out, **given)


def timeless(content: Any) -> Any:
    """What a comparison's files hold, but for where the time went."""
    if isinstance(content, dict):
        return {key: timeless(value) for key, value in content.items() if key != "seconds_by_phase"}
    return [timeless(value) for value in content] if isinstance(content, list) else content
