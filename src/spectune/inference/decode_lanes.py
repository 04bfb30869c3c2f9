"""Which rows are written together: those of all deltas whose rows can share a batch, and others by themselves."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from spectune.blocks.recorded_steps import PlainSteps, Steps
from spectune.deltas import Attachment, Delta, why_not_in_tables
from spectune.inference.cached_lane import CachedLane
from spectune.inference.decode_batch import Caller, DecodeBatch
from spectune.inference.engine_bases import why_not_delta, why_not_engine, windows_of
from spectune.inference.lane import Lane, UncachedLane

log = logging.getLogger("spectune")


@dataclass(frozen=True)
class Key:
    """Of a lane: the delta that it is of, None for all whose rows can share a batch; and whether it has a cache."""

    delta: str | None
    cached: bool = True


class Lanes:
    """The lanes of an engine, made when they are needed. `steps`: what runs a batch's steps; `most`: so many rows are
    written at once."""

    def __init__(
        self, model: PreTrainedModel, pad_token_id: int, steps: Callable[[DecodeBatch], Steps], most: int = 1
    ) -> None:
        self.model, self.pad_token_id, self.steps, self.most = model, pad_token_id, steps, most
        self._caller = Caller(model)
        self._why_not = why_not_engine(model)
        if self._why_not is not None:
            log.info("each token takes a pass over its whole row: %s", self._why_not)
        self._lanes: dict[Key, Lane] = {}
        self._alone: dict[str, tuple[weakref.ref[Delta], str | None]] = {}

    def __iter__(self) -> Iterator[Lane]:
        return iter(list(self._lanes.values()))

    @property
    def rows(self) -> int:
        """Rows that are being written."""
        return sum(len(lane.tickets) for lane in self._lanes.values())

    def of(self, name: str | None) -> Lane:
        """The lane that a delta's rows are written in."""
        key = self._key(name)
        if key not in self._lanes:
            self._lanes[key] = self._made(key)
        return self._lanes[key]

    def reserve(self, names: Sequence[str], places: int, slots: int) -> None:
        """Make the cache with so many places for each row, and tables for so many deltas, as large as these, attached,
        need."""
        self.of(None).reserve(places, slots)
        for name in names:
            self.of(name).make_room_for(name)

    def adds_mixtures(self, adds: bool) -> None:
        """Whether steps may be recorded for further mixtures of kinds of deltas; where not, rows are computed with the
        kinds of a known one, or with all."""
        for lane in (self.of(None), *self):
            lane.adds_mixtures(adds)

    def tidy(self) -> None:
        """Let go of the lanes of single deltas that have no row: their deltas may be gone."""
        for key in [key for key, lane in self._lanes.items() if key.delta and not lane.tickets]:
            self._lanes.pop(key).close()

    def close(self) -> None:
        """Let go of all."""
        for lane in self:
            lane.close()
        self._lanes.clear()

    def _made(self, key: Key) -> Lane:
        if not key.cached:
            return UncachedLane(self._caller, self.pad_token_id)
        # what is not in tables is not recorded: a graph would hold the weights of deltas that are gone
        steps = (lambda batch: PlainSteps(batch.run)) if key.delta else self.steps
        return CachedLane(self._caller, self.pad_token_id, windows_of(self.model), steps, self.most)

    def _key(self, name: str | None) -> Key:
        attachment = Attachment.of(self.model)
        if self._why_not is not None:
            return Key(None, cached=False)
        if attachment is None or (name is None and attachment.tuned is None):
            return Key(None)
        if name is None:
            return Key("")  # beside a fully tuned base
        delta = attachment.deltas.get(name)
        if delta is None:
            return Key(None)  # it was detached meanwhile, as the pass over its prompt will say
        if why_not_delta(attachment, name) is not None:
            return Key(None, cached=False)
        known, reason = self._alone.get(name, (None, None))
        if known is None or known() is not delta:
            reason = why_not_in_tables(attachment, delta)
            if reason is not None:
                log.info("%s: its rows are written in batches of their own", reason)
            self._alone[name] = weakref.ref(delta), reason
        return Key(None if reason is None else name)
