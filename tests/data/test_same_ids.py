"""The same rows give the same ids and labels, whatever they are read from."""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from spectune.data import Encoded, collate, encode, load_rows
from tests.support.chat_templates import tokenizer_for

WORDS = (
    "Ada",
    "lives in",
    "York;",
    "né,",
    '"quoted"',
    "日本",
    "line\nend",
    "line\r\nend",
    " spaced ",
    "🙂",
    "tab\t",
    "''",
    "\\n",
)
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "get_time", "arguments": {"city": "York"}}}
TOOLS = [
    {"type": "function", "function": {"name": "get_time", "description": "the time", "parameters": {"type": "object"}}}
]


def chats(count: int) -> list[dict[str, Any]]:
    """Chats of one to three turns, some with a system message, tools, a thought, or a turn that is not learned."""
    rng, found = random.Random(7), []

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 5))) + f" {rng.randint(0, 99)}"

    for number in range(count):
        messages: list[dict[str, Any]] = []
        if rng.random() < 0.3:
            messages.append({"role": "system", "content": text()})
        for _ in range(rng.randint(1, 3)):
            messages += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
        if rng.random() < 0.2:
            messages[-1]["weight"] = 1
            messages[1 + (messages[0]["role"] == "system")]["weight"] = 0 if len(messages) > 3 else 1
        row: dict[str, Any] = {"messages": messages, "id": number}
        if rng.random() < 0.3:
            called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
            result = {"role": "tool", "content": text(), "tool_call_id": "abcdefghi"}
            row["messages"] = [*messages[:-1], called, result, messages[-1]]
            row["tools"] = TOOLS
        found.append(row)
    return found


def completions(count: int) -> list[dict[str, Any]]:
    rng = random.Random(8)
    return [
        {"prompt": " ".join(rng.choices(WORDS, k=3)), "completion": " " + " ".join(rng.choices(WORDS, k=2)),
         "references": [rng.choice(WORDS), "another"], "number": number}
        for number in range(count)
    ]  # fmt: skip


def jsonl(rows: list[dict[str, Any]], folder: Path) -> Any:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def packed(rows: list[dict[str, Any]], folder: Path) -> Any:
    path = folder / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl(rows, folder).read_bytes()))
    return path


def in_json(rows: list[dict[str, Any]], folder: Path) -> Any:
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def in_csv(rows: list[dict[str, Any]], folder: Path) -> Any:
    path = folder / "rows.csv"
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for row in rows:
            cells = (row.get(name, "") for name in names)
            writer.writerow([json.dumps(cell) if isinstance(cell, list) else cell for cell in cells])
    return path


def table(rows: list[dict[str, Any]]) -> Any:
    """Arrow's own: what a row lacks is null, and every message has all keys."""
    return pyarrow.Table.from_pylist(rows)


def parquet(rows: list[dict[str, Any]], folder: Path) -> Any:
    pyarrow.parquet.write_table(table(rows), folder / "rows.parquet", row_group_size=37)
    return folder / "rows.parquet"


def arrow(rows: list[dict[str, Any]], folder: Path) -> Any:
    pyarrow.feather.write_feather(table(rows), str(folder / "rows.arrow"))
    return folder / "rows.arrow"


def data_frame(rows: list[dict[str, Any]], folder: Path) -> Any:
    return pandas.DataFrame(rows)


def dataset_dict(rows: list[dict[str, Any]], folder: Path) -> Any:
    return datasets.DatasetDict({"train": datasets.Dataset(table(rows))})


def saved_dataset(rows: list[dict[str, Any]], folder: Path) -> Any:
    datasets.Dataset(table(rows)).save_to_disk(str(folder / "saved"))
    return folder / "saved"


FORMATS: list[Callable[[list[dict[str, Any]], Path], Any]] = [
    jsonl, packed, in_json, in_csv, parquet, arrow, data_frame, dataset_dict, saved_dataset,
]  # fmt: skip


def encoded(source: Any) -> Encoded:
    return encode(load_rows(source), tokenizer_for("hermes", "byte_level"), max_length=4096)


def same(found: Encoded, expected: Encoded) -> bool:
    ours, theirs = ([collate([example], 0) for example in one.examples] for one in (found, expected))
    assert len(ours) == len(theirs)
    return all(bool((a[key] == b[key]).all()) for a, b in zip(ours, theirs, strict=True) for key in a)


@pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__)
def test_500_rows_have_the_same_ids_and_labels_in_any_format(
    write: Callable[[list[dict[str, Any]], Path], Any], tmp_path: Path
) -> None:
    for rows in (chats(250), completions(250)):
        expected = encoded(rows)
        assert expected.report.kept == 250
        found = encoded(write(rows, tmp_path))
        assert found.sha256 == expected.sha256
        assert same(found, expected)
        assert [example.row.references for example in found.examples] == [
            example.row.references for example in expected.examples
        ]


def test_sharegpt_is_the_same_conversation() -> None:
    rows = [row for row in chats(300) if "tools" not in row]
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    other = [
        {"conversations": [{"from": names[m["role"]], "value": m["content"], **{k: m[k] for k in m if k == "weight"}}
                           for m in row["messages"]]}
        for row in rows
    ]  # fmt: skip
    assert encoded(other).sha256 == encoded(rows).sha256
