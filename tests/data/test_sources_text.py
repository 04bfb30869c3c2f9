"""Text out of files: encodings told or found, packed files, damaged streams, documents, one piece at a time."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from spectune.data.reading.sources import records
from spectune.errors import DataError

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".zstd": zstandard.compress,
}
TEXT = {
    "a.jsonl": '{"text": "é one"}\n{"text": "two 日"}\n',
    "a.ndjson": '{"text": "é one"}\n{"text": "two 日"}\n',
    "a.json": '[{"text": "é one"},\n{"text": "two 日"}]',
    "a.csv": "text\né one\ntwo 日\n",
    "a.tsv": "text\né one\ntwo 日\n",
    "a.txt": "é one\n<|endoftext|>\ntwo 日\n",
    "a.md": "é one\n<|endoftext|>\ntwo 日\n",
}
ROWS = [{"text": "é one"}, {"text": "two 日"}]


def read(tmp_path: Path, content: bytes, name: str, **given: Any) -> list[Any]:
    path = tmp_path / name
    path.write_bytes(content)
    return [record for _, record in records(path, **given)]


def refusal(tmp_path: Path, content: bytes, name: str, **given: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(tmp_path, content, name, **given)
    assert str(tmp_path / name) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("suffix", ["", *PACKERS])
def test_any_text_format_may_be_packed_and_in_any_encoding_that_has_a_mark(
    tmp_path: Path, name: str, suffix: str
) -> None:
    pack = PACKERS.get(suffix, bytes)
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        assert read(tmp_path, pack(TEXT[name].encode(encoding)), name + suffix) == ROWS
        assert read(tmp_path, pack(TEXT[name].encode(encoding)), name + suffix, encoding=encoding) == ROWS
    big_endian = ("\ufeff" + TEXT[name]).encode("utf-16-be")
    assert read(tmp_path, pack(big_endian), (name + suffix).upper()) == ROWS
    assert read(tmp_path, pack(TEXT[name].encode("gb18030")), name + suffix, encoding="gb18030") == ROWS


@pytest.mark.parametrize("suffix", ["", *PACKERS])
def test_a_wrong_byte_is_named_by_line_and_place(tmp_path: Path, suffix: str) -> None:
    pack = PACKERS.get(suffix, bytes)
    latin = '{"text": "a"}\n{"text": "é"}\n'.encode("latin-1")
    told = refusal(tmp_path, pack(latin), "a.jsonl" + suffix)
    assert f"a.jsonl{suffix}:2: byte 24 is not UTF-8" in told
    assert "give the `encoding`" in told
    assert read(tmp_path, pack(latin), "a.jsonl" + suffix, encoding="latin-1") == [{"text": "a"}, {"text": "é"}]
    assert ":1: byte 10 is not ascii" in refusal(
        tmp_path, pack('{"text": "é"}'.encode()), "a.jsonl" + suffix, encoding="ascii"
    )
    # far behind the first piece that is read, and where a character breaks off with the file
    long = b"text\n" + b"one two three\n" * 20_000
    assert f":20002: byte {len(long) + 1} is not UTF-8" in refusal(tmp_path, pack(long + b"a\xff\n"), "b.csv" + suffix)
    assert f":20002: byte {len(long)} is not UTF-8" in refusal(tmp_path, pack(long + b"\xe6\x97"), "b.csv" + suffix)


def test_utf_16_without_its_mark_is_never_read_as_utf_8(tmp_path: Path) -> None:
    for encoding in ("utf-16-le", "utf-16-be"):
        content = TEXT["a.txt"].encode(encoding)
        assert f"give encoding='{encoding}'" in refusal(tmp_path, content, "a.txt")
        assert read(tmp_path, content, "a.txt", encoding=encoding) == ROWS


def test_an_unknown_encoding_is_refused(tmp_path: Path) -> None:
    for encoding in ("utf-88", "base64", "rot13"):
        assert f"unknown encoding '{encoding}'" in refusal(tmp_path, b"a", "a.txt", encoding=encoding)


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_a_damaged_packed_file_is_one_error(tmp_path: Path, suffix: str, name: str) -> None:
    whole = PACKERS[suffix](TEXT[name].encode() * 50)
    for damaged in (whole[:-3], whole[: len(whole) // 2], whole[:5], b"no archive at all", whole + b"more"):
        assert "damaged" in refusal(tmp_path, damaged, name + suffix)


@pytest.mark.parametrize("suffix", PACKERS)
def test_packed_parts_behind_each_other_are_one_file(tmp_path: Path, suffix: str) -> None:
    lines = TEXT["a.jsonl"].encode().splitlines(keepends=True)
    assert read(tmp_path, b"".join(map(PACKERS[suffix], lines)), "a.jsonl" + suffix) == ROWS
    assert read(tmp_path, b"", "a.jsonl" + suffix) == []


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt"])
def test_the_first_records_come_before_the_rest_is_read(tmp_path: Path, suffix: str, name: str) -> None:
    one = "{0:x} ".format
    row = {
        "a.jsonl": lambda n: json.dumps({"text": one(n * n)}) + "\n",
        "a.csv": lambda n: one(n * n) + "\n",
        "a.txt": lambda n: one(n * n) + "\n<|endoftext|>\n",
    }[name]
    content = ("text\n" if name == "a.csv" else "") + "".join(map(row, range(40_000)))
    path = tmp_path / (name + suffix)
    path.write_bytes(PACKERS[suffix](content.encode())[:-9])
    found = records(path)
    assert [next(found)[1]["text"] for _ in range(3)] == ["0 ", "1 ", "4 "]  # type: ignore[index]
    with pytest.raises(DataError, match="damaged"):
        list(found)


def test_a_file_that_is_something_else_is_said_to_be_so(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    parquet = (tmp_path / "a.parquet").read_bytes()
    assert "packed by gzip: name it so (.gz)" in refusal(tmp_path, gzip.compress(b"a"), "a.jsonl")
    assert "packed by zstd" in refusal(tmp_path, zstandard.compress(b"a"), "a.csv")
    assert "a Parquet file" in refusal(tmp_path, parquet, "a.csv")
    assert "Parquet is packed in itself" in refusal(tmp_path, gzip.compress(parquet), "a.parquet.gz")
    assert "unknown kind of file '.bin.gz'" in refusal(tmp_path, b"", "a.bin.gz")
    assert "unknown kind of file '.gz'" in refusal(tmp_path, b"", "a.gz")


def test_documents_are_the_same_with_any_line_ends(tmp_path: Path) -> None:
    for end in ("\n", "\r\n", "\r\r\n"):
        content = f"one{end}{end}two{end} <|endoftext|> {end}{end}<|endoftext|>{end}three{end}"
        path = tmp_path / "a.txt"
        path.write_bytes(content.encode())
        found = list(records(path))
        assert [record for _, record in found] == [{"text": "one\n\ntwo"}, {"text": "three"}]
        assert [origin for origin, _ in found] == [f"{path}:1", f"{path}:7"]
    assert read(tmp_path, b"a\rb\r", "a.txt") == [{"text": "a\rb"}]
    assert read(tmp_path, b" \r\n", "a.txt") == read(tmp_path, b"", "a.txt") == []
