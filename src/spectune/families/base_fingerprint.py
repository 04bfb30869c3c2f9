"""A fingerprint of a base: what tells it from every other base, in whatever precision and shards it is there."""

from typing import Any

from transformers import PreTrainedModel

from spectune.families.base_parts import BasePart, base_parts
from spectune.families.family import Family
from spectune.families.weight_digest import digest


def fingerprint(model: PreTrainedModel, family: Family) -> dict[str, Any]:
    """What every weight of the base is, by name: kind, shape, precision and `WeightDigest`, or the name of the weight
    that it is tied to. Deltas, and heads of tasks other than language modelling, are no part of the base.

    Every row of every matrix is sampled, so that one changed row is seen. It is as JSON would have it, and is compared
    by `differences`. A weight that nobody can read (on the meta device, in an unknown encoding) has no digest; sharded
    ones are put together one by one, for which all processes have to call this."""
    known: dict[tuple[int, bool], str] = {}  # tied weights have two names
    parts = {part.name: _described(part, known) for part in base_parts(model, family)}
    return {"model_type": family.model_type, "decoder": family.decoder, "parts": parts}


def _described(part: BasePart, known: dict[tuple[int, bool], str]) -> dict[str, Any]:
    found = {"kind": part.kind, "shape": part.shape, "stored_as": part.stored_as}
    first = known.setdefault((id(part.stored), part.is_table), part.name)
    if first != part.name:
        return found | {"same_as": first}
    weight = part.read()
    return found if weight is None else found | digest(weight, table=part.is_table, scale=part.scale).as_dict()
