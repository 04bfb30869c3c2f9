"""JSON and JSON lines: one reading or a refusal, doubled keys named, nulls inside a record absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spectune.data.reading.sources import Bad, records
from spectune.errors import DataError

ROW = {"prompt": "p", "completion": "c"}
CHAT = {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}


def read(tmp_path: Path, content: Any, name: str = "a.json") -> list[Any]:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), newline="")
    return [record for _, record in records(path)]


def refusal(tmp_path: Path, content: Any, name: str = "a.json") -> str:
    with pytest.raises(DataError) as caught:
        read(tmp_path, content, name)
    return str(caught.value).removeprefix(f"{tmp_path}/")


# -- lines ----------------------------------------------------------------------------------------------------------


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    content = '{"text": "a\u2028b\u0085c\x1cd"}\r\n \r\n{"text": "e"}'
    for text in (content, "\ufeff" + content):
        assert read(tmp_path, text.replace("\x1c", "\\u001c"), "a.jsonl") == [
            {"text": "a\u2028b\u0085c\x1cd"},
            {"text": "e"},
        ]


def test_a_key_that_stands_twice_makes_a_bad_row(tmp_path: Path) -> None:
    lines = '{"text": "a", "text": "b"}\n{"messages": [{"role": "user", "role": "x"}]}\n{"text": "c"}\n'
    listed = "[" + ",".join(lines.splitlines()) + "]"
    for found in (read(tmp_path, lines, "a.jsonl"), read(tmp_path, listed)):
        first, second, third = found
        assert isinstance(first, Bad)
        assert "the key 'text' stands twice" in first
        assert isinstance(second, Bad)
        assert "the key 'role' stands twice" in second
        assert third == {"text": "c"}
    assert "the key 'data' stands twice" in refusal(tmp_path, '{"data": [{"text": "a"}], "data": []}')


def test_json_that_is_not_in_lines_is_said_to_be_so(tmp_path: Path) -> None:
    for row in (ROW, CHAT):
        assert "a.jsonl:1: an object over several lines" in refusal(tmp_path, json.dumps(row, indent=1), "a.jsonl")
        for indent in (None, 2):
            text = json.dumps([row, row], indent=indent).replace("}, {", "},\n{")
            assert "a.jsonl:1: a list over several lines" in refusal(tmp_path, text, "a.jsonl")
    [bad] = read(tmp_path, json.dumps([ROW]), "a.jsonl")
    assert bad == "a list, expected an object with keys (a file that is one list of objects is named .json)"


def test_a_line_that_breaks_off_is_one_bad_row(tmp_path: Path) -> None:
    found = read(tmp_path, '{"text": "a"}\n{\n{"text": "b"\n{"text": "c"}{"text": "d"}\n{"text": "e"}', "a.jsonl")
    assert [type(record) for record in found] == [dict, Bad, Bad, Bad, dict]
    assert "malformed JSON at column 14" in found[3]


def test_a_null_inside_a_record_is_an_absent_key_and_a_null_in_a_list_keeps_its_place(tmp_path: Path) -> None:
    row = {
        "messages": [{"role": "assistant", "content": None, "tool_calls": [{"f": {"a": None, "b": [None, 1]}}, None]}],
        "label": None,
    }
    expected = {"messages": [{"role": "assistant", "tool_calls": [{"f": {"b": [None, 1]}}, None]}], "label": None}
    assert read(tmp_path, row, "a.jsonl") == read(tmp_path, [row]) == [expected]
    assert [record for _, record in records([row])] == [expected]


# -- one text -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"data": [ROW, ROW]}, [ROW, ROW]),
        ({"version": 1, "tags": ["a"], "data": [ROW]}, [ROW]),
        ({"train": [ROW]}, [ROW]),
        ({"text": [ROW, CHAT]}, [ROW, CHAT]),
        ({"data": []}, []),
        ([], []),
        (ROW, [ROW]),
        ({**ROW, "tools": [{"type": "function"}], "references": ["c"]}, None),
        (CHAT, [CHAT]),
        ({**CHAT, "documents": [{"text": "t"}]}, None),
        ({"documents": [{"text": "t"}]}, [{"text": "t"}]),
        ({"conversations": [{"from": "human", "value": "u"}]}, None),
        ({"prompt": ["p", "p"], "completion": ["c", "c"]}, [ROW, ROW]),
        ({"prompt": ["p"], "completion": ["c"], "meta": [{"a": 1}]}, [{**ROW, "meta": {"a": 1}}]),
        ({"prompt": {"0": "p", "1": "p"}, "completion": {"0": "c", "1": "c"}}, [ROW, ROW]),
        ({"messages": [CHAT["messages"], CHAT["messages"]]}, [CHAT, CHAT]),
        ({"question": ["p"], "answer": ["c"]}, [{"question": "p", "answer": "c"}]),
    ],
)
def test_one_object_is_read_where_only_one_reading_is_right(
    tmp_path: Path, content: Any, expected: list[Any] | None
) -> None:
    assert read(tmp_path, content) == ([content] if expected is None else expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"train": [ROW], "test": [ROW]}, "several splits in one (train, test)"),
        ({"train": {"prompt": ["p"]}, "validation": {"prompt": ["p"]}}, "several splits in one (train, validation)"),
        ({"a": [ROW], "b": [ROW]}, "several lists of objects (a, b)"),
        ({"text": "about", "data": [ROW]}, "may be a row itself or hold rows"),
        ({"prompt": "p", "completion": ["c"]}, "may be a row itself or hold rows"),
        ({"prompt": ["p"], "data": [ROW]}, "columns (prompt) and rows (data)"),
        ({"prompt": ["p", "q"], "completion": ["c"]}, "prompt has 2 values, completion has 1"),
        ({"prompt": ["p"], "completion": None}, "prompt is a list, completion is null"),
        ({"prompt": {"0": "p"}, "completion": {"1": "c"}}, "not the same numbers of rows"),
        ({"prompt": {"a": "p"}}, "not the same numbers of rows"),
        ({"a": 1}, "expected a list of objects, got one object with a"),
        ({}, "got one object with no keys"),
        ({"0": ROW, "1": ROW}, "got one object with 0, 1"),
        (3, "expected a list of objects, got int"),
        ("null", "expected a list of objects, got NoneType"),
        ("", "the file is empty"),
        ("\ufeff", "the file is empty"),
        ('[{"text": "a"},]', "a.json:1: malformed JSON at column"),
        ('[{"text": "a"} // first\n]', "a.json:1: malformed JSON at column"),
        ('{"text": "a"}\n{"text": "b"}\n', "a.json:2: a second object; expected one list of objects. If the file has"),
    ],
)
def test_one_object_that_may_be_read_in_two_ways_or_none_is_refused(
    tmp_path: Path, content: Any, expected: str
) -> None:
    assert expected in refusal(tmp_path, content)


def test_an_element_that_is_no_object_is_one_bad_row(tmp_path: Path) -> None:
    for content in ([ROW, "x", ROW], {"data": [ROW, "x", ROW]}):
        assert read(tmp_path, content) == [ROW, Bad("a str, expected an object with keys"), ROW]
