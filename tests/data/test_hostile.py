"""Files as they are met: half characters, deep nesting, nulls, empty cells, documents longer than a window."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from spectune.data import Row, encode, load_rows, prompt_ids
from spectune.errors import ConfigError, DataError
from tests.support import make_rows, make_tokenizer

TOKENIZER = make_tokenizer()
GOOD = {"prompt": "p", "completion": "c"}


def problems(path: Path) -> list[str]:
    with pytest.raises(DataError) as caught:
        load_rows(path)
    return caught.value.problems


def csv(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "a.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("record", "key"),
    [
        ('{"prompt": "\\ud83d", "completion": "x"}', "prompt"),
        ('{"messages": [{"role": "assistant", "content": "\\udc00 "}]}', "messages"),
        ('{"prompt": "p", "completion": "x", "references": ["\\ud83d"]}', "references"),
    ],
)
def test_half_a_surrogate_pair_is_a_bad_row(tmp_path: Path, record: str, key: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + record + "\n")
    [problem] = problems(path)
    assert problem.startswith(f"{path}:2: {key} holds '\\ud")
    assert "expected Unicode text" in problem
    problem.encode()


def test_deep_nesting_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("[" * 100_000 + "\n" + '{"prompt": ' + "[" * 400 + "]" * 400 + "}\n" + '{"text": ' + "9" * 5000)
    found = problems(path)
    assert [line.split(": ")[0] for line in found] == [f"{path}:1", f"{path}:2", f"{path}:3"]
    assert "nested more than 100 levels" in found[1]
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"a\.json: JSON that cannot be read"):
        load_rows(tmp_path / "a.json")


def test_null_is_an_absent_key() -> None:
    """A `datasets.Dataset` and Parquet fill what a row lacks with it."""
    keys = ("text", "messages", "conversations", "label", "references", "choices", "instruction", "input", "output")
    [row] = load_rows([{**GOOD, **dict.fromkeys(keys)}])
    assert row == Row("row 1", "p", "c")
    filled: dict[str, Any] = {"prompt": None, "completion": None, "text": None}
    chat = [{"role": "user", "content": "u", "name": None}, {"role": "assistant", "content": "a", "name": None}]
    [row] = load_rows([{**filled, "messages": chat}])
    assert row.messages == [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    for record, expected in (
        ({"prompt": "p", "completion": None}, "completion is null"),
        ({"prompt": None, "completion": "c"}, "prompt is null"),
        ({"text": None}, "text is null"),
    ):
        with pytest.raises(DataError, match=expected):
            load_rows([record])


def test_empty_cells_of_a_csv(tmp_path: Path) -> None:
    [problem] = problems(csv(tmp_path, "prompt,completion", "p,c", "p,"))
    assert problem == f"{tmp_path / 'a.csv'}:3: completion is empty; expected text"
    [problem] = problems(csv(tmp_path, "prompt,completion", '"",""'))
    assert "completion is empty" in problem
    [problem] = problems(csv(tmp_path, "text,id", ",4"))
    assert "text is empty" in problem
    [row] = load_rows(csv(tmp_path, "prompt,completion", ",c"))
    assert (row.prompt, row.completion) == ("", "c")
    mixed = load_rows(csv(tmp_path, "prompt,completion,text", ",,a document", "p,c,"))
    assert [(row.prompt, row.text) for row in mixed] == [(None, "a document"), ("p", None)]


def test_a_csv_names_lines_after_blank_ones(tmp_path: Path) -> None:
    path = csv(tmp_path, "", "prompt,completion", "", "", '"p\nq",c', "", "only")
    assert problems(path) == [f"{path}:8: not 2 columns as in the header, but 1; expected prompt, completion"]
    assert [row.origin for row in load_rows(path, skip_bad_rows=True)] == [f"{path}:5"]


def test_lists_in_a_csv_are_json(tmp_path: Path) -> None:
    head = "prompt,completion,references,choices,label"
    [row, plain] = load_rows(csv(tmp_path, head, 'p,c,"[""c"", ""d""]","[""c"", ""e""]",c', "p,c,,,"))
    assert (row.references, row.choices, row.label) == (("c", "d"), ("c", "e"), "c")
    assert (plain.references, plain.choices, plain.label) == ((), (), None)
    [problem] = problems(csv(tmp_path, head, "p,c,c|d,,"))
    assert "references is 'c|d'; expected a list as JSON" in problem


def test_a_missing_file_suggests_data_only(tmp_path: Path) -> None:
    for name in ("nosuch.yaml", "nosuchs.csv", "nosuch.json5"):
        (tmp_path / name).write_text("")
    with pytest.raises(DataError) as caught:
        load_rows(tmp_path / "nosuch.jsonl")
    assert "did you mean" in str(caught.value)
    assert "nosuchs.csv" in str(caught.value)
    assert "yaml" not in str(caught.value)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("longest", [2, 5, 7, 60])
def test_a_long_text_is_split_into_windows_and_loses_nothing(bos: bool, longest: int) -> None:
    tokenizer = make_tokenizer(bos=bos)
    rows = load_rows([{"text": "The quick brown fox jumps over the lazy dog. " * 4}, {"text": "atom"}])
    whole = encode(rows[:1], tokenizer, max_length=10_000).examples[0].input_ids
    encoded = encode(rows, tokenizer, max_length=longest)
    windows = [example.input_ids for example in encoded.examples if example.row is rows[0]]
    assert max(map(len, windows)) <= longest
    assert windows[0] + [token for window in windows[1:] for token in window[1:]] == whole
    assert all(before[-1] == after[0] for before, after in itertools.pairwise(windows))
    report = encoded.report.to_dict()
    assert (report["rows"], report["kept"], report["cut"], report["tokens_lost"]) == (2, 2, 0, 0)
    assert report["examples"] == len(encoded.examples)
    assert report["rows_that_end_with_eos"] == 2
    assert {"origin": "row 1", "tokens": len(whole), "windows": len(windows)} in report["split_rows"]
    of_first = sum(example.target_tokens for example in encoded.examples if example.row is rows[0])
    assert of_first == len(whole) - 1


def test_a_summary_says_what_is_not_learned(tmp_path: Path) -> None:
    rows = load_rows(make_rows(4))
    assert encode(rows, TOKENIZER, max_length=200).report.summary("train") == ""
    (tmp_path / "a.jsonl").write_text(json.dumps(make_rows(1)[0]) + '\n{"text": "The quick brown fox"}\n{}\n')
    mixed = load_rows(tmp_path / "a.jsonl", skip_bad_rows=True)
    line = encode(mixed, TOKENIZER, max_length=4).report.summary("train")
    assert line.startswith("train: 1 of 3 rows cut to max_length (")
    assert "tokens lost); 1 long texts split into" in line
    assert line.count("1 bad rows left out") == 1


def test_a_chat_may_end_with_the_question() -> None:
    tokenizer = make_tokenizer(chat=True)
    asked = [{"role": "user", "content": "York ?"}]
    answered = Row("row", messages=[*asked, {"role": "assistant", "content": "It is."}])
    example = encode([answered], tokenizer, max_length=60).examples[0]
    ids = prompt_ids(Row("prompt", messages=asked), tokenizer)
    assert ids == prompt_ids(answered, tokenizer) == example.input_ids[: example.prompt_length]
    with pytest.raises(ConfigError, match="no chat template"):
        prompt_ids(Row("prompt", messages=asked), TOKENIZER)
