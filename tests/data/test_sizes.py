"""A row, a line, a document and what is packed have a size: what is larger is refused by name, and never held."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from spectune.data import load_rows
from spectune.data.reading import data_sizes
from spectune.data.reading.csv_source import csv_records
from spectune.data.reading.json_source import json_lines_records, json_records
from spectune.data.reading.table_source import arrow_records, parquet_records
from spectune.data.reading.text_source import text_records
from spectune.errors import DataError

LONG = "x" * 300_000


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "text", "read", "line"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": "' + LONG, json_lines_records, 2),
        ("a.json", '[{"text": "a"},\n{"text": "' + LONG, json_records, 2),
        ("a.csv", "text,id\na,1\n" + LONG, csv_records, 3),
        ("a.csv", 'text,id\na,1\n"' + "xy\n" * 5000, csv_records, 3),
        ("a.csv", '"' + "xy\n" * 5000, csv_records, 1),
        ("a.txt", "a\n<|endoftext|>\n" + LONG, text_records, 3),
    ],
)
def test_what_is_longer_than_a_row_is_refused_with_its_line(
    tmp_path: Path, name: str, text: str, read: Callable[..., Any], line: int
) -> None:
    path = written(tmp_path / name, text)
    with pytest.raises(DataError) as caught:
        list(read(path, longest=100_000))
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert "100,000 characters" in str(caught.value)


def test_a_long_document_is_read_in_parts_that_end_where_a_line_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = "a\n<|endoftext|>\n" + "".join(f"{n:07}\n" for n in range(3000))
    path = written(tmp_path / "a.txt", text)
    found = [(origin, record["text"]) for origin, record in text_records(path, longest=100_000)]  # type: ignore[call-overload, index]
    assert found[0] == (f"{path}:1", "a")
    assert len(found) > 2
    assert "\n".join(part for _, part in found[1:]) + "\n" == text.partition("<|endoftext|>\n")[2]
    assert [origin for origin, part in found[1:]] == [f"{path}:{3 + int(part[:7])}" for _, part in found[1:]]
    assert caplog.text.count("is read in parts of that size") == 1


def test_a_file_without_an_end_is_not_read_to_it(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.csv"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(DataError, match=":1: a row of more than 8 MiB"):
            load_rows(tmp_path / name)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_what_becomes_a_hundred_times_as_much_is_refused(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (b'{"text": "' + b"a" * 4000 + b'"}\n') * 500
    pack = gzip.compress if suffix == "gz" else zstandard.ZstdCompressor().compress
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(pack(content))
    assert len(load_rows(tmp_path / f"a.jsonl.{suffix}")) == 500
    monkeypatch.setattr(data_sizes.check_unpacked, "__defaults__", (1 << 20,))
    with pytest.raises(DataError, match=r"that become more than 1 MiB, over 100 times as much"):
        load_rows(tmp_path / f"a.jsonl.{suffix}")


def test_a_packed_file_has_no_more_rows_than_it_has_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spectune.data.reading.file_source.ROWS", 300)
    for name, content in (("a.jsonl.gz", b'{"text":"a"}\n' * 301), ("b.jsonl.gz", b"\n" * 2_000_000)):
        (tmp_path / name).write_bytes(gzip.compress(content, 1))
    with pytest.raises(DataError, match="more than 300 rows"):
        load_rows(tmp_path / "a.jsonl.gz")
    with pytest.raises(DataError, match="empty lines"):
        load_rows(tmp_path / "b.jsonl.gz")


def test_a_window_that_takes_all_memory_is_refused(tmp_path: Path) -> None:
    options = zstandard.ZstdCompressionParameters(window_log=28)
    stream = zstandard.ZstdCompressor(compression_params=options).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(stream.compress(b'{"text": "a"}\n') + stream.flush())
    with pytest.raises(DataError, match="window of more than 128 MiB"):
        load_rows(tmp_path / "a.jsonl.zst")


def test_tables_are_not_larger_in_memory_than_a_row_and_a_batch_may_be(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    shared = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 3000, pyarrow.int32()), pyarrow.array(["x" * 9000])
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": shared}), path)
    assert len(list(parquet_records(path, longest=20_000))) == 3000
    with pytest.raises(DataError, match="row 1: a row of more than"):
        list(parquet_records(path, longest=5000))
    shared = pyarrow.DictionaryArray.from_arrays(shared.indices[:300], pyarrow.array(["x" * (1 << 20)]))
    pyarrow.parquet.write_table(pyarrow.table({"text": shared}), path, store_schema=False)
    with pytest.raises(
        DataError, match=r"takes more than 128 MiB at once|become more than"
    ):  # a process may have room to spare
        list(parquet_records(path, room=1 << 27))
    table = pyarrow.table(
        {"text": pyarrow.ListArray.from_arrays([0, 5_000_000], pyarrow.nulls(5_000_000, pyarrow.int8()))}
    )
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match="row 1: a row of more than"):
        list(arrow_records(tmp_path / "a.arrow"))


def test_an_arrow_file_whose_offsets_lead_elsewhere_is_refused(tmp_path: Path) -> None:
    """Reading it would end the process."""
    path = tmp_path / "a.arrow"
    table = pyarrow.table({"text": ["ab", "cd"]})
    with pyarrow.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    offsets, other = (b"".join(n.to_bytes(4, "little") for n in numbers) for numbers in ((0, 2, 4), (0, 1 << 30, 4)))
    assert offsets in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(offsets, other))
    with pytest.raises(DataError, match="not a readable Arrow file"):
        load_rows(path)


def test_pipes_devices_and_circles_are_refused_by_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to("/dev/zero")
    (tmp_path / "c.jsonl").symlink_to(tmp_path / "c.jsonl")
    for name, kind in (("a", "a pipe"), ("b", "a device"), ("c", "a link")):
        with pytest.raises(DataError, match=rf"{name}\.jsonl: {kind}"):
            load_rows(tmp_path / f"{name}.jsonl")
    with pytest.raises(DataError, match=r"/dev/zero: a device, expected a file"):
        load_rows("/dev/zero")


def test_many_columns_parts_and_bad_rows_have_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"c{number}" for number in range(data_sizes.COLUMNS + 1)]
    with pytest.raises(DataError, match=":1: 10,001 columns; expected at most 10,000"):
        load_rows(written(tmp_path / "a.csv", ",".join(["text", *names[1:]]) + "\n"))
    with pytest.raises(DataError, match=":1: has 10,001 keys; expected at most 10,000"):
        load_rows(written(tmp_path / "a.jsonl", str(dict.fromkeys(names, 1)).replace("'", '"')))
    with pytest.raises(DataError, match="more than 4,000,000 values"):
        load_rows(written(tmp_path / "b.jsonl", '{"text": [' + "1," * 4_000_001 + "1]}"))
    monkeypatch.setattr("spectune.data.loading.BAD_ROWS", 100)
    for skip in (False, True):
        with pytest.raises(DataError, match=r"read up to here\): 101 bad of 101 rows"):
            load_rows(written(tmp_path / "c.jsonl", "1\n" * 500), skip_bad_rows=skip)


def test_a_list_is_read_item_by_item_and_its_faults_are_named_where_they_are(tmp_path: Path) -> None:
    rows = [{"text": f"row {number} " + "é" * (number % 50)} for number in range(5000)]
    text = "[\n" + ",\n".join(str(row).replace("'", '"') for row in rows) + "\n]\n"
    assert [row.text for row in load_rows(written(tmp_path / "a.json", text))] == [row["text"] for row in rows]
    for broken, where in ((text[:-2], ":5002:"), (text[:-3] + ",]", ":50"), (text + "7", ":5003:")):
        with pytest.raises(DataError, match=rf"a\.json{where}.*malformed JSON at column"):
            load_rows(written(tmp_path / "a.json", broken))
