"""What is read of metadata: whatever lies there, it is the content or one sentence that names the file."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from spectune.errors import DataError
from spectune.files.core_yaml import compose_yaml, yaml_text, yaml_value
from spectune.files.metadata import (
    SEAL,
    Seal,
    json_object,
    number_of,
    numbered,
    read_json,
    read_lines,
    read_record,
    read_yaml,
    seal_of,
    sealed,
)
from spectune.files.regular import inside
from spectune.files.strict_json import strict_json
from tests.support.hostile_files import HOSTILE_JSON, HOSTILE_YAML, JSON_TEXTS, Maker, holding


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    """Nothing waits for a pipe, nor reads what has no end."""
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < 10


def said(path: Path, error: DataError) -> str:
    text = str(error)
    assert str(path) in text
    assert "\n" not in text
    assert len(text) < 1000
    text.encode("utf-8")
    return text


@pytest.mark.parametrize("make", HOSTILE_JSON.values(), ids=list(HOSTILE_JSON))
def test_json_that_is_none_is_one_sentence_that_names_the_file(tmp_path: Path, make: Maker) -> None:
    path = make(tmp_path / "it.json")
    with pytest.raises(DataError) as caught:
        read_json(path, what="a record", again="Make it again")
    said(path, caught.value)


@pytest.mark.parametrize("make", HOSTILE_YAML.values(), ids=list(HOSTILE_YAML))
def test_yaml_that_is_none_is_one_sentence_that_names_the_file(tmp_path: Path, make: Maker) -> None:
    path = make(tmp_path / "it.yaml")
    with pytest.raises(DataError) as caught:
        read_yaml(path)
    said(path, caught.value)


@pytest.mark.parametrize("make", HOSTILE_JSON.values(), ids=list(HOSTILE_JSON))
def test_a_hostile_line_is_named_or_left_out(tmp_path: Path, make: Maker) -> None:
    path, told = make(tmp_path / "it.jsonl"), list[str]()
    if path.is_file() and not path.is_symlink() and path.stat().st_size < 2**20:
        path.write_bytes(b'{"a": 0}\n' + path.read_bytes().replace(b"\n", b"") + b'\n{"a": 2}\n')
        left = [line for _, line in read_lines(path, skipped=told.append)]
        assert left == [{"a": 0}, {"a": 2}]
        if make is not HOSTILE_JSON["nothing"]:
            assert f"{path}:2" in told[0]
            with pytest.raises(DataError, match=r"it\.jsonl:2 "):
                list(read_lines(path))
    else:
        with pytest.raises(DataError) as caught:
            list(read_lines(path, skipped=told.append))
        said(path, caught.value)


def test_what_a_kill_cut_off_is_left_out_where_that_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "it.jsonl").write_text('{"step": 1}\n\n{"step": 2}\n{"st')
    assert list(read_lines(tmp_path / "it.jsonl", torn=True)) == [(1, {"step": 1}), (3, {"step": 2})]
    with pytest.raises(DataError, match=r"it\.jsonl:4 "):
        list(read_lines(tmp_path / "it.jsonl"))
    with pytest.raises(DataError, match="no such file"):
        list(read_lines(tmp_path / "none.jsonl"))


def test_what_is_too_long_is_not_read(tmp_path: Path) -> None:
    path = holding(b'{"a": "' + b"x" * 1000 + b'"}')(tmp_path / "it.json")
    assert read_json(path) is not None
    for read in (
        lambda: read_json(path, 1000),
        lambda: list(read_lines(path, longest=1000)),
        lambda: read_yaml(path, 99),
    ):
        with pytest.raises(DataError, match="damaged"):
            read()
    assert read_json(tmp_path / "none.json") is read_yaml(tmp_path / "none.yaml") is None


def test_a_link_out_of_the_folder_is_read_only_where_the_user_named_it(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "outer.json").write_text('{"a": 1}')
    link = tmp_path / "inner" / "it.json"
    link.symlink_to(tmp_path / "outer.json")
    with pytest.raises(DataError, match="outside of its folder"):
        read_json(link)
    assert read_json(link, links=True) == {"a": 1}


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "link/x", "\0", "x" * 5000, "", None, 4, ["x"]])
def test_a_path_that_a_file_names_stays_in_the_folder(tmp_path: Path, path: Any) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "link").symlink_to(tmp_path)
    found = inside(tmp_path / "f", path)
    assert found is None or found == tmp_path / "f" or (path == "x" * 5000 and found.parent == tmp_path / "f")
    assert inside(tmp_path / "f", "a/../b/c") == tmp_path / "f" / "b" / "c"


CONTENT = {"steps": 3, "loss": 1.5, "inf": float("inf"), "tuple": (1, 2), "é": "ü", "of": {"b": [True, None], "a": {}}}


def test_every_flipped_bit_of_a_sealed_record_is_noticed_or_changes_nothing() -> None:
    raw = (strict_json(sealed(CONTENT)) + "\n").encode()
    good = json_object(raw, "it")
    assert seal_of(good) is Seal.RIGHT
    changed, unnoticed = {key: value for key, value in good.items() if key != SEAL}, 0
    for place in range(len(raw)):
        for bit in range(8):
            try:
                found = json_object(raw[:place] + bytes([raw[place] ^ 1 << bit]) + raw[place + 1 :], "it")
            except DataError:
                continue
            if seal_of(found) is not Seal.WRONG:
                unnoticed += 1
                # white space, or the seal's own key, whose loss says nothing wrong of the content
                assert changed.items() <= found.items()
    assert 0 < unnoticed < len(raw)


def test_a_seal_is_looked_at_last_and_may_be_taken_out(tmp_path: Path) -> None:
    class Small(BaseModel):
        steps: int

    path, told = tmp_path / "it.json", list[str]()
    path.write_text(json.dumps({**sealed({"steps": 3}), "steps": 4}))
    with pytest.raises(DataError, match=r"not as it was written.*Do this.*take that key out"):
        read_record(path, Small, what="a small one", again="do this")
    assert read_record(path, Small, what="a small one", warn=told.append) == Small(steps=4)
    assert str(path) in told[0]
    path.write_text(json.dumps({**sealed({"steps": 3}), "steps": "x"}))
    with pytest.raises(DataError, match=r"cannot be read as a small one \(steps: "):
        read_record(path, Small, what="a small one")
    path.write_text(json.dumps({"steps": 4}))
    assert read_record(path, Small) == Small(steps=4)


def test_numbered_folders_are_those_with_our_numbers(tmp_path: Path) -> None:
    for name in (
        "checkpoint-10",
        "checkpoint-9",
        "checkpoint-²",
        "checkpoint-٣",
        "checkpoint-07",
        "checkpoint-",
        "checkpoint-1x",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / ("checkpoint-" + "9" * 40)).mkdir()
    assert [number for number, _ in numbered(tmp_path, "checkpoint-")] == [9, 10]
    assert number_of("best-0", "best-") == 0
    assert number_of("best-4", "checkpoint-") is None


WORDS = "off no null ~ true 1e3 1_000 0o17 017 12:30 2024-01-31 .inf << = é:"


def load_yaml(text: str) -> Any:
    node = compose_yaml(text)
    return None if node is None else yaml_value(node)


@pytest.mark.parametrize("text", [*WORDS.split(" "), "", " ", "é: x", "a # b"])
def test_text_is_written_so_that_readers_of_both_versions_of_yaml_have_it_back(text: str) -> None:
    value = {"a": text, "b": [text], "c": 1e-5, "d": False, "e": None, text: 1}
    assert load_yaml(yaml_text(value)) == yaml.safe_load(yaml_text(value)) == value


def test_the_core_rules_of_yaml() -> None:
    text = (
        "a: off\nb: 1e-3\nc: 010\nd: 0x1F\ne: True\nf: NULL\ng: .5\nh: {1: 2}\ni: !!str 5\nj: &x {k: 1}\nk: {<<: *x}\n"
    )
    found = load_yaml(text)
    assert list(found.values()) == ["off", 1e-3, 10, 31, True, None, 0.5, {"1": 2}, "5", {"k": 1}, {"k": 1}]


def test_hostile_texts_are_as_hostile_as_they_say() -> None:
    """What Python's own reader takes, ours refuses for a reason of its own."""
    taken = {name for name, text in JSON_TEXTS.items() if isinstance(loaded(text), dict)}
    assert taken == {
        "deep and whole", "NaN", "infinity", "a number past all floats", "an integer of 30 digits", "a key twice",
        "half a surrogate pair", "half a surrogate pair in a key", "UTF-16", "a byte order mark",
    }  # fmt: skip


def loaded(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
