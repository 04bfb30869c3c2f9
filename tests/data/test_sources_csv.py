"""CSV as it is met: huge cells, quotes that are never closed, other delimiters, headers that say too little."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectune.data import load_rows
from spectune.data.reading.sources import Bad, records
from spectune.errors import DataError

HEAD = "prompt,completion\n"


def write(tmp_path: Path, content: str | bytes, name: str = "a.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(tmp_path: Path, content: str | bytes, name: str = "a.csv", **given: Any) -> list[Any]:
    """The records by line; what is wrong with a bad one in its place."""
    path = write(tmp_path, content, name)
    return [(origin.removeprefix(f"{path}:"), record) for origin, record in records(path, **given)]


def refusal(tmp_path: Path, content: str | bytes, name: str = "a.csv", **given: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(tmp_path, content, name, **given)
    return str(caught.value)


def pair(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


@pytest.mark.parametrize("quote", ['"', ""])
def test_a_cell_may_be_of_any_size(tmp_path: Path, quote: str) -> None:
    limit = csv.field_size_limit()
    cell = "word, and more\n" * 12_000 if quote else "word and more " * 12_000
    path = write(tmp_path, f"{HEAD}short,a\n{quote}{cell}{quote},yes\nshort,b\n")
    rows = load_rows(path, skip_bad_rows=True)
    assert [(row.prompt, row.completion) for row in rows] == [("short", "a"), (cell, "yes"), ("short", "b")]
    assert rows.skipped == []
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("row", ['a,"b', '"a,b', 'a,"b""', 'a,"b\nc""d', '"'])
@pytest.mark.parametrize("rest", ["", "\n", "\nx,y" * 200 + "\n", "\r\nx,y\r\n"])
def test_a_quote_that_is_never_closed_is_named_by_its_line_and_never_skipped(
    tmp_path: Path, row: str, rest: str
) -> None:
    path = write(tmp_path, HEAD + "p,c\n" + row + rest)
    for skip in (False, True):
        with pytest.raises(DataError, match=r"a\.csv:3: a quote opens a cell and is never closed"):
            load_rows(path, skip_bad_rows=skip)
    assert "a.csv:1: a quote opens" in refusal(tmp_path, '"prompt,completion\np,c\n')


def test_the_line_of_a_quote_is_that_of_its_cell(tmp_path: Path) -> None:
    assert "a.csv:4: a quote opens" in refusal(tmp_path, HEAD + 'p,c\n"one\ntwo","three\nfour\n')


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ('a,b "c" d', "a quote inside the cell 'b \"c\" d'"),
        ('a, "b"', "a quote inside the cell ' \"b\"'"),
        ('a,5" pipe', "a quote inside the cell"),
        ('a,"b"c', "'c' in line 2 stands behind the closing quote"),
        ('a,"b" ', "' ' in line 2 stands behind the closing quote;"),
        ('"a"b,c', "'b' in line 2 stands behind the closing quote"),
        ('a,"x\ny"b', "'b' in line 3 stands behind the closing quote of the cell that opens in line 2"),
    ],
)
def test_quotes_that_no_standard_allows_make_a_bad_row_and_leave_the_next_alone(
    tmp_path: Path, row: str, expected: str
) -> None:
    for end in ("\n", "\r\n"):
        (line, bad), after = read(tmp_path, HEAD + row + end + "p,c" + end)
        assert line == "2"
        assert isinstance(bad, Bad)
        assert expected in bad
        assert after[1] == pair("p", "c")


def test_the_inside_of_a_malformed_row_never_becomes_rows(tmp_path: Path) -> None:
    found = read(tmp_path, HEAD + '"a"b,"c\nx,y\nd"\np,c\n')
    assert [(line, type(record)) for line, record in found] == [("2", Bad), ("5", dict)]


@pytest.mark.parametrize(("delimiter", "name"), [(",", "a.csv"), (";", "a.csv"), ("\t", "a.tsv"), ("|", "a.csv")])
def test_the_delimiter_is_found_from_the_header_whatever_the_suffix(tmp_path: Path, delimiter: str, name: str) -> None:
    content = f'prompt{delimiter}completion{delimiter}note\n"a{delimiter}b"{delimiter}c, d; e{delimiter}\n'
    if delimiter in ",;":
        content = content.replace("c, d; e", '"c, d; e"')
    for suffix in (name, "b.csv", "b.tsv"):
        assert read(tmp_path, content, suffix) == [("2", pair(f"a{delimiter}b", "c, d; e"))]


def test_the_delimiter_may_be_told(tmp_path: Path) -> None:
    assert read(tmp_path, "prompt:completion\na,b:c\n", delimiter=":") == [("2", pair("a,b", "c"))]
    assert read(tmp_path, "prompt\tcompletion\na\tb\n", delimiter="\\t") == [("2", pair("a", "b"))]
    assert "expected one character" in refusal(tmp_path, HEAD, delimiter="::")
    told = refusal(tmp_path, "prompt;completion\na;b\n", delimiter=",")
    assert "a.csv:1: the header `prompt;completion` has no column that makes a row" in told
    assert "is the delimiter ';'?" in told
    assert "name the `delimiter`, or rename" in refusal(tmp_path, "prompt:completion\na:b\n")
    assert "may be delimited by ',' or ';'; give `delimiter`" in refusal(tmp_path, "prompt,completion;text\na,b\n")


def test_a_line_for_excel_tells_the_delimiter(tmp_path: Path) -> None:
    for end in ("\n", "\r\n"):
        assert read(tmp_path, f"sep=:{end}prompt:completion{end}a,b:c{end}") == [("3", pair("a,b", "c"))]
    assert read(tmp_path, "sep=;\n") == []


def test_a_file_of_one_column_needs_no_delimiter(tmp_path: Path) -> None:
    assert read(tmp_path, 'text\na; b\n"a, b"\n') == [("2", {"text": "a; b"}), ("3", {"text": "a, b"})]


def test_names_that_the_user_knows_make_a_header(tmp_path: Path) -> None:
    content = 'question;answer;refs\n;b;"[""b""]"\n'
    assert "has no column that makes a row" in refusal(tmp_path, content)
    assert read(tmp_path, content, known=["question", "answer"]) == [("2", {"answer": "b", "refs": '["b"]'})]
    meanings = {"question": "prompt", "answer": "completion", "refs": "references"}
    assert read(tmp_path, content, known=meanings) == [("2", {"question": "", "answer": "b", "refs": ["b"]})]


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("prompt,completion,prompt", "a.csv:1: the header has 'prompt' more than once"),
        ("prompt,completion,id,id", "the header has 'id' more than once"),
        (",prompt,completion", "no name for column 1"),
        ("prompt,completion,", "no name for column 3"),
        ("promt,completions", "did you mean 'prompt'?"),
        ("a,b", "has no column that makes a row"),
        ('"prompt"x,completion', "the header is malformed CSV"),
        ("prompt,completion\ra,b", "lone carriage return"),
    ],
)
def test_a_header_that_does_not_say_what_is_in_the_rows_is_refused(tmp_path: Path, header: str, expected: str) -> None:
    assert expected in refusal(tmp_path, f"{header}\nx,y,z\n")


@pytest.mark.parametrize(
    "content", ["", "\n", "\r\n\r\n", HEAD, HEAD.strip(), "\ufeff", "\ufeff" + HEAD, HEAD + "\n\n"]
)
def test_a_csv_without_rows_has_none(tmp_path: Path, content: str) -> None:
    assert read(tmp_path, content) == []
    with pytest.raises(DataError, match="no rows"):
        load_rows(write(tmp_path, content))


def test_rows_end_in_any_way_and_cells_keep_their_own_line_ends(tmp_path: Path) -> None:
    content = '\r\nprompt,completion\r\na,b\n\r\n"a\r\nb","c\rd"\r\nx\ry,z'
    expected = [("3", pair("a", "b")), ("5", pair("a\r\nb", "c\rd")), ("7", pair("x\ry", "z"))]
    assert read(tmp_path, content) == expected


def test_a_row_with_another_number_of_cells_is_bad(tmp_path: Path) -> None:
    found = read(tmp_path, HEAD + "a\na,b,c\na,b,\na,b\n")
    assert [type(record) for _, record in found] == [Bad, Bad, Bad, dict]
    assert found[1] == ("3", "not 2 columns as in the header, but 3; expected prompt, completion")


def test_a_header_in_the_middle_is_no_row(tmp_path: Path) -> None:
    """As where two files were put behind each other."""
    found = read(tmp_path, f"{HEAD}a,b\n{HEAD}c,d\n")
    assert found == [("2", pair("a", "b")), ("3", "the header a second time; expected a row"), ("4", pair("c", "d"))]


def test_zero_bytes_are_text(tmp_path: Path) -> None:
    assert read(tmp_path, HEAD + 'a\0b,"\0"\n') == [("2", pair("a\0b", "\0"))]


def test_lists_and_objects_are_json_in_their_cells_and_a_label_never_is(tmp_path: Path) -> None:
    row = {
        "messages": [{"role": "user", "content": "4"}, {"role": "assistant", "content": None, "tool_calls": []}],
        "tools": [{"type": "function"}],
        "documents": [{"title": "t"}],
        "chat_template_kwargs": {"enable_thinking": False, "x": None},
        "choices": ["4", "5"],
        "label": "4",
    }
    sheet = io.StringIO()
    writer = csv.writer(sheet)
    writer.writerow(row)
    writer.writerow([value if isinstance(value, str) else json.dumps(value) for value in row.values()])
    row["messages"][1].pop("content")  # type: ignore[index,union-attr]
    row["chat_template_kwargs"].pop("x")  # type: ignore[union-attr]
    assert read(tmp_path, sheet.getvalue()) == [("2", row)]
    head = "prompt,completion,references,chat_template_kwargs\n"
    for cell, expected in (
        (",{on}", "chat_template_kwargs is '{on}'; expected an object as JSON, such as {\"enable"),
        ("[a],", "references is '[a]'; expected a list as JSON"),
        (',"{""a"": 1, ""a"": 2}"', "the key 'a' stands twice"),
    ):
        [(_, bad)] = read(tmp_path, f"{head}p,c,{cell}\n")
        assert isinstance(bad, Bad)
        assert expected in bad
    assert read(tmp_path, f"{head}p,c,null,\n") == [("2", pair("p", "c"))]


CELL = st.text(st.sampled_from("ab,;\t|\"\n\r '\0\ufeff\u2028é🙂\\"), max_size=8)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.lists(st.tuples(CELL, CELL, CELL), max_size=5), st.sampled_from([",", ";", "\t", "|"]), st.booleans())
def test_what_csv_writes_comes_back(rows: list[tuple[str, str, str]], delimiter: str, all_quoted: bool) -> None:
    """With a quote around each cell, or where `csv` finds one needed; an empty cell beside others is absent."""
    sheet = io.StringIO()
    writer = csv.writer(sheet, delimiter=delimiter, quoting=csv.QUOTE_ALL if all_quoted else csv.QUOTE_MINIMAL)
    writer.writerows([("prompt", "completion", "note"), *rows])
    with tempfile.TemporaryDirectory() as folder:
        found = [record for _, record in records(write(Path(folder), sheet.getvalue()))]
    expected = [{**pair(prompt, completion), **({"note": note} if note else {})} for prompt, completion, note in rows]
    assert found == expected


def test_what_pandas_writes_comes_back(tmp_path: Path) -> None:
    import pandas

    rows = [
        {"prompt": 'say "a, b"\r\n', "completion": "x\ny", "references": ["a", 'b"']},
        {"prompt": "in\rside", "completion": "NaN", "references": ["c"]},
    ]
    frame = pandas.DataFrame([{**row, "references": json.dumps(row["references"])} for row in rows])
    for delimiter in ",;\t|":
        frame.to_csv(tmp_path / "a.csv", index=False, sep=delimiter)
        assert [record for _, record in records(tmp_path / "a.csv")] == rows
    frame.to_csv(tmp_path / "a.csv")
    with pytest.raises(DataError, match="index=False"):
        list(records(tmp_path / "a.csv"))
