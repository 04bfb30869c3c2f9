"""An export is proved: it is run by the program that it was written for, and has to answer as the delta does.

What is asked: the largest difference of logits, the delta's own effect on them, and the loss. An export that answers as
the bare base does, or otherwise than the delta, is refused. The rules are merging's (see `spectune.deltas.merging`).
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from spectune.deltas.merging import FLOAT32_TOLERANCE, LOW_PRECISION_TOLERANCE
from spectune.errors import ExportError
from spectune.storage.expectation import ExpectedAnswers, kept, loss_of, mean_loss
from spectune.storage.export_engines import Engine, running

#: an export that differs by no more than this share of the delta's mean effect is the delta, in float32 too: a delta
#: that moves logits by less than the tolerance of the largest one could otherwise be left out unseen
SHARE_OF_EFFECT = LOW_PRECISION_TOLERANCE
#: a share of the largest logit beyond which no base rounds in float32
_ROUNDING = 1e-2


@dataclass(frozen=True)
class ExportProof:
    """An export against its delta, over all logits compared. Logits are absolute values.

    Attributes:
        mean_effect: how far the delta moves the bare base's logits, on average.
        mean_from_base: how far the export does.
        own_rounding: how far the delta's float32 logits are from float64's, where that had to be known.
        loss, delta_loss, base_loss: means over all targets, in `loss_unit`, of the export, of the delta here, of the
            bare base.
        says: what the program said while it loaded the export.
        caveat: what was not proved, where the program itself is not here.
    """

    engine: str
    measured_on: str
    exact: bool
    largest: float
    largest_logit: float
    mean: float
    mean_effect: float
    mean_from_base: float
    loss: float | None
    delta_loss: float | None
    base_loss: float | None
    loss_unit: str = "nats per token"
    own_rounding: float | None = None
    says: tuple[str, ...] = ()
    caveat: str | None = None

    @property
    def loss_change(self) -> float | None:
        """The export's loss minus the delta's."""
        return None if self.loss is None or self.delta_loss is None else self.loss - self.delta_loss

    @property
    def same(self) -> bool:
        """Whether the export answers as the delta does. Not a number is not the same."""
        if not self.exact:
            return self.mean <= LOW_PRECISION_TOLERANCE * self.mean_effect
        rounding = self.own_rounding is not None and self.largest <= 2 * self.own_rounding
        near = self.largest <= FLOAT32_TOLERANCE * self.largest_logit
        return rounding or (near and self.mean <= SHARE_OF_EFFECT * self.mean_effect)

    @property
    def does_nothing(self) -> bool:
        """Whether the export answers as the bare base does, while the delta does not."""
        return not self.same and self.mean_from_base <= SHARE_OF_EFFECT * self.mean_effect

    @property
    def may_be_rounding(self) -> bool:
        """Whether it is worth knowing what float32 rounds of the delta's own logits."""
        return self.exact and not self.same and self.largest <= _ROUNDING * self.largest_logit

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with the words of a merge."""
        words = {
            "largest": "largest_logit_difference", "mean": "mean_logit_difference", "mean_effect": "mean_logit_effect",
            "mean_from_base": "mean_logit_difference_from_base", "own_rounding": "own_rounding_of_logits",
            "delta_loss": "loss_of_delta", "base_loss": "loss_of_base", "exact": "float32",
        }  # fmt: skip
        found = {words.get(entry.name, entry.name): getattr(self, entry.name) for entry in fields(self)}
        return found | {"loss_change": self.loss_change, "says": list(self.says)}

    def __str__(self) -> str:
        lines = [f"proved with {self.engine}, on {self.measured_on}", f"  {self.logits}"]
        if self.loss is not None and self.delta_loss is not None:
            lines.append(
                f"  loss {self.loss:.4f} {self.loss_unit}, the delta's here {self.delta_loss:.4f} (a change of "
                f"{self.loss_change:+.2g}), the bare base's {self.base_loss:.4f}"
            )
        if self.mean_effect == 0:
            lines.append("  the delta itself changes no answer on these rows: nothing of it could be seen")
        if self.caveat is not None:
            lines.append(f"  {self.caveat}")
        return "\n".join(lines)

    @property
    def logits(self) -> str:
        """How far they are from the delta's, in words."""
        text = (
            f"largest logit difference {self.largest:.3g} (largest logit {self.largest_logit:.3g}), mean difference "
            f"{self.mean:.3g}, where the delta itself moves logits by {self.mean_effect:.3g} on average"
        )
        return text if self.own_rounding is None else f"{text}; float32 alone rounds by up to {self.own_rounding:.3g}"


def prove_export(
    folder: str | Path, expected: ExpectedAnswers, *, own_rounding: Callable[[], float | None] | None = None
) -> ExportProof:
    """Run what was exported to `folder` and compare it with the delta that it was made of.

    PEFT's folder is loaded with PEFT onto its base afresh (where PEFT is not installed it is read back here, which the
    proof says), a merged model with transformers alone, prompt embeddings as `inputs_embeds` of the plain base.

    Args:
        expected: what the delta answers, from `expected_answers`. Nothing else of it is needed: free its base first,
            and there is never more than one in memory.
        own_rounding: gives what float32 rounds of the delta's own logits; asked only where the export differs by more
            than `FLOAT32_TOLERANCE` of the largest one.

    Raises:
        ExportError: the export does nothing, answers otherwise than the delta, or cannot be loaded.
        ConfigError: the folder holds nothing that can be run, or names no base.
    """
    with running(Path(folder), expected) as engine:
        proof = _compare(engine, expected)
    del engine
    if proof.may_be_rounding and own_rounding is not None:
        proof = replace(proof, own_rounding=own_rounding())
    if not proof.same:
        raise ExportError(_refusal(proof))
    return proof


def _compare(engine: Engine, expected: ExpectedAnswers) -> ExportProof:
    largest = largest_logit = torch.zeros((), dtype=torch.float64)
    sums = torch.zeros(3, dtype=torch.float64)
    count, losses = 0, []
    for batch, tuned, bare in zip(expected.batches, expected.tuned, expected.bare, strict=True):
        logits = engine.logits(batch)
        losses.append(loss_of(expected.objective, logits, batch))
        found = kept(logits)
        if found.shape != tuned.shape:
            raise ExportError(
                f"what was exported gives logits of {list(found.shape)} with {engine.name}, the delta gives "
                f"{list(tuned.shape)}: {_kept_back(engine.says)}"
            )
        apart = (found - tuned).abs()
        # torch's maximum hands a NaN on, where Python's max would lose it
        largest = torch.maximum(largest, apart.max().double())
        largest_logit = torch.maximum(largest_logit, tuned.abs().max().double())
        sums += torch.stack([part.double().sum() for part in (apart, (tuned - bare).abs(), (found - bare).abs())])
        count += apart.numel()
    mean, effect, from_base = (float(total) / count for total in sums)
    return ExportProof(
        engine=engine.name, measured_on=expected.measured_on, exact=engine.exact, largest=float(largest),
        largest_logit=float(largest_logit), mean=mean, mean_effect=effect, mean_from_base=from_base,
        loss=mean_loss(losses), delta_loss=expected.tuned_loss, base_loss=expected.bare_loss,
        loss_unit=expected.loss_unit,
        says=tuple(engine.says), caveat=engine.caveat,
    )  # fmt: skip


def _refusal(proof: ExportProof) -> str:
    if proof.does_nothing:
        what = f"the export does nothing: with {proof.engine} it answers as the bare base does"
    else:
        what = f"the export does not answer as the delta does, with {proof.engine}"
    allowed = (
        f"{FLOAT32_TOLERANCE:g} of the largest logit, and a mean of {SHARE_OF_EFFECT:.0%} of the delta's effect"
        if proof.exact
        else f"a mean of {LOW_PRECISION_TOLERANCE:.0%} of the delta's effect"
    )
    lower = "" if proof.exact else " Lower precision rounds, too: in float32 the one is told from the other."
    losses = ""
    if proof.loss is not None:
        losses = (
            f" Loss {proof.loss:.4f} {proof.loss_unit}, the delta's {proof.delta_loss:.4f}, the bare base's "
            f"{proof.base_loss:.4f}."
        )
    differs = f"{proof.logits}, on {proof.measured_on}. Allowed is {allowed}.{losses}{lower}"
    return f"{what}: {differs} {_kept_back(proof.says)}"


def _kept_back(says: list[str] | tuple[str, ...]) -> str:
    """What its reader said, and what to do."""
    told = "".join(f"\nIt said: {line}" for line in says)
    return (
        "It is not kept. What to do: another format (spectune export --help), or the delta as it is, with "
        f"spectune.load_delta; and please report it, with the lines below if there are any.{told}"
    )
