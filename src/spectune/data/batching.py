"""Batches: tensors of some examples, and which examples go together when."""

import math
import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spectune.data.example import Example
from spectune.data.labelled import IGNORED, LabelledExample
from spectune.errors import ConfigError

__all__ = [
    "IGNORED", "batches", "by_length", "collate", "collate_packs", "filled", "pad_token_id", "padded"
]  # fmt: skip

#: examples are sorted by length within groups of so many batches
GROUP = 50


def pad_token_id(tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None) -> int:
    """What stands where a row has no token: padding, else EOS, else 0. It is masked, so any id will do that the base's
    embedding, of `vocab_size` rows, has; a tokenizer may have been given a padding token that it has not."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int) and (vocab_size is None or token < vocab_size):
            return token
    return 0


def padded(
    rows: Sequence[Sequence[int]], pad_token_id: int, *, padding_side: str = "right", pad_to_multiple_of: int = 1
) -> dict[str, Tensor]:
    """Token ids as `input_ids` and `attention_mask`, each `[batch, length]` int64."""
    if padding_side not in ("left", "right"):
        raise ConfigError(f"padding_side = {padding_side!r}: expected 'left' or 'right'")
    longest = -(-max(map(len, rows)) // pad_to_multiple_of) * pad_to_multiple_of
    ids = torch.full((len(rows), longest), pad_token_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if padding_side == "right" else slice(longest - len(row), longest)
        ids[i, place] = torch.tensor(row, dtype=torch.int64)
        mask[i, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def collate(
    examples: Sequence[Example], pad_token_id: int, *, padding_side: str = "right", pad_to_multiple_of: int = 1
) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask`, `labels`, each `[batch, length]` int64.

    Labels are -100 on prompts (later ones of a conversation, too) and padding, by position: a target that happens to be
    the padding token stays one. For a head `labels` are `[batch]`, int64 classes or float32 numbers; or, where words
    have classes, `[batch, length]` int64, at each word's first token and -100 elsewhere, not shifted.
    """
    rows = [example.input_ids for example in examples]
    batch = padded(rows, pad_token_id, padding_side=padding_side, pad_to_multiple_of=pad_to_multiple_of)
    if isinstance(examples[0], LabelledExample):
        return batch | {"labels": _labels([e for e in examples if isinstance(e, LabelledExample)], batch)}
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    for row, mask, example in zip(labels, batch["attention_mask"], examples, strict=True):
        start = int(mask.argmax())
        row[start : start + max(example.prompt_length, 1)] = IGNORED  # nothing stands before a sequence's first token
        for begin, end in example.masked:
            row[start + begin : start + end] = IGNORED
    return batch | {"labels": labels}


def _labels(examples: Sequence[LabelledExample], batch: dict[str, Tensor]) -> Tensor:
    """The labels of texts for a head, as `collate` has them."""
    given = [example.label for example in examples]
    if None not in given:
        measures = any(isinstance(label, float) for label in given)
        return torch.tensor(given, dtype=torch.float32 if measures else torch.int64)
    found = torch.full_like(batch["input_ids"], IGNORED)
    for row, mask, example in zip(found, batch["attention_mask"], examples, strict=True):
        row[mask.bool()] = torch.tensor(example.token_labels())
    return found


def filled(batch: dict[str, Tensor], rows: int, length: int, pad_token_id: int) -> dict[str, Tensor]:
    """What `collate` gives, filled up to `[rows, length]` with what nothing is learned from: padding on the right, and
    rows of padding that are not masked, since a row in which nothing may be attended to has no attention."""
    more_rows, more_tokens = rows - batch["input_ids"].shape[0], length - batch["input_ids"].shape[1]
    if not (more_rows or more_tokens):
        return batch
    values = {"input_ids": (pad_token_id, pad_token_id), "attention_mask": (0, 1), "labels": (IGNORED, IGNORED)}
    one_each = {}
    if batch["labels"].dim() == 1:  # one for each row
        del values["labels"]
        nothing = math.nan if batch["labels"].is_floating_point() else IGNORED
        one_each["labels"] = F.pad(batch["labels"], (0, more_rows), value=nothing)
    return one_each | {
        name: F.pad(F.pad(batch[name], (0, more_tokens), value=of_tokens), (0, 0, 0, more_rows), value=of_rows)
        for name, (of_tokens, of_rows) in values.items()
    }


def collate_packs(packs: Sequence[Sequence[Example]], pad_token_id: int) -> dict[str, Tensor]:
    """`input_ids`, `labels`, `position_ids`, `documents`, each `[packs, length]` int64.

    Documents stand one after the other, padding at the end. Positions begin at 0 in each document (padding has 0);
    `documents` numbers them from 0 within each pack, -1 on padding. Labels are -100 on prompts, on padding and on each
    document's first token, which nothing of its own document predicts.
    """
    longest = max(sum(example.length for example in pack) for pack in packs)
    shape = (len(packs), longest)
    batch = {
        "input_ids": torch.full(shape, pad_token_id, dtype=torch.int64),
        "labels": torch.full(shape, IGNORED, dtype=torch.int64),
        "position_ids": torch.zeros(shape, dtype=torch.int64),
        "documents": torch.full(shape, -1, dtype=torch.int64),
    }
    for i, pack in enumerate(packs):
        start = 0
        for number, example in enumerate(pack):
            length = example.length
            place = slice(start, start + length)
            row = torch.tensor(example.input_ids)
            batch["input_ids"][i, place] = row
            for begin, end in example.targets:
                batch["labels"][i, start + max(begin, 1) : start + end] = row[max(begin, 1) : end]
            batch["position_ids"][i, place] = torch.arange(length)
            batch["documents"][i, place] = number
            start += length
    return batch


def batches(
    lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int, group_by_length: bool = False
) -> list[list[int]]:
    """Indices of the examples of each batch of an epoch: every index once, a function of its arguments alone.

    With `group_by_length`, rows of like length share a batch (within groups of 50 batches, themselves in random order).
    In epoch 0 the batch with the longest row comes first: memory that does not suffice shows at once.
    """
    rng = random.Random(f"{seed}-{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    if group_by_length:
        groups = _cut(order, batch_size * GROUP)
        order = [index for group in groups for index in sorted(group, key=lambda i: -lengths[i])]
    found = _cut(order, batch_size)
    if group_by_length:
        rng.shuffle(found)
    if epoch == 0 and found:
        longest = max(range(len(found)), key=lambda i: (max(lengths[j] for j in found[i]), len(found[i])))
        found.insert(0, found.pop(longest))
    return found


def by_length(rows: Sequence[int], lengths: Sequence[int], size: int) -> list[list[int]]:
    """The rows of one optimizer step in batches of at most `size`, rows of like length together, the longest first.

    The step's gradient is a sum over its rows: this saves padding and changes nothing else.
    """
    return _cut(sorted(rows, key=lambda i: -lengths[i]), size)


def _cut(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]
