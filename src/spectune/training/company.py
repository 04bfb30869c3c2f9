"""How many runs share a pass: as many as gain from it, and as many as have room beside each other."""

import logging
from collections.abc import Sequence

from transformers import PreTrainedModel

from spectune.deltas import Delta
from spectune.errors import DoesNotFitError
from spectune.planning.device_memory import free_memory
from spectune.planning.estimate import Estimate, shown
from spectune.planning.flops import flops_per_token
from spectune.planning.shared_pass import largest_part, planned_together
from spectune.training.decisions import LAUNCH_SECONDS_PER_LAYER, OPERATIONS_PER_SECOND
from spectune.training.prepare import Prepared
from spectune.training.starting import Started

log = logging.getLogger("spectune")

#: runs that share a pass, at most, where nobody says how many
MOST = 16


class TooManyTogetherError(DoesNotFitError):
    """Runs that do not fit into one pass. `most`: how many of the first do."""

    def __init__(self, most: int, message: str) -> None:
        self.most = most
        super().__init__(message)


def room_of(model: PreTrainedModel) -> int | None:
    """Bytes for a base that is loaded and all that is trained on it; None where nobody tells."""
    free = free_memory(model.device)
    return None if free is None else free + sum(p.numel() * p.element_size() for p in model.parameters())


def check_together(model: PreTrainedModel, begun: Sequence[Started]) -> None:
    """Compare the plan of runs that share passes with what is free. Raises TooManyTogetherError where they do not fit,
    if any of them asks for that (`memory_check`); otherwise a warning is logged."""
    known = [made.predicted.estimate for made in begun if made.predicted.estimate is not None]
    room = room_of(model)
    if room is None or len(known) < 2 or (needed := planned_together(known)) <= room:
        return
    most = largest_part(known, room, len(known))
    message = (
        f"{len(known)} runs in one pass are predicted to take {shown(needed)} of memory, and {shown(room)} is there: "
        f"train at most {most} together. memory_check=warn tries it all the same."
    )
    if any(made.run.config.memory_check == "refuse" for made in begun):
        raise TooManyTogetherError(most, message)
    log.warning("%s", message)


def most_together(
    asked: int | str, worth: Sequence[int], estimates: Sequence[Estimate | None], room: int | None
) -> int:
    """How many of the first of some runs share a pass.

    Args:
        asked: at most so many; "auto": as many as gain from it.
        worth: by each of them `worth_sharing`.
        estimates: of each by itself; where one is not predicted, memory has no say.
        room: bytes for the base and all of them; None is without limit.
    """
    most = min(len(worth), asked if isinstance(asked, int) else min(worth, default=1))
    known = [estimate for estimate in estimates[:most] if estimate is not None]
    return most if len(known) < most else largest_part(known, room, most)


def worth_sharing(delta: Delta, prepared: Prepared) -> int:
    """How many runs gain from a pass with this one: as many as it takes until computing takes longer than launching
    what is computed. 1 where nothing is launched: on a CPU filling rows up to one length costs more than is gained."""
    if delta.model.device.type != "cuda":
        return 1
    length = max(1, round(sum(example.length for example in prepared.examples) / len(prepared.examples)))
    operations = (
        prepared.config.per_device_train_batch_size * length * flops_per_token(delta.family, delta.method, length)
    )
    launching = len(delta.family.layers) * LAUNCH_SECONDS_PER_LAYER
    return max(1, min(MOST, round(1 + launching * OPERATIONS_PER_SECOND / operations)))
