"""Two fingerprints compared: the same base in any precision, or what of it is another's."""

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from spectune.errors import some
from spectune.families.weight_comparison import Part, coarse, roundings, same_ranges, same_rows
from spectune.families.weight_digest import RANGE, TABLES

log = logging.getLogger("spectune")


@dataclass
class BaseComparison:
    """What was found of two fingerprints.

    Attributes:
        changed: what differs, one line each; empty for the same base.
        added: rows that tables have here beyond those of the other one, all of whose rows are equal.
        unread: what could not be compared.
    """

    changed: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)


def differences(stored: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """The differences between two bases' fingerprints, one line each, added rows among them; empty for the same base,
    in whatever precision both are. What could not be compared is logged."""
    found = compare_bases(stored, here)
    if found.unread:
        log.warning("not compared with the base that was recorded: %s", some(found.unread))
    return found.changed + found.added


def compare_bases(stored: Mapping[str, Any], here: Mapping[str, Any]) -> BaseComparison:
    """Compare the fingerprint of the base that something was trained on with that of the one that is here.

    Between float32, bfloat16 and float16 every sampled bit counts, at the coarser precision of both. A quantised weight
    is compared by sketches, within what its precision rounds away."""
    if "parts" not in stored:
        return BaseComparison(unread=["all of it: it was recorded by an earlier version, by other samples"])
    if lines := _other_parts(stored, here):
        return BaseComparison(changed=lines)
    found = BaseComparison()
    before, now = _untied(stored["parts"]), _untied(here["parts"])
    both = [
        name for name in before if name in now and not all("same_as" in one["parts"][name] for one in (stored, here))
    ]
    precisions = coarse(before), coarse(now)
    different: dict[str, list[str]] = defaultdict(list)
    tables = []
    for name in both:
        pair, short = (before[name], now[name]), name.removesuffix(".weight")
        kind, counted = pair[0]["kind"], roundings(*pair, precisions)
        if any("digests" not in part for part in pair):
            found.unread.append(f"{short}: on no device, or in an encoding that is not known here")
        elif kind in TABLES:
            lines = _compare_tables(short, *pair, counted, found)
            tables += lines
            different[kind] += [short] if lines else []
        elif not all(same_ranges(*pair, counted)):
            different[kind].append(short)
    totals = Counter(before[name]["kind"] for name in both)
    for kind, names in different.items():
        if kind not in TABLES:
            found.changed.append(f"{len(names)} of {totals[kind]} {kind} differ: {some(names)}")
    found.changed += tables
    same = [kind for kind in totals if not different[kind]]
    if found.changed and same:
        found.changed.append(f"equal: {', '.join(same)}")
    return found


def _untied(parts: Mapping[str, Part]) -> dict[str, Part]:
    """Each with its own digests: a base is the same whether its head is its embeddings or a copy of them."""
    return {
        name: {**parts[part["same_as"]], "kind": part["kind"]} if "same_as" in part else part
        for name, part in parts.items()
    }


def _other_parts(stored: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Names and shapes that only one of them has, rows of tables and what stands beside the decoder left out."""
    before, now = stored["parts"], here["parts"]
    missing, surplus = (
        [name for name, part in one["parts"].items() if name not in other and _in_decoder(name, part, one["decoder"])]
        for one, other in ((stored, now), (here, before))
    )
    shapes = [
        f"{name} {now[name]['shape']} instead of {part['shape']}"
        for name, part in before.items()
        if name in now and _columns(part) != _columns(now[name])
    ]
    if not (missing or surplus or shapes):
        return []
    lines = [
        f"the base's parts differ: it was trained on a {stored['model_type']} base with other names or shapes, "
        f"this is a {here['model_type']} base"
    ]
    lines += [f"missing here: {some(missing)}"] if missing else []
    lines += [f"only here: {some(surplus)}"] if surplus else []
    return lines + ([f"shapes: {some(shapes)}"] if shapes else [])


def _in_decoder(name: str, part: Part, decoder: str) -> bool:
    top = decoder.partition(".")[0]
    return part["kind"] != "head" and (not top or name.partition(".")[0] == top)


def _columns(part: Part) -> list[int]:
    return list(part["shape"][1:] if part["kind"] in TABLES else part["shape"])


def _compare_tables(
    name: str, one: Part, other: Part, counted: tuple[int, ...], found: BaseComparison
) -> list[str]:  # fmt: skip
    """What differs of two tables, as lines; added rows and what could not be compared go to `found`."""
    before, now = one["shape"][0], other["shape"][0]
    common = min(before, now)
    ranges = same_ranges(one, other, counted)
    if before != now and common % RANGE:
        ranges[common // RANGE] = False  # of other rows: single ones are asked
    rows: list[int] = []
    for k in (k for k, same in enumerate(ranges) if not same and k * RANGE < common):
        of_range = range(k * RANGE, min((k + 1) * RANGE, common))
        single = same_rows(k, one, other, common, counted)
        if single is not None:
            rows += [row for row, same in zip(of_range, single, strict=True) if not same]
        elif before != now and len(of_range) < RANGE:
            found.unread.append(f"{_runs(of_range)} of {name}, where rows were added")
        else:
            rows += of_range
    lines = [_in_words(rows, common, name)] if rows else []
    if before > now:
        lines.append(f"{name} has {now} rows, {before} were there: {before - now} tokens are missing")
    elif now > before and not rows:
        found.added.append(f"{name} has {now - before} rows more than the {before} that were there, which are equal")
    return lines


def _in_words(rows: Sequence[int], common: int, name: str) -> str:
    if len(rows) == common:
        return f"all {common} rows of {name} differ"
    line = f"{_runs(rows)} of the {common} of {name} differ, the others are equal"
    if max(rows) < common - 1:
        return line
    return line + (
        " (rows that are added for new tokens are random: save the base with them once, train on that folder and load "
        "the delta there)"
    )


def _runs(rows: Sequence[int]) -> str:
    """Row numbers in words: "rows 3, 5 to 9"."""
    runs = [[row for _, row in run] for _, run in groupby(enumerate(rows), lambda pair: pair[1] - pair[0])]
    words = [f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return f"row{'s' if len(rows) > 1 else ''} {some(words)}"
