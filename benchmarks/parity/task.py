"""What all runs share: the base, the rows and their order, the first weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import spectune
from spectune.data import Encoded, batches, by_length, collate, encode, load_rows
from spectune.deltas import Delta, attach
from spectune.methods import BottleneckAdapter, method_from_name
from spectune.storage.bases import load_tokenizer
from spectune.training.prepare import pad_token_id

#: tokens of a row at most; between prompt and completion
LENGTH, SEPARATOR = 256, "\n"
#: rows that the validation loss is of
VALID_ROWS = 200


@dataclass(frozen=True)
class Order:
    """What a worker is told.

    Attributes:
        steps: of the free run.
        held_steps: steps before it at given weights.
        rows: of a step.
    """

    base: str
    data: str
    device: str
    steps: int
    held_steps: int
    rows: int


@dataclass
class Task:
    """Base, rows and steps of one method's runs."""

    order: Order
    method: Any
    train: Encoded = field(init=False)
    valid: Encoded = field(init=False)
    tokenizer: Any = field(init=False)
    pad: int = field(init=False)

    def __post_init__(self) -> None:
        order = self.order
        self.tokenizer = load_tokenizer(order.base)
        count = order.rows * self.total
        rows = {
            "train": load_rows(Path(order.data) / "train.jsonl"),
            "valid": load_rows(Path(order.data) / "valid.jsonl"),
        }
        if len(rows["train"]) < count:
            raise SystemExit(f"{order.data} has {len(rows['train'])} training rows, {count} are needed: fewer --steps")
        self.train, self.valid = (
            encode(part, self.tokenizer, max_length=LENGTH, separator=SEPARATOR)
            for part in (rows["train"][:count], rows["valid"][:VALID_ROWS])
        )
        self.pad = pad_token_id(self.tokenizer)

    @property
    def total(self) -> int:
        """Steps of a run, the held ones included."""
        return self.order.held_steps + self.order.steps

    def config(self, **settings: Any) -> Any:
        """A run's settings: nothing is fast that `settings` do not ask for."""
        plain = {"packing": False, "gradient_checkpointing": False, "torch_compile": False}
        return spectune.TrainingConfig(
            max_steps=self.total,
            per_device_train_batch_size=self.order.rows,
            per_device_eval_batch_size=64,
            max_length=LENGTH,
            separator=SEPARATOR,
            eval_steps=self.total,
            save_steps=self.total,
            memory_check="off",
            **(plain | settings),
        )

    def load(self, dtype: torch.dtype, *, precision: str | None = None, attention: str | None = None) -> Any:
        model, _ = spectune.load(self.order.base, device=self.order.device, dtype=dtype, base_precision=precision)
        if attention is not None:
            model.set_attn_implementation(attention)
        return model

    def attach(self, model: Any) -> Delta:
        return attach(model, self.method, "parity", seed=0)

    def steps(self) -> list[list[int]]:
        """The rows of each step, as the loop draws them."""
        lengths = [len(example.input_ids) for example in self.train.examples]
        drawn = batches(lengths, self.order.rows, seed=0, epoch=0)
        return [batch for step in drawn for batch in by_length(step, lengths, self.order.rows)]

    def batch(self, rows: list[int]) -> tuple[dict[str, Tensor], int]:
        """Padded, on the device; and the number of its target tokens."""
        examples = [self.train.examples[row] for row in rows]
        placed = {name: tensor.to(self.order.device) for name, tensor in collate(examples, self.pad).items()}
        return placed, sum(example.target_tokens for example in examples)


def method_of(name: str) -> Any:
    """With its defaults, but for dropout, whose masks would differ from run to run."""
    return BottleneckAdapter(dropout=0.0) if name == "adapter" else method_from_name(name)
