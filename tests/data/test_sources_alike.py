"""The same rows in any format are the same records."""

from __future__ import annotations

import csv
import gzip
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from spectune.data.reading.sources import records

LISTS = ("references", "choices", "messages")
#: half a surrogate pair is no text, and no table takes it
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.lists(
    st.sampled_from(
        ["\n", "\r\n", "\r", '"', ",", ";", "\t", "\u2028", "\x00", "\ufeff", "é", "🙂", " ", "null", "NaN"]
    ),
    max_size=5,
).map("".join)
WORDS = st.lists(TEXT, min_size=1, max_size=3)


def maybe(value: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | value


PAIRS = st.fixed_dictionaries(
    {"prompt": TEXT, "completion": TEXT.filter(bool)},
    optional={
        "references": maybe(WORDS),
        "choices": maybe(WORDS),
        "label": maybe(TEXT),
        "number": maybe(st.integers(-(2**53), 2**53)),
        "share": maybe(st.floats(allow_nan=False, allow_infinity=False)),
        "meta": maybe(st.fixed_dictionaries({"a": maybe(TEXT), "b": maybe(st.lists(maybe(st.booleans())))})),
    },
)
CALL = st.fixed_dictionaries(
    {
        "function": st.fixed_dictionaries(
            {
                "name": TEXT,
                "arguments": st.fixed_dictionaries(
                    {}, optional={"x": maybe(TEXT), "y": maybe(st.integers(-9, 9))}
                ).filter(bool),
            }
        )
    }
)
CHATS = st.fixed_dictionaries(
    {
        "messages": st.lists(
            st.fixed_dictionaries(
                {"role": st.sampled_from(["user", "assistant", "tool"]), "content": maybe(TEXT)},
                optional={"tool_calls": maybe(st.lists(CALL, max_size=2)), "name": maybe(TEXT)},
            ),
            min_size=1,
            max_size=3,
        )
    },
    optional={"source": maybe(TEXT)},
)  # fmt: skip
ROWS = st.lists(PAIRS, min_size=1, max_size=4) | st.lists(CHATS, min_size=1, max_size=4)


def without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def sources(rows: list[dict[str, Any]], folder: Path) -> Iterator[Any]:
    """The rows in each format that has types, in which equal records are expected."""
    lines = "".join(json.dumps(row, ensure_ascii=len(rows) % 2 == 0) + "\n" for row in rows).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    (folder / "a.json").write_text(json.dumps(rows))
    (folder / "b.json").write_text(json.dumps({"version": 1, "data": rows}))
    table = pyarrow.Table.from_pylist(rows, schema_of(rows))
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    with pyarrow.OSFile(str(folder / "a.arrow"), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    yield from sorted(folder.iterdir())
    dataset = datasets.Dataset(table)
    dataset.save_to_disk(str(folder / "saved"))
    yield from (rows, iter(rows), table, pandas.DataFrame(rows), dataset, datasets.DatasetDict(train=dataset))
    yield folder / "saved"


def schema_of(rows: list[dict[str, Any]]) -> pyarrow.Schema:
    """Of all the rows' keys, not of the first one's alone."""
    return pyarrow.unify_schemas(
        [pyarrow.Table.from_pylist([row]).schema for row in rows], promote_options="permissive"
    )


@settings(derandomize=True, deadline=None, max_examples=25)
@given(ROWS)
def test_the_same_rows_in_any_format_with_types_are_equal_records(rows: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for source in sources(rows, Path(folder)):
            found = [without_top_level_nulls(record) for _, record in records(source)]
            assert found == without_nulls(rows), source


def without_top_level_nulls(record: Any) -> dict[str, Any]:
    """Only those: what is nested, the reader has to do."""
    return {key: value for key, value in record.items() if value is not None}


@settings(derandomize=True, deadline=None, max_examples=40)
@given(ROWS)
def test_the_same_rows_in_a_csv_are_equal_in_what_makes_a_row(rows: list[dict[str, Any]]) -> None:
    """A CSV has no types, so further columns are text; a list is JSON in its cell."""
    shapes = [name for name in ("prompt", "completion", *LISTS, "label") if any(name in row for row in rows)]
    expected = [
        {key: value for key, value in without_nulls(row).items() if key in shapes and (value != "" or key == "prompt")}
        for row in rows
    ]
    cells = [[json.dumps(row[key]) if key in LISTS and key in row else row.get(key) for key in shapes] for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        for suffix, delimiter in ((".csv", ","), (".csv", ";"), (".tsv", "\t")):
            path = Path(folder) / f"a{suffix}"
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file, delimiter=delimiter).writerows([shapes, *cells])
            (Path(folder) / f"a{suffix}.gz").write_bytes(gzip.compress(path.read_bytes()))
            for source in (path, Path(folder) / f"a{suffix}.gz"):
                assert [record for _, record in records(source)] == expected
