"""Whether a run packs its rows, said before its first step, and its steps' batches."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel

from spectune.compute.masks import OneTextRows
from spectune.compute.pack_layout import Kernel
from spectune.compute.varlen import FLASH_DTYPES, flash_by_document, loop_by_document
from spectune.data import Example, batches, by_length, pack_step, places
from spectune.deltas import (
    Delta,
    InputSite,
    kernel_serves,
    packed,
    packing,
    route,
    why_mask_is_needed,
    why_not_packed,
)
from spectune.errors import ConfigError
from spectune.families import Family
from spectune.methods import LoRA
from spectune.objectives import CAUSAL_LM
from spectune.training.config import TrainingConfig
from spectune.training.distribution import World
from spectune.training.execution import launch_bound

log = logging.getLogger("spectune")

#: `packing="auto"` packs where that leaves out so much of the tokens that are computed: below it, a step's time changes
#: by less than it does from run to run, and each batch's shape would be another for it
WORTH = 0.1
#: steps of the first epoch that are looked at for it
_LOOKED_AT = 200
#: tokens of rows up to which compiled blocks have one graph for documents of any length. The kernel is started for
#: each document as if it were the longest: far beyond that, starting for nothing would cost more than another graph
ONE_GRAPH = 1024


@dataclass(frozen=True)
class Packing:
    """How the rows of a step become batches.

    Attributes:
        on: rows share sequences.
        kernel: attention for packs; None uses masks.
        virtual: virtual tokens that stand in the sequence before each row.
        longest: tokens of the longest row, of those that one compiled graph is to serve.
        untold: padding needs no mask: it stands on the right, and the model is causal throughout.
        notice: a line for the user; None where there is nothing to say.
    """

    on: bool = False
    kernel: Kernel | None = None
    virtual: int = 0
    longest: int = 0
    untold: bool = False
    notice: str | None = None
    _rows: OneTextRows = field(default_factory=OneTextRows, repr=False, compare=False)

    def of_step(
        self, window: Sequence[Sequence[int]], lengths: Sequence[int], config: TrainingConfig, world: World
    ) -> list[list[list[int]]]:
        """The batches of one step, as this process runs them: packs of rows, a row a pack where packing is off.
        Empty where a batch has nothing for this process.

        Args:
            window: the step's rows in batches for all processes, as `by_length` cuts them.
        """
        if not self.on:
            return [[[row] for row in world.share(batch)] for batch in window]
        rows = [row for batch in window for row in batch]
        size = config.per_device_train_batch_size
        found = pack_step(rows, lengths, size, extra=self.virtual, whole=self.kernel is not None, processes=world.size)
        return [list(world.share(batch)) for batch in found]

    def collate(self, packs: Sequence[Sequence[Example]], pad_token_id: int) -> dict[str, Tensor]:
        """A batch, packed or padded; without a mask where none is needed (it keeps attention from fast kernels)."""
        if self.on:
            return CAUSAL_LM.collate_packs(packs, pad_token_id)
        batch = CAUSAL_LM.collate([example for pack in packs for example in pack], pad_token_id)
        if self.untold or bool(batch["attention_mask"].all()):
            del batch["attention_mask"]
        return batch

    @contextlib.contextmanager
    def listening(self, model: PreTrainedModel) -> Iterator[None]:
        """While inside, the model takes this run's batches."""
        with packing(model, self.kernel, self.longest) if self.on else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def placed(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """What the loss takes of a batch, on the model's device; inside, the model knows its documents."""
        with packed(model, batch.get("documents")) if self.on else self._rows.passes():
            yield {
                name: tensor.to(model.device, non_blocking=True)
                for name, tensor in batch.items()
                if name != "documents"
            }


def decide(model: PreTrainedModel, delta: Delta, examples: Sequence[Example], config: TrainingConfig) -> Packing:
    """Whether this run packs. The same for the same rows, settings and model, so that a resumed run does as before; and
    whatever the seed and the method's virtual tokens, so that the runs of a comparison do alike.

    Raises:
        ConfigError: `packing` is True, and the model cannot keep documents apart.
    """
    lengths = [len(example.input_ids) for example in examples]
    if not wanted(delta.family, lengths, config, model.device.type):
        return _padded(model, delta, lengths)
    saved = share_saved(lengths, config, virtual_in_sequence(delta))
    reason = None
    # a loop over documents is another graph for each batch
    taken = [k for k in kernels(model) if not (k is loop_by_document and config.torch_compile is True)]
    for kernel in taken:
        with route(model, delta.name):
            reason = why_not_packed(model, kernel)
            serves = reason is None and (kernel is None or kernel_serves(model, kernel))
        if serves:
            return Packing(
                True, kernel, virtual_in_sequence(delta), min(max(lengths), ONE_GRAPH), notice=_said(saved, kernel)
            )
    if config.packing is True:
        raise ConfigError(f"packing is refused: {reason}. Leave it out (packing=false), or to spectune (packing=auto).")
    notice = f"note: rows are padded, not packed, which computes {saved:.0%} more tokens than need be: {reason}"
    return _padded(model, delta, lengths, notice)


def wanted(family: Family, lengths: Sequence[int], config: TrainingConfig, device_type: str) -> bool:
    """`config.packing`, or whether "auto" would pack these rows on such a device, if the model can be given packs. The
    same for all methods.

    Args:
        lengths: tokens of the training rows.
    """
    if config.packing != "auto":
        return config.packing
    saved = share_saved(lengths, config)
    if saved < WORTH:
        return False
    mean = sum(lengths) / len(lengths)
    tokens = round(config.per_device_train_batch_size * mean / (1 - saved))
    # where the device waits to be asked for kernels, fewer tokens make a step no shorter
    return device_type != "cuda" or not launch_bound(family, LoRA(), tokens=tokens, length=round(mean))


def _padded(model: PreTrainedModel, delta: Delta, lengths: Sequence[int], notice: str | None = None) -> Packing:
    """Rows apart, padded. Whether padding is told decides about the speed alone, so only the log hears of it."""
    if len(set(lengths)) == 1:
        return Packing(notice=notice)
    with route(model, delta.name):
        reason = why_mask_is_needed(model)
    if reason is not None:
        log.info("batches that are padded have an attention mask: %s", reason)
    return Packing(untold=reason is None, notice=notice)


def kernels(model: PreTrainedModel) -> list[Kernel | None]:
    """Ways to attend within packs on the model's device, the fastest first; None is by masks. On one CPU core a loop
    over documents was 1.1 to 1.35 times as fast as masks (docs/decisions.md)."""
    if model.device.type == "cpu":
        return [loop_by_document, None]
    flash = model.device.type == "cuda" and model.dtype in FLASH_DTYPES
    return [flash_by_document, None] if flash else [None]


def virtual_in_sequence(delta: Delta) -> int:
    """Virtual tokens that take a place in the sequence itself; a prefix takes none."""
    return delta.method.virtual_tokens if any(isinstance(site, InputSite) for site, _ in delta.sites) else 0


def share_saved(lengths: Sequence[int], config: TrainingConfig, virtual: int = 0) -> float:
    """The share of the tokens of padded batches that short packs leave out, in some steps of an epoch in any order."""
    size = config.per_device_train_batch_size
    steps = batches(
        lengths,
        size * config.gradient_accumulation_steps,
        seed=0,
        epoch=0,
        group_by_length=config.group_by_length,
    )
    padded = in_packs = 0
    sizes = [length + virtual for length in lengths]
    for rows in steps[:_LOOKED_AT]:
        padded += sum(places([[row] for row in batch], sizes) for batch in by_length(rows, lengths, size))
        in_packs += sum(places(batch, sizes) for batch in pack_step(rows, lengths, size, extra=virtual))
    return 1 - in_packs / padded


def _said(saved: float, kernel: Kernel | None) -> str:
    how = "masks" if kernel is None else "attention document by document"
    return f"rows are packed ({how}): {saved:.0%} fewer tokens to compute than padded"
