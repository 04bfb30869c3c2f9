"""Two `WeightDigest`s compared: by digests to the bit, by sums where a precision has rounded too much away."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from spectune.families.weight_digest import RANGE, ROUNDINGS, SUMS, sums_of, tail_begins

#: how far a quantised copy is from its original, root mean square in shares of the weight's own; above what is met
#: (fp8 e4m3 0.026, nf4 0.09, int8 by row 0.01, more where a row has an outlier)
_SPREAD = {"fp8": 0.06, "int8": 0.06, "nf4": 0.2}
_SPREAD_ELSEWHERE = 0.25
#: two copies in one precision are nearer: only what rounding in between moved to the next level differs
_SAME_PRECISION = 0.25
#: bfloat16 is 0.0017 from its original, float16 0.0002
_SPREAD_OF_FLOATS = 0.003
_NAMES = tuple(str(dtype).removeprefix("torch.") for dtype in ROUNDINGS)
FLOATS = ("float64", *_NAMES)
#: standard deviations of a sketch's own noise
_SURE = 6.0

#: one weight's entry of a fingerprint
Part = Mapping[str, Any]


def coarse(parts: Mapping[str, Part]) -> set[int]:
    """The roundings (1 bfloat16, 2 float16) that most of a base's weights went through, whatever they are held in now.
    Norms and biases are not asked: ones and zeros are the same in any."""
    asked = [
        part for part in parts.values()
        if part["kind"] in ("linears", "experts", "embeddings") and part["stored_as"] in FLOATS and part.get("digests")
    ]  # fmt: skip
    return {r for r in (1, 2) if asked and 2 * sum(_is_rounded(part, r) for part in asked) > len(asked)}


def roundings(one: Part, other: Part, coarse: tuple[set[int], set[int]]) -> tuple[int, ...]:
    """The digests that count for two weights: those of the precision that either is held in; of one that all of either
    base but not of the other went through (a float32 model may be read from a bfloat16 copy); else float32's."""
    held = (one["stored_as"], other["stored_as"])
    found = tuple(r for r in (1, 2) if _NAMES[r] in held or (r in coarse[0]) != (r in coarse[1]))
    return found or (0,)


def same_ranges(one: Part, other: Part, counted: tuple[int, ...]) -> list[bool]:
    """For each range of rows of two weights, whether it is the same; a weight that is no table has one."""
    found = [equal(a, b, counted) for a, b in zip(one["digests"], other["digests"], strict=False)]
    return _alike(one, other) if not all(found) and by_sums(one, other) else found


def same_rows(k: int, one: Part, other: Part, common: int, counted: tuple[int, ...]) -> list[bool] | None:
    """For each row of range `k` of two tables that have `common` rows, whether it is the same; None where that is not
    known of single rows: they are too far from both tables' ends, or in a precision that needs sums."""
    begins = [tail_begins(part["shape"][0]) for part in (one, other)]
    if max(begins) > k * RANGE or by_sums(one, other):
        return None
    rows = range(k * RANGE, min((k + 1) * RANGE, common))
    return [equal(one["tail"][row - begins[0]], other["tail"][row - begins[1]], counted) for row in rows]


def equal(a: str, b: str, counted: tuple[int, ...]) -> bool:
    """Whether two entries of digests are of the same values, in float32 or in any precision that counts."""
    pairs = list(zip(a.split(), b.split(), strict=True))
    return any(pairs[r][0] == pairs[r][1] for r in (0, *counted))


def by_sums(one: Part, other: Part) -> bool:
    """Whether digests that differ prove nothing: one is quantised; or they are a bfloat16 and a float16 copy of float32
    values, neither of which is the other one rounded."""
    if one["stored_as"] not in FLOATS or other["stored_as"] not in FLOATS:
        return True
    pairs = ((one, other), (other, one))
    return any(_is_rounded(a, 1) and _is_rounded(b, 2) and not _is_rounded(b, 1) for a, b in pairs)


def _is_rounded(part: Part, rounding: int) -> bool:
    return all(text.split()[0] == text.split()[rounding] for text in part["digests"])


def _alike(one: Part, other: Part) -> list[bool]:
    """By sums, for each range: whether the weights are no further apart than their precisions allow, as a whole and in
    each block of rows."""
    a, b = sums_of(one["sums"]) * one["rms"], sums_of(other["sums"]) * other["rms"]
    blocks = min(len(a), len(b))
    squares = (a[:blocks] - b[:blocks]) ** 2
    limit = (_spread(one["stored_as"], other["stored_as"]) * one["rms"]) ** 2
    each: Sequence[Any] = (squares.mean(1) <= 2 * limit * _noise(SUMS)).tolist()
    if one.get("tail"):
        return list(each)
    return [bool(squares.mean() <= limit * _noise(squares.size)) and all(each)]


def _spread(one: str, other: str) -> float:
    spreads = [_SPREAD_OF_FLOATS if p in FLOATS else _SPREAD.get(p, _SPREAD_ELSEWHERE) for p in (one, other)]
    return max(spreads) * (_SAME_PRECISION if one == other and one not in FLOATS else 1)


def _noise(count: int) -> float:
    """What the mean of so many squares of standard normal numbers does not pass: Wilson and Hilferty 1931."""
    part = 2 / (9 * count)
    return float((1 - part + _SURE * math.sqrt(part)) ** 3)
