"""transformers' `Trainer` over an attached delta. The base is frozen, so it trains the delta and nothing else.

The Trainer needs accelerate, which spectune itself does not: pip install 'spectune[examples]'.

python examples/hf_trainer.py --steps 40
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.utils import is_accelerate_available

import spectune
from spectune import embedded
from spectune.data import Example, collate, encode, load_rows


def main(steps: int = 40, folder: str | None = None) -> tuple[float, Path]:
    if not is_accelerate_available():
        raise SystemExit("transformers' Trainer needs accelerate: pip install 'spectune[examples]'")
    model, tokenizer = spectune.load("spectune-tiny")
    examples = encode(load_rows(embedded.TRAIN), tokenizer, max_length=128).examples
    delta = spectune.attach(model, spectune.BottleneckAdapter(bottleneck_dim=32), name="sentences")

    def collator(rows: list[Example]) -> dict[str, Any]:
        return collate(rows, tokenizer.pad_token_id)

    place = Path(folder or tempfile.mkdtemp(prefix="spectune-example-"))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(place / "trainer"),
            max_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=2e-3,
            save_strategy="no",  # Trainer would save the base with it: delta.save writes what was trained
            remove_unused_columns=False,
            report_to="none",
            logging_steps=10,
            use_cpu=True,
        ),
        train_dataset=examples,
        data_collator=collator,
    )
    result = trainer.train()
    saved = delta.save(place / "delta")
    print(f"training loss {result.training_loss:.3f}; {delta.num_parameters():,} weights saved in {saved}")
    return float(result.training_loss), saved


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    main(parser.parse_args().steps)
