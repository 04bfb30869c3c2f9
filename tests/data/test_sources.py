"""Rows out of tables, objects and folders: plain Python values, one data set or a refusal that says what was given."""

from __future__ import annotations

import datetime
import decimal
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy
import pandas
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from spectune.data import load_rows
from spectune.data.reading.sources import records
from spectune.errors import DataError

ROWS = [{"prompt": "p", "completion": "c"}, {"prompt": "q", "completion": "d"}]
COLUMNS = {"prompt": ["p", "q"], "completion": ["c", "d"]}


def read(source: Any) -> list[Any]:
    return [record for _, record in records(source)]


def refusal(source: Any) -> str:
    with pytest.raises(DataError) as caught:
        list(records(source))
    return str(caught.value)


def write_lines(path: Path, rows: list[Any] = ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# -- tables ---------------------------------------------------------------------------------------------------------


def write_table(table: pyarrow.Table, path: Path) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=3)
    elif path.suffix == ".feather":
        pyarrow.feather.write_feather(table, str(path))
    else:
        new = pyarrow.ipc.new_stream if path.stem == "stream" else pyarrow.ipc.new_file
        with pyarrow.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    return path


TABLES = ["a.parquet", "a.arrow", "stream.arrow", "a.feather"]


@pytest.mark.parametrize("name", TABLES)
def test_columns_of_any_type_become_plain_python_values(tmp_path: Path, name: str) -> None:
    call = pyarrow.struct([("name", pyarrow.string()), ("arguments", pyarrow.struct([("a", pyarrow.int8())]))])
    message = pyarrow.struct([("role", pyarrow.large_string()), ("calls", pyarrow.list_(call))])
    moment = datetime.datetime(2024, 1, 2, 3, 4, 5)
    table = pyarrow.table(
        {
            "text": pyarrow.array(["a", "b", "a"]).dictionary_encode(),
            "messages": pyarrow.array(
                [[{"role": "user", "calls": None}], None, [{"calls": [{"name": "f"}, {"arguments": {"a": 3}}]}]],
                pyarrow.large_list(message),
            ),
            "price": pyarrow.array([decimal.Decimal("1.50"), None, None], pyarrow.decimal128(6, 2)),
            "at": pyarrow.array([moment, None, None], pyarrow.timestamp("ns")),
            "on": pyarrow.array([moment.date(), None, None]),
            "half": pyarrow.array([0.5, None, None], pyarrow.float32()),
            "nothing": pyarrow.nulls(3),
        }
    )
    first, second, third = read(write_table(table, tmp_path / name))
    assert first["messages"] == [{"role": "user"}]
    assert third["messages"] == [{"calls": [{"name": "f"}, {"arguments": {"a": 3}}]}]
    assert (second["text"], second["messages"], third["text"]) == ("b", None, "a")
    assert [first[key] for key in ("price", "at", "on", "half")] == [
        decimal.Decimal("1.50"),
        moment,
        moment.date(),
        0.5,
    ]
    assert type(first["at"]) is datetime.datetime
    assert read(table) == [first, second, third]


def test_a_map_is_an_object(tmp_path: Path) -> None:
    kwargs = pyarrow.array([[("a", "x"), ("b", None)], []], pyarrow.map_(pyarrow.string(), pyarrow.string()))
    table = pyarrow.table({"text": ["t", "u"], "chat_template_kwargs": kwargs})
    expected = [{"text": "t", "chat_template_kwargs": {"a": "x"}}, {"text": "u", "chat_template_kwargs": {}}]
    assert read(table) == read(write_table(table, tmp_path / "a.parquet")) == expected


@pytest.mark.parametrize("name", TABLES)
def test_a_table_s_rows_are_numbered_over_its_parts(tmp_path: Path, name: str) -> None:
    table = pyarrow.table({"text": [f"t{number}" for number in range(8)]})
    path = write_table(table, tmp_path / name)
    assert list(records(path)) == [(f"{path}:row {number + 1}", {"text": f"t{number}"}) for number in range(8)]
    empty = write_table(table.slice(0, 0), tmp_path / name)
    assert read(empty) == []
    with pytest.raises(DataError, match="no rows"):
        load_rows(empty)


@pytest.mark.parametrize("name", TABLES)
def test_a_damaged_table_or_two_columns_of_one_name_are_refused(tmp_path: Path, name: str) -> None:
    path = write_table(pyarrow.table({"text": ["a" * 500]}), tmp_path / name)
    whole = path.read_bytes()
    for damaged in (b"", b"no table", whole[: len(whole) // 2], whole[:-2] if name != "stream.arrow" else whole[:-20]):
        path.write_bytes(damaged)
        assert f"{path}: not a readable" in refusal(path)
    if name != "a.feather":  # cannot be written
        twice = pyarrow.Table.from_arrays([["a"], ["b"]], names=["text", "text"])
        assert "'text' is there more than once" in refusal(write_table(twice, path))


# -- objects --------------------------------------------------------------------------------------------------------


def stream() -> Iterator[dict[str, str]]:
    yield from ROWS


class Frame:
    """What is used of a DataFrame of polars."""

    def iter_rows(self, *, named: bool) -> Iterator[dict[str, str]]:
        assert named
        return stream()

    def to_dicts(self) -> list[dict[str, str]]:
        return ROWS


@pytest.mark.parametrize(
    "make",
    [
        lambda: ROWS,
        lambda: tuple(ROWS),
        stream,
        lambda: COLUMNS,
        lambda: {key: tuple(value) for key, value in COLUMNS.items()},
        lambda: {key: numpy.array(value) for key, value in COLUMNS.items()},
        lambda: pandas.DataFrame(COLUMNS),
        lambda: pandas.DataFrame(COLUMNS, index=["x", "x"]),
        lambda: Frame(),
        lambda: pyarrow.table(COLUMNS),
        lambda: pyarrow.table(COLUMNS).to_batches()[0],
        lambda: pyarrow.table(COLUMNS).to_reader(),
        lambda: datasets.Dataset.from_dict(COLUMNS),
        lambda: datasets.Dataset.from_dict(COLUMNS).with_format("numpy"),
        lambda: datasets.Dataset.from_dict(COLUMNS).to_iterable_dataset(),
        lambda: datasets.IterableDataset.from_generator(stream),
        lambda: datasets.DatasetDict(test=datasets.Dataset.from_dict(COLUMNS)),
        lambda: datasets.DatasetDict(
            test=datasets.Dataset.from_dict({"text": ["t"]}), train=datasets.Dataset.from_dict(COLUMNS)
        ),
        lambda: datasets.IterableDatasetDict(train=datasets.Dataset.from_dict(COLUMNS).to_iterable_dataset()),
    ],
)
def test_any_object_of_rows_gives_its_rows(make: Any) -> None:
    assert list(records(make())) == [(f"row {number}", row) for number, row in enumerate(ROWS, start=1)]


def test_what_numpy_and_pandas_hold_is_plain_and_what_they_miss_is_absent() -> None:
    chat = numpy.array([{"role": "user", "content": "u", "name": None}], dtype=object)
    row = {"messages": chat, "n": numpy.int64(3), "x": numpy.float64(0.5), "s": numpy.str_("s"), "l": numpy.arange(2)}
    [found] = read([row])
    assert found == {"messages": [{"role": "user", "content": "u"}], "n": 3, "x": 0.5, "s": "s", "l": [0, 1]}
    assert [type(found[key]) for key in ("n", "x", "s", "l")] == [int, float, str, list]
    frame = pandas.DataFrame(
        {
            "text": ["a", None],
            "other": [float("nan"), "b"],
            "words": pandas.array([pandas.NA, "w"], dtype="string"),
            "at": [pandas.Timestamp("2024-01-02"), pandas.NaT],
            "n": pandas.array([1, None], dtype="Int64"),
            "x": [0.5, None],
            "kind": pandas.Categorical(["k", None]),
        }
    )
    moment = datetime.datetime(2024, 1, 2)
    assert read(frame) == [
        {"text": "a", "other": None, "words": None, "at": moment, "n": 1, "x": 0.5, "kind": "k"},
        {"text": None, "other": "b", "words": "w", "at": None, "n": None, "x": None, "kind": None},
    ]
    assert type(read(frame)[0]["at"]) is datetime.datetime


def test_a_user_s_own_format_of_a_dataset_stays() -> None:
    given = datasets.Dataset.from_dict(COLUMNS)
    given.set_transform(lambda batch: {"text": [f"{text}!" for text in batch["prompt"]]})
    assert read(given) == [{"text": "p!"}, {"text": "q!"}]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (None, "got None"),
        (4, "got a int"),
        (b"rows", "got a bytes"),
        (ROWS[0], "got one dict, which is one row: give it in a list, [row]"),
        ({"messages": [{"role": "user", "content": "u"}]}, "one row: give it in a list"),
        ({"prompt": "p", "references": ["a"]}, "one row: give it in a list"),
        ({"a": 1}, "got one dict with a"),
        ({}, "got one dict with no keys"),
        ({"train": ROWS, "test": ROWS}, "several splits in one (train, test)"),
        ({"prompt": ["p"], "completion": ["c", "d"]}, "prompt has 1 values, completion has 2"),
        (pandas.Series(["a"]), "got a pandas.Series, which has no named columns"),
        (numpy.zeros(3), "got a numpy.ndarray, which has no named columns"),
        (pandas.DataFrame([["a", "b"]], columns=["text", "text"]), "'text' is there more than once"),
        (pyarrow.Table.from_arrays([["a"], ["b"]], names=["text", "text"]), "'text' is there more than once"),
        (datasets.DatasetDict(), "a DatasetDict without any split"),
        (
            datasets.DatasetDict(a=datasets.Dataset.from_dict(COLUMNS), b=datasets.Dataset.from_dict(COLUMNS)),
            "none of the splits a, b is train",
        ),
    ],
)
def test_what_holds_no_rows_is_refused_by_name(source: Any, expected: str) -> None:
    assert expected in refusal(source)


def test_an_open_file_is_refused_for_its_path(tmp_path: Path) -> None:
    with write_lines(tmp_path / "a.jsonl").open() as file:
        assert "give its path" in refusal(file)


# -- folders --------------------------------------------------------------------------------------------------------


def test_a_folder_that_datasets_saved_is_read_as_what_was_saved(tmp_path: Path) -> None:
    given = datasets.Dataset.from_dict(COLUMNS)
    for name, saved in (("one", given), ("many", datasets.DatasetDict(train=given, test=given.select([0])))):
        saved.save_to_disk(str(tmp_path / name))
        rows = [(f"{tmp_path / name}:row {number}", row) for number, row in enumerate(ROWS, start=1)]
        assert list(records(tmp_path / name)) == rows
    datasets.DatasetDict(a=given, b=given).save_to_disk(str(tmp_path / "unclear"))
    assert "none of the splits a, b is train" in refusal(tmp_path / "unclear")
    (tmp_path / "one" / "state.json").write_text("{")
    assert "no readable folder of datasets' save_to_disk" in refusal(tmp_path / "one")


def test_the_files_of_a_folder_are_read_by_name(tmp_path: Path) -> None:
    for name, row in (("b.jsonl", ROWS[1]), ("a.ndjson", ROWS[0])):
        write_lines(tmp_path / name, [row])
    for name in ("README.md", "LICENSE", ".hidden.csv", "_SUCCESS", "dataset_info.json", "notes.md"):
        (tmp_path / name).write_text("beside the data")
    expected = [(f"{tmp_path / 'a.ndjson'}:1", ROWS[0]), (f"{tmp_path / 'b.jsonl'}:1", ROWS[1])]
    assert list(records(tmp_path)) == list(records(str(tmp_path))) == expected


def test_the_parts_of_one_split_are_one_data_set(tmp_path: Path) -> None:
    for part, row in enumerate(ROWS):
        write_lines(tmp_path / f"train-{part:05}-of-00002.jsonl", [row])
    assert read(tmp_path) == ROWS


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], "is a folder without data files. It is empty."),
        (["README.md", "x.bin"], "is a folder without data files. It holds: README.md, x.bin."),
        (["a.jsonl", "x.bin"], "holds more than data files (x.bin)"),
        (["a.jsonl", "b.csv"], "files of several kinds (CSV, JSON lines)"),
        (["train.jsonl", "test.jsonl"], "several splits in it (test.jsonl, train.jsonl); name one file, such as "),
        (["my_train.jsonl", "my-valid.jsonl"], "several splits in it"),
        (["data.jsonl", "data.test.jsonl"], "several splits in it"),
        (["TrainSet.csv", "TestSet.csv"], "several splits in it"),
        (["trainset.csv", "evalset1.csv"], "several splits in it"),
        (["a.jsonl", "a.jsonl.gz"], "both packed and not (a.jsonl, a.jsonl.gz)"),
    ],
)
def test_a_folder_that_is_not_one_data_set_is_refused(tmp_path: Path, names: list[str], expected: str) -> None:
    for name in names:
        write_lines(tmp_path / name)
    assert expected in refusal(tmp_path)
    if "train.jsonl" in names:
        assert f"such as {tmp_path / 'train.jsonl'}" in refusal(tmp_path)


def test_words_that_hold_a_split_s_name_are_none(tmp_path: Path) -> None:
    for name in ("contest.jsonl", "training_data.jsonl", "developers.jsonl"):
        write_lines(tmp_path / name)
    assert "several splits" in refusal(tmp_path)
    (tmp_path / "training_data.jsonl").unlink()
    assert read(tmp_path) == [*ROWS, *ROWS]


# -- the hub --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name:test", ("owner/name", None, "test")),
        ("hub:name@main:test[:5]", ("name", "main", "test[:5]")),
    ],
)
def test_a_hub_name_says_data_set_configuration_and_split(
    monkeypatch: pytest.MonkeyPatch, name: str, asked: tuple[str, str | None, str]
) -> None:
    seen = []

    def load_dataset(path: str, config: str | None, *, split: str) -> datasets.Dataset:
        seen.append((path, config, split))
        return datasets.Dataset.from_dict(COLUMNS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(records(name)) == [(f"{name}:row {number}", row) for number, row in enumerate(ROWS, start=1)]
    assert seen == [asked]


def test_paths_that_are_no_strings_are_paths(tmp_path: Path) -> None:
    class Place:
        def __fspath__(self) -> str:
            return str(write_lines(tmp_path / "a.jsonl"))

    assert read(Place()) == ROWS
    assert "no such file (did you mean" in refusal(tmp_path / "b.jsonl")
    assert "no such file" in refusal(str(tmp_path / "c.jsonl.gz"))
    assert "no such file" in refusal(tmp_path / "nothing")
    for text in ("a" * 5000, "a/\0b", "some text\n" * 2):
        assert "is no file here" in refusal(text)
