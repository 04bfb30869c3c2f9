"""The batches of a run's steps on this process: which rows, packed or padded, as tensors."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from spectune.blocks.execution import Packing
from spectune.compute.masks import OneTextRows
from spectune.data import Example, batches, by_length, collate, collate_packs, filled, pack_step
from spectune.deltas import packed, packing
from spectune.training.config import TrainingConfig
from spectune.training.distribution import World


class Batches:
    """Rows of training, in batches as `packing` says; `pad_token_id` stands where a row has no token."""

    def __init__(
        self, examples: Sequence[Example], config: TrainingConfig, packing: Packing, world: World, pad_token_id: int = 0
    ) -> None:
        self.examples, self.config, self.packing, self.world = examples, config, packing, world
        self.pad_token_id = pad_token_id
        self.lengths = [example.length for example in examples]
        # batches of one shape are one graph's, with a mask or without: not now and then without
        self._has_mask = not packing.mask_free and bool(packing.lengths) and len(set(self.lengths)) > 1
        self._one_text_rows = OneTextRows()

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of every epoch: so many `windows`."""
        return -(-len(self.examples) // self._rows_of_step)

    @property
    def _rows_of_step(self) -> int:
        config = self.config
        return config.per_device_train_batch_size * self.world.size * config.gradient_accumulation_steps

    def windows(self, epoch: int) -> list[list[list[int]]]:
        """The batches of an epoch for all processes, numbers of rows, in groups of one optimizer step each."""
        config = self.config
        size = config.per_device_train_batch_size * self.world.size
        drawn, grouped = self._rows_of_step, config.group_by_length
        steps = batches(self.lengths, drawn, seed=config.seed, epoch=epoch, group_by_length=grouped)
        return [by_length(rows, self.lengths, size) for rows in steps]

    def of_step(self, window: Sequence[Sequence[int]]) -> list[list[list[int]]]:
        """The batches of one step, as this process runs them: packs of rows, a row a pack where packing is off. Empty
        where a batch has nothing for this process. `window`: the step's rows in batches for all processes."""
        if not self.packing.on:
            return [[[row] for row in self.world.share(batch)] for batch in window]
        rows, size, how = (
            [row for batch in window for row in batch],
            self.config.per_device_train_batch_size,
            self.packing,
        )
        found = pack_step(rows, self.lengths, size, extra=how.virtual, whole=how.kernel is not None,
                          processes=self.world.size)  # fmt: skip
        return [list(self.world.share(batch)) for batch in found]

    def collate(self, packs: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """A batch, packed or padded, on the host; without a mask where none is needed (it keeps attention from fast
        kernels)."""
        members = [[self.examples[row] for row in pack] for pack in packs]
        if self.packing.on:
            batch = collate_packs(members, self.pad_token_id)
        else:
            batch = collate([example for pack in members for example in pack], self.pad_token_id)
            batch = filled(batch, *self.packing.filled(*batch["input_ids"].shape), self.pad_token_id)
            if self.packing.mask_free or (not self._has_mask and bool(batch["attention_mask"].all())):
                del batch["attention_mask"]
        return batch

    @contextlib.contextmanager
    def listening(self, model: PreTrainedModel) -> Iterator[None]:
        """While inside, the model takes this run's batches."""
        how = self.packing
        with packing(model, how.kernel, how.longest) if how.on else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def placed(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """What the loss takes of a batch, on the model's device; inside, the model knows its documents."""
        with packed(model, batch.get("documents")) if self.packing.on else self._one_text_rows.passes():
            given = {name: tensor for name, tensor in batch.items() if name != "documents"}
            yield {name: tensor.to(model.device, non_blocking=True) for name, tensor in given.items()}
