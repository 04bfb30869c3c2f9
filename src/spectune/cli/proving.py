"""What `export` and `merge` write is run before it gets its name, and refused where it does not do what the run did."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectune.cli.console import note, say
from spectune.cli.input_rows import row_length, rows_to_measure
from spectune.cli.runs import Run
from spectune.errors import OutOfMemoryError

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from spectune.data import Example
    from spectune.storage import ExpectedAnswers

#: proved in it where nobody says otherwise: lower precision rounds by itself, and the fault would have to be larger
DTYPE = "float32"
NOT_PROVED = "not proved: with --no-check nothing has run what was written"


@dataclass(frozen=True)
class Proving:
    """How a run's export is proved: on which rows, and where.

    Attributes:
        data: rows; None are those that the run was judged on.
        check: False leaves the proof out, which is said.
    """

    run: Run
    data: str | None
    device: str | None
    dtype: str | None
    check: bool

    def loaded(self, default_dtype: str = DTYPE) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The base with the run's delta, named "run". Raises OutOfMemoryError: the base does not fit so."""
        import torch

        try:
            return self.run.load(self.device, self.dtype or default_dtype)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise OutOfMemoryError(
                f"the base does not fit in {self.dtype or default_dtype}, in which the export is made and proved: take "
                "--device cpu"
            ) from error

    def examples(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Example], str]:
        """The rows, encoded as the run's were, and what they are, in words."""
        from spectune.data import encode

        rows, source = rows_to_measure(self.data, self.run)
        max_length = row_length(model, self.run.config.get("max_length"))
        how = {"max_length": max_length, "labels": self.run.labels, **self.run.encode_options}
        return encode(rows, tokenizer, **how).examples, source

    def expected(self, model: PreTrainedModel, examples: list[Example], source: str) -> ExpectedAnswers:
        """What the run's delta answers on some of the rows."""
        from spectune.data import collate
        from spectune.deltas import attached
        from spectune.storage import expected_answers, spread

        batches = [collate([example], 0) for example in spread(examples)]
        return expected_answers(attached(model)["run"], batches, f"{len(examples):,} examples of {source}")

    def prove(self, folder: Path, expected: ExpectedAnswers, out: Console) -> dict[str, Any]:
        """Run what is in the folder, and say how far it is from the run; the numbers, for JSON. Nothing of the base may
        be held any more. Raises ExportError."""
        from spectune.storage import prove_export

        _free()
        proof = prove_export(folder, expected, own_rounding=lambda: self._own_rounding(expected))
        own = self.run.result.get("valid_loss")
        text = str(proof)
        if isinstance(own, float):
            text += f"\n  the run's own loss, over all its validation rows: {own:.4f}"
        say(out, text)
        return {"proof": proof.as_dict() | {"valid_loss_of_run": own}}

    def _own_rounding(self, expected: ExpectedAnswers) -> float | None:
        """What float32 rounds of the run's own logits; the base is loaded once more for it."""
        from spectune.deltas.difference import own_rounding

        _free()
        model, _ = self.loaded()
        return own_rounding(model, "run", [batch["input_ids"][0] for batch in expected.batches])


def proved_folder(folder: Path, fill: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Fill a folder that has its name only once it is written and proved; what `fill` returns. Nothing stays of one
    that is refused, and of one that a kill cut short nothing after the next start. Raises WriteError."""
    from spectune.storage import atomic_folder

    with atomic_folder(folder) as draft:
        return fill(draft)


def unproved() -> dict[str, Any]:
    """Say that nothing was proved, and why."""
    note(NOT_PROVED)
    return {"proof": None, "not_proved": NOT_PROVED}


def _free() -> None:
    """Give memory back: a model with hooks is a circle of references."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
