"""Rows from any source, every bad one named at once, and the share that is held out."""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spectune.data.mixing import Source, sources_in
from spectune.data.problem import RowProblem
from spectune.data.reading import Bad, records
from spectune.data.reading.limits import BAD_ROWS
from spectune.data.reading.raw_records import NAMES
from spectune.data.row_labels import CAUSAL_LM, label_problems, task_type_of
from spectune.data.shapes import EXPECTED, Row, row_of
from spectune.errors import ConfigError, DataError, some

#: the default share of the rows that is held out for validation
HELD_OUT = 0.1
_LISTED = 50
#: bad rows for each good one: with more of them, and many in all, a file is no data
_BAD_SHARE = 9


class Rows(list[Row]):
    """Rows, and what was left out under `--skip-bad-rows`.

    Attributes:
        skip_bad_rows: what cannot be encoded is to be left out, too.
        weights: of several sources, by their names, how often an epoch of training has each row.
    """

    def __init__(
        self, rows: list[Row], skipped: list[str], *, skip_bad_rows: bool = False,
        weights: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(rows)
        self.skipped, self.skip_bad_rows, self.weights = skipped, skip_bad_rows, dict(weights or {})


def load_rows(
    source: Any, *, skip_bad_rows: bool = False, columns: Mapping[str, str | None] | None = None,
    delimiter: str | None = None, encoding: str | None = None,
) -> Rows:  # fmt: skip
    """The rows of a file, a list of dicts, a list of `Row`, a data frame, a `datasets` object, a hub data set
    (`name:split`), or several of these as a list of `Source`.

    Args:
        skip_bad_rows: leave bad rows out; they are counted in the result's `skipped` and in the data report.
        columns: names of the source's columns by the key that they are taken for, `{"prompt": "question"}`; None for a
            key that is to be ignored. Where a row has several shapes, the one that is named here is taken.
        delimiter, encoding: of CSV files; found where they are not given.

    Raises:
        ConfigError: `columns` renames to a key that means nothing in a row.
        DataError: the source cannot be read or is empty, or (all at once, `file:line` each) rows are bad.
    """
    if isinstance(source, Rows):
        return source
    if _are_rows(source):
        return Rows(source, [])
    renamed = _checked(columns or {})
    how = _How(renamed, delimiter, encoding)
    if sources := sources_in(source):
        return _mixed(sources, skip_bad_rows, how)
    rows, problems = how.read(source, skip_bad_rows=skip_bad_rows)
    named = source if isinstance(source, str) or hasattr(source, "__fspath__") else "the data"
    if problems and not skip_bad_rows:
        raise bad_rows(str(named), problems + _labels_wrong(rows), len(rows) + len(problems))
    if not rows:
        raise _no_rows(named, problems)
    return Rows(rows, problems, skip_bad_rows=skip_bad_rows)


def _are_rows(source: Any) -> bool:
    return isinstance(source, list) and bool(source) and all(isinstance(row, Row) for row in source)


@dataclasses.dataclass(frozen=True)
class _How:
    """How the records of a source become rows."""

    columns: Mapping[str, str | None]
    delimiter: str | None
    encoding: str | None

    def read(self, source: Any, *, skip_bad_rows: bool = False) -> tuple[list[Row], list[str]]:
        """The good rows, and what is wrong with each of the others. Raises DataError: so many are bad that this is no
        data."""
        rows, problems = list[Row](), list[str]()
        if isinstance(source, Rows):
            return list(source), source.skipped
        if _are_rows(source):
            return source, []
        known = {theirs: ours for ours, theirs in self.columns.items() if theirs is not None}
        for origin, record in records(source, delimiter=self.delimiter, encoding=self.encoding, known=known):
            try:
                if isinstance(record, Bad):
                    raise RowProblem(record)
                rows.append(row_of(origin, _renamed(record, self.columns), tuple(self.columns)))
            except RowProblem as problem:
                problems.append(f"{origin}: {problem}")
                if len(problems) > BAD_ROWS and not (skip_bad_rows and len(problems) <= _BAD_SHARE * len(rows)):
                    count = len(rows) + len(problems)
                    raise bad_rows(f"{source} (read up to here)", problems, count) from None
        return rows, problems


def _mixed(sources: Sequence[Source], skip_bad_rows: bool, how: _How) -> Rows:
    """The rows of all sources, one source after the other. Raises DataError: the bad rows of all, or a source without
    rows."""
    rows, problems = list[Row](), list[str]()
    for source in sources:
        found, wrong = how.read(source.data, skip_bad_rows=skip_bad_rows)
        if not found and (skip_bad_rows or not wrong):
            raise _no_rows(source.data if isinstance(source.data, str | Path) else source.label, wrong)
        rows += [dataclasses.replace(row, source=source.name) for row in found]
        problems += wrong
    if problems and not skip_bad_rows:
        raise bad_rows(", ".join(source.label for source in sources), problems, len(rows) + len(problems))
    weights = {source.label: source.weight for source in sources}
    return Rows(rows, problems, skip_bad_rows=skip_bad_rows, weights=weights)


def _labels_wrong(rows: Sequence[Row]) -> list[str]:
    """What else is wrong with rows for a head, to be said with what cannot be read."""
    task_type = task_type_of(rows)
    return [] if task_type == CAUSAL_LM else list(label_problems(rows, task_type).values())


def _no_rows(named: Any, problems: Sequence[str]) -> DataError:
    return DataError(f"{named}: no rows; {EXPECTED} in each", list(problems[:_LISTED]))


def bad_rows(named: str, problems: list[str], count: int) -> DataError:
    """The error that names bad rows, the first 50 of them, among `count`."""
    more = [f"... and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
    return DataError(
        f"{named}: {len(problems)} bad of {count} rows. Mend them, or leave them out with --skip-bad-rows (they are "
        "counted in the report).",
        problems[:_LISTED] + more,
    )


def _checked(columns: Mapping[str, str | None]) -> dict[str, str | None]:
    if unknown := [key for key in columns if key not in NAMES]:
        raise ConfigError(
            f"columns renames to {', '.join(unknown)}: expected the data's own names by what they are taken for, "
            f"such as prompt: question, with keys out of {', '.join(NAMES)}"
        )
    return dict(columns)


def _renamed(record: Mapping[str, Any], columns: Mapping[str, str | None]) -> Mapping[str, Any]:
    if not columns:
        return record
    missing = [theirs for theirs in columns.values() if theirs is not None and theirs not in record]
    if missing and not any(theirs in record for theirs in columns.values() if theirs is not None):
        raise RowProblem(f"has no column {missing[0]!r}, which columns names; it has {some([*map(str, record)])}")
    kept = {key: value for key, value in record.items() if key not in columns and key not in columns.values()}
    return kept | {ours: record[theirs] for ours, theirs in columns.items() if theirs is not None and theirs in record}


def split_rows(rows: list[Row], share: float = HELD_OUT, seed: int = 0) -> tuple[Rows, Rows]:
    """`(train, valid)`: a seeded `share` of the rows (at least one) held out; both keep the order of the rows. Raises
    DataError: fewer than two rows."""
    if len(rows) < 2:
        raise DataError(f"{len(rows)} row cannot be split into training and validation; give at least 2, or --valid")
    count = min(max(1, round(share * len(rows))), len(rows) - 1)
    held = set(random.Random(seed).sample(range(len(rows)), count))
    train, valid = ([row for i, row in enumerate(rows) if (i in held) is out] for out in (False, True))
    given = rows if isinstance(rows, Rows) else Rows([], [])
    skip = given.skip_bad_rows
    return (
        Rows(train, given.skipped, skip_bad_rows=skip, weights=given.weights),
        Rows(valid, [], skip_bad_rows=skip, weights=given.weights),
    )
