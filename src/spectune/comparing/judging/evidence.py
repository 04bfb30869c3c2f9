"""What the runs of a comparison left for the statistics: their rows' losses and metrics, and what each forgot."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from spectune.comparing.judging.statistics import Array, Score, bleu, chrf, ratio
from spectune.evaluation.label_scores import AGREEMENT, CLASS_METRICS, row_sums
from spectune.evaluation.row_line import check_row
from spectune.files.metadata import read_json, read_lines
from spectune.files.regular import inside
from spectune.results import ComparedRun, ComparisonResult
from spectune.results.arm_result import is_finite

#: corpus metrics by name: how their summed statistics become a score, and how many there are
CORPUS: dict[str, tuple[Score, int]] = {"bleu": (bleu, 10), "chrf": (chrf, 18)}
#: rows with the same prompt are one draw of the bootstrap where at least so many different prompts remain
MIN_UNITS = 30
#: numbers that the sums of a metric of classes may take, over all rows of a run
MOST_SUMS = 20_000_000


@dataclass(frozen=True)
class Evidence:
    """One measure of all arms: sums `[seeds, units, statistics]` for each, and the score that they give.

    A unit is what the bootstrap draws: a row, or all rows with the same prompt.
    """

    sums: dict[str, Array]
    score: Score
    rows: int
    units: int


@dataclass
class Findings:
    """What the runs left; `problems` are sentences on what was left out and why."""

    loss: Evidence | None = None
    metrics: dict[str, Evidence] = field(default_factory=dict)
    forgetting: Evidence | None = None
    base_loss: float | None = None
    problems: list[str] = field(default_factory=list)


def find_evidence(comparison: ComparisonResult, folder: Path) -> Findings:
    """Read what the comparison's runs point to under `folder`. What cannot be read is left out, and named."""
    found = Findings()
    runs = [run for run in comparison.runs if run.name]
    tables = {}
    for run in runs:
        if not run.rows_file:
            continue
        try:
            tables[_key(run)] = _read_rows(_place(folder, run.rows_file))
        except ValueError as error:
            found.problems.append(f"{_title(run)} is left out: {run.rows_file} cannot be used ({error}).")
    without = [run for run in runs if not run.rows_file] if tables else []
    found.problems += [f"{_title(run)} is left out: it was saved without a loss for each row." for run in without]
    tables = _same_rows(tables, {_key(run): _title(run) for run in runs}, found.problems)
    if tables:
        _fill(found, tables)
    try:
        found.base_loss = _mean_loss(_read_rows(_place(folder, "base/rows.jsonl")), tables)
    except ValueError:
        found.base_loss = None  # an older comparison has no such file
    found.forgetting = _forgetting(comparison, runs, folder, found.problems)
    return found


#: arm, and what tells its runs apart
Key = tuple[str, str]
Rows = dict[int, dict[str, Any]]
#: the sums of a row, None where it has none
Read = Callable[[dict[str, Any]], Sequence[float] | None]


def _read_rows(path: Path) -> Rows:
    """Row number -> its line. Raises ValueError where a loss is missing or not finite, or no token is counted."""
    rows: Rows = {}
    for place, row in read_lines(path):
        try:
            number = check_row(row).get("row")
        except ValueError as error:
            raise ValueError(f"line {place}: {error}") from error
        rows[place - 1 if number is None else number] = row
    for number, row in rows.items():
        if row.get("loss_sum") is None:
            raise ValueError(f"row {number} has the loss None; expected a finite number")
        if row.get("target_tokens") is None:
            raise ValueError(f"row {number} does not say how many target tokens it has")
    if not sum(row["target_tokens"] for row in rows.values()):
        raise ValueError("it has no target token")
    return rows


def _place(folder: Path, path: str) -> Path:
    """A path within a comparison's folder. Raises ValueError: it leads out of it."""
    if (found := inside(folder, path)) is None:
        raise ValueError("it is not in the comparison's folder")
    return found


def _same_rows(tables: dict[Key, Rows], titles: Mapping[Key, str], problems: list[str]) -> dict[Key, Rows]:
    """The runs that were judged on the rows that most runs were judged on; of as many, the larger set."""
    if not tables:
        return {}
    counted = Counter(frozenset(rows) for rows in tables.values())
    wanted = max(counted, key=lambda rows: (counted[rows], len(rows)))
    for key, rows in tables.items():
        if frozenset(rows) != wanted:
            problems.append(
                f"{titles[key]} is left out: it was judged on {len(rows):,} rows, the others on "
                f"{'other' if len(rows) == len(wanted) else f'{len(wanted):,}'} ones; only the same rows can be paired."
            )
    return {key: rows for key, rows in tables.items() if frozenset(rows) == wanted}


def _fill(found: Findings, tables: Mapping[Key, Rows]) -> None:
    """Loss and metrics, each over the rows that have it in every run: only the first rows are written out."""
    first = next(iter(tables.values()))
    units = _units(first, sorted(first))

    def evidence(score: Score, read: Read) -> Evidence | None:
        kept = [number for number in units if all(read(rows[number]) is not None for rows in tables.values())]
        if not kept:
            return None
        used, of_unit = np.unique([units[number] for number in kept], return_inverse=True)
        arms = defaultdict[str, list[Array]](list)
        for (arm, _), rows in tables.items():
            values = np.array([read(rows[number]) for number in kept], dtype=np.float64)
            arms[arm].append(np.zeros((len(used), values.shape[1])))
            np.add.at(arms[arm][-1], of_unit, values)
        return Evidence({arm: np.stack(seeds) for arm, seeds in arms.items()}, score, len(kept), len(used))

    def metric(name: str, score: Score, read: Read) -> None:
        if (measured := evidence(score, read)) is not None and measured.units >= 2:
            found.metrics[name] = measured

    found.loss = evidence(ratio, lambda row: (row["loss_sum"], row["target_tokens"]))
    names = {name: None for rows in tables.values() for row in rows.values() for name in row.get("metrics") or {}}
    for name in names:

        def value(row: dict[str, Any], name: str = name) -> tuple[float, float] | None:
            number = (row.get("metrics") or {}).get(name)
            return (float(number), 1.0) if number is not None and is_finite(number) else None

        metric(name, ratio, value)
    for name, (score, size) in CORPUS.items():

        def counts(row: dict[str, Any], name: str = name, size: int = size) -> Sequence[float] | None:
            sums = (row.get("statistics") or {}).get(name)
            return sums if isinstance(sums, list) and len(sums) == size and all(map(is_finite, sums)) else None

        metric(name, score, counts)
    for name, score in AGREEMENT.items():
        metric(name, score, _label_sums(name, tables))


def _label_sums(name: str, tables: Mapping[Key, Rows]) -> Read:
    """What a row adds to a metric of labels, with as many classes as any run had."""

    def given(row: dict[str, Any]) -> list[float] | None:
        sums = (row.get("statistics") or {}).get(name)
        return sums if isinstance(sums, list) and sums and all(map(is_finite, sums)) else None

    classes = 0
    if name in CLASS_METRICS:
        all_rows = (found for rows in tables.values() for row in rows.values() if (found := given(row)) is not None)
        classes = int(max((found[2] for found in all_rows), default=0))
        if classes * max(map(len, tables.values()), default=0) > MOST_SUMS:
            return lambda row: None

    def read(row: dict[str, Any]) -> Sequence[float] | None:
        return None if (sums := given(row)) is None else row_sums(name, sums, classes)

    return read


def _units(rows: Rows, numbers: Sequence[int]) -> dict[int, int]:
    """Row number -> its unit. Rows with the same prompt are answers to one question, and not independent."""
    names, unit_of = dict[Any, int](), {}
    for number in numbers:
        prompt = rows[number].get("prompt")
        unit_of[number] = names.setdefault(prompt if isinstance(prompt, str) and prompt else number, len(names))
    return unit_of if len(names) >= MIN_UNITS else {number: place for place, number in enumerate(numbers)}


def _forgetting(
    comparison: ComparisonResult, runs: Sequence[ComparedRun], folder: Path, problems: list[str]
) -> Evidence | None:
    """KL sums and tokens of the passages. Where the tokens are not on disk, every passage has the mean number."""
    lists = {
        (_key(run), _title(run)): run.forgetting_by_passage
        for run in runs
        if run.forgetting_by_passage is not None and all(map(is_finite, run.forgetting_by_passage))
    }
    if not lists:
        return None
    size = Counter(len(values) for values in lists.values()).most_common(1)[0][0]
    tokens = _tokens_of_passages(folder)
    if tokens is None:
        total, passages = comparison.data.retained_tokens, comparison.data.retained_passages
        tokens = [total / passages if total and passages else 1.0] * size
    if size < 2 or len(tokens) != size or not all(map(is_finite, tokens)) or not sum(tokens):
        return None
    arms = defaultdict[str, list[Array]](list)
    for ((arm, _), title), values in lists.items():
        if len(values) == size:
            arms[arm].append(np.column_stack([np.array(values, dtype=np.float64), tokens]))
        else:
            problems.append(f"{title} is left out of forgetting: {len(values)} passages, the others have {size}.")
    return Evidence({arm: np.stack(seeds) for arm, seeds in arms.items()}, ratio, size, size)


def _tokens_of_passages(folder: Path) -> list[int] | None:
    """As the comparison wrote them; None where it did not, or where they are damaged."""
    try:
        found = (read_json(_place(folder, "base/passages.json")) or {}).get("tokens")
    except ValueError:
        return None
    plain = isinstance(found, list) and all(type(count) is int and 0 <= count < 2**31 for count in found)
    return found if plain else None


def _mean_loss(rows: Rows, tables: Mapping[Key, Rows]) -> float | None:
    """The bare base's loss, where it was judged on the same rows."""
    if tables and set(next(iter(tables.values()))) != set(rows):
        return None
    tokens: float = sum(row["target_tokens"] for row in rows.values())
    return math.fsum(row["loss_sum"] for row in rows.values()) / tokens


def _key(run: ComparedRun) -> Key:
    return run.name, run.rows_file or str(run.seed)


def _title(run: ComparedRun) -> str:
    return f"{run.name} with seed {'?' if run.seed is None else run.seed}"
