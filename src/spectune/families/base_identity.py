"""Which base a model is: its fingerprint when it is first asked for, and again when it is stored."""

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectune.families.base_comparison import differences
from spectune.families.base_fingerprint import fingerprint
from spectune.families.base_parts import base_parts
from spectune.families.family import Family
from spectune.families.quantised import is_plain

log = logging.getLogger("spectune")

_SAMPLES = 16


class BaseIdentity:
    """The base of a model. Nothing is computed before somebody asks; a change since then, or since this was made, is
    seen when the fingerprint is stored."""

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        self.model, self.family = model, family
        self._taken: dict[str, Any] | None = None
        self._watch = _Watch(model, family)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The base's fingerprint, as it was when it was first asked for."""
        if self._taken is None:
            self._taken = fingerprint(self.model, self.family)
        return self._taken

    def now(self, name: str) -> dict[str, Any]:
        """The base's fingerprint as it is now, to be stored with delta `name`. Where the base is not what it was, the
        log says so: the delta was trained on several bases, and belongs to this one."""
        before, self._taken = self._taken, fingerprint(self.model, self.family)
        changed = differences(before, self._taken) if before is not None else self._watch.changed()
        if changed:
            log.warning(
                "delta %r: the base has changed since the delta was attached, and what is saved is for the base as it "
                "is now: it will not load on the one that it began with. To change a base, save it to a folder of its "
                "own, load that and attach there. Changed: %s",
                name, "; ".join(changed),
            )  # fmt: skip
            self._watch = _Watch(self.model, self.family)
        return self._taken


class _Watch:
    """A few values of each weight, and torch's count of writes to it: what costs next to nothing to keep."""

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        self._kept = {part.name: (part, *_state(part.stored)) for part in base_parts(model, family)}

    def changed(self) -> list[str]:
        """The weights that were written to; sampled values tell even where the writer went around torch's count."""
        return [name for name, (part, *state) in self._kept.items() if not _same(state, _state(part.stored))]


def _same(before: list[Any], now: tuple[int | None, Tensor | None]) -> bool:
    if before[0] is not None and now[0] is not None and before[0] != now[0]:
        return False
    old, new = before[1], now[1]
    return old is None or new is None or torch.equal(old.to(new.device, new.dtype), new)


def _state(weight: Tensor) -> tuple[int | None, Tensor | None]:
    version = None if weight.is_inference() else weight._version
    plain = is_plain(weight) and weight.device.type != "meta" and weight.is_contiguous() and weight.numel()
    if not plain:
        return version, None
    flat = weight.detach().view(-1)
    return version, flat[:: max(1, flat.numel() // _SAMPLES)].clone()
