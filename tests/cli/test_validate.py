"""`spectune validate`: what is learned, in colour or in brackets, and what is counted, against files made by hand.

The base's tokenizer has one token a byte and EOS, so that every number can be counted.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

Spectune = Callable[..., Any]
EOS = "<|endoftext|>"
#: thoughts of earlier answers are cut, and EOS ends each answer
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'A:' + (m.content if loop.last else "
    "m.content.split('</think>')[-1]) + eos_token }}{% else %}{{ m.role + ':' + m.content + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
)
YES = {"prompt": "a?", "completion": "yes"}
THOUGHTS = [
    {"role": "user", "content": "hi"}, {"role": "assistant", "content": "<think>two</think>ho"},
    {"role": "user", "content": "hm"}, {"role": "assistant", "content": "<think>six</think>ha"},
]  # fmt: skip


def written(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def chat_base(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with a chat template, and without weights."""
    folder = tmp_path_factory.mktemp("chat") / "base"
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def counted(stdout: str, label: str, block: int = 0) -> str:
    """What stands behind a label, the `block`-th time that it comes."""
    return re.findall(rf"^  {re.escape(label)}  +(.*)$", stdout, re.MULTILINE)[block]


def test_off_a_terminal_each_learned_stretch_stands_in_brackets(
    spectune: Spectune, chat_base: Path, tmp_path: Path
) -> None:
    records = [
        {"prompt": "a [bold]?\n", "completion": "yes\x1b[2J"},
        {"text": "one\ntwo"},
        {"messages": [*THOUGHTS[:3], {"role": "assistant", "content": "ha"}]},
    ]
    path = written(tmp_path / "rows.jsonl", records)
    result = spectune("validate", "--model", chat_base, "--data", path)
    assert result.exit_code == 0, result.stderr
    expected = (
        f"{path}:1 (prompt): 18 tokens, 8 of them learned\na [bold]?\n[[yes␛[2J{EOS}]]\n\n"
        f"{path}:2 (text): 8 tokens, 7 of them learned\no[[ne\ntwo{EOS}]]\n\n"
        f"{path}:3 (messages): 26 tokens, 6 of them learned\nuser:hi\nA:[[ho{EOS}]]user:hm\nA:[[ha{EOS}]]\n\n"
    )
    assert result.stdout.startswith(expected)


def test_on_a_terminal_what_is_learned_is_bold_and_green_and_the_rest_is_dim(
    spectune: Spectune, base: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    arguments = ("validate", "--model", base, "--data", rows, "--show", "1")
    assert f"\x1b[2mnumber 0\x1b[0m\x1b[1;32m is even{EOS}\x1b[0m\n" in spectune(*arguments).stdout
    monkeypatch.setenv("NO_COLOR", "1")
    assert f"number 0[[ is even{EOS}]]\n" in spectune(*arguments).stdout


def test_three_rows_of_each_shape_are_shown_or_as_many_as_are_asked_for(
    spectune: Spectune, chat_base: Path, tmp_path: Path
) -> None:
    shapes: list[dict[str, Any]] = [
        {"text": "some text"},
        YES,
        {"messages": THOUGHTS[:2]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        {"instruction": "do", "output": "done"},
    ]
    path = written(tmp_path / "rows.jsonl", shapes * 5)

    def shown(*flags: str) -> list[tuple[str, int]]:
        out = spectune("validate", "--model", chat_base, "--data", path, *flags).stdout
        return [(shape, int(line)) for line, shape in re.findall(rf"^{path}:(\d+) \((\w+)\): ", out, re.MULTILINE)]

    names = ["text", "prompt", "messages", "sharegpt", "alpaca"]
    assert shown() == [(name, 1 + i + 5 * k) for i, name in enumerate(names) for k in range(3)]
    assert shown("--show", "1") == [(name, 1 + i) for i, name in enumerate(names)]
    assert len(shown("--show", "9")) == 25
    assert shown("--show", "0") == []


def test_every_kind_of_row_is_counted(spectune: Spectune, chat_base: Path, tmp_path: Path) -> None:
    unlearned = [THOUGHTS[0], {"role": "assistant", "content": "ho", "weight": 0}]
    records: list[dict[str, Any]] = [
        YES,  # 2 + 3 + EOS
        {"messages": THOUGHTS},  # two turns, one of them without its thought: 8 + 2 + 3 + 8 + 2 + 21
        {"messages": unlearned},  # nothing to learn
        {"prompt": "p" * 60, "completion": "yes"},  # 64 tokens, of which 14 are cut at the beginning
        {"prompt": "go", "completion": "c" * 60},  # the end is cut, too: 63 tokens
        {"text": "t" * 70},  # 71 tokens in two windows of 50 and 22
        {"prompt": "b?", "completion": f"no{EOS}no", "text": "not used"},  # 8 tokens
        {"completion": "no prompt"},
    ]
    path = written(tmp_path / "rows.jsonl", records)
    arguments = ("validate", "--model", chat_base, "--data", path, "--skip-bad-rows", "--set", "max_length=50")
    out = spectune(*arguments).stdout
    assert counted(out, "rows") == "8 (4 prompt, 2 messages, 1 text)"
    assert counted(out, "bad rows left out").startswith(f"1: {path}:8: completion without prompt")
    assert counted(out, "rows without a learned token") == f"1: none of its turns is to be learned ({path}:3)"
    assert counted(out, "sequences") == "7 of 6 rows"
    assert counted(out, "turns learned") == "6"
    learned = 4 + (3 + 21) + 4 + 49 + (49 + 21) + 6
    assert counted(out, "tokens") == f"{6 + 44 + 50 + 50 + 50 + 22 + 8}, {learned} of them learned (68%)"
    assert counted(out, "longest sequence") == "50 tokens (max_length 50)"
    cut = "the beginning of 1 (14 tokens), the beginning and end of 1 (13 tokens)"
    assert counted(out, "rows cut to max_length") == f"2: {cut}"
    assert counted(out, "long texts in windows") == "1: 2 windows, no token lost"
    assert counted(out, "rows that end with EOS") == "5 of 6"
    assert counted(out, "rows with EOS in an answer") == "1"
    assert counted(out, "turns without their thought") == "1"
    assert counted(out, "rows with text, not used") == "1 (name it in columns to take it)"
    assert "rows with unknown tokens" not in out

    answer = json.loads(spectune(*arguments, "--json").stdout)
    assert answer["truncations"] == {
        "beginning": {"rows": 1, "tokens": 14}, "beginning and end": {"rows": 1, "tokens": 13}
    }  # fmt: skip
    assert answer["ending"] == {"rows": 6, "with_eos": 5}
    assert answer["shapes"] == {"prompt": 4, "messages": 2, "text": 1}
    assert (answer["report"]["dropped"], answer["report"]["bad"], answer["report"]["turns"]) == (1, 1, 6)


def test_rows_that_stand_twice_are_counted_and_named(spectune: Spectune, base: Path, tmp_path: Path) -> None:
    train = [
        {"prompt": "Café?", "completion": "yes"},
        {"prompt": " Cafe\u0301? ", "completion": "yes\n"},  # the same in another form of Unicode
        {"prompt": "Café?", "completion": "no"},
        {"prompt": "café?", "completion": "yes"},
        {"text": "yes"},
        {"text": "yes "},
    ]
    valid = [{"prompt": "Café?", "completion": "no "}, {"prompt": "new", "completion": "yes"}]
    test = [{"prompt": "new", "completion": "no"}, {"prompt": "Café?", "completion": "perhaps"}, {"text": "no"}]
    paths = {
        name: written(tmp_path / f"{name}.jsonl", part)
        for name, part in (("data", train), ("valid", valid), ("test", test))
    }
    flags = [argument for name, path in paths.items() for argument in (f"--{name}", path)]
    arguments = ("validate", "--model", base, *flags, "--show", "0")
    out = spectune(*arguments).stdout
    data, held, judged = paths["data"], paths["valid"], paths["test"]
    assert counted(out, "copies of an earlier row") == f"2: {data}:2 = {data}:1, {data}:6 = {data}:5"
    assert counted(out, "earlier prompt, other answer") == f"1: {data}:3 = {data}:1"
    assert [counted(out, "copies of an earlier row", block) for block in (1, 2)] == ["0", "0"]
    assert "valid rows (2) that are in train\n" in out
    assert [counted(out, "equal rows", block) for block in range(3)] == [f"1: {held}:1 = {data}:3", "0", "0"]
    assert [counted(out, "equal prompts, other answer", block) for block in range(3)] == [
        "0", f"1: {judged}:2 = {data}:1", f"2: {judged}:1 = {held}:2, {judged}:2 = {held}:1"
    ]  # fmt: skip

    answer = json.loads(spectune(*arguments, "--json").stdout)
    assert {name: (found["rows"], found["prompts"]) for name, found in answer["duplicates"].items()} == {
        "train": (2, 1), "valid": (0, 0), "test": (0, 0)
    }  # fmt: skip
    assert [(o["of"], o["in"], o["of_rows"], o["rows"], o["prompts"]) for o in answer["overlaps"]] == [
        ("valid", "train", 2, 1, 0), ("test", "train", 3, 0, 1), ("test", "valid", 3, 0, 2)
    ]  # fmt: skip
    assert answer["overlaps"][0]["equal_rows"] == [[f"{held}:1", f"{data}:3"]]
    assert answer["valid"]["report"]["rows"] == 2


def test_without_valid_the_rows_that_would_be_held_out_are_compared(
    spectune: Spectune, base: Path, tmp_path: Path
) -> None:
    path = written(tmp_path / "rows.jsonl", [YES] * 20)
    out = spectune("validate", "--model", base, "--data", path, "--show", "0").stdout
    assert "held out rows (2) that are in train\n" in out
    assert counted(out, "equal rows").startswith("2: ")


def test_with_json_each_row_that_is_shown_is_told_in_full(spectune: Spectune, chat_base: Path, tmp_path: Path) -> None:
    long = "x" * 900
    path = written(tmp_path / "rows.jsonl", [{"prompt": long, "completion": "yes"}, {"messages": THOUGHTS}])
    result = spectune("validate", "--model", chat_base, "--data", path, "--set", "max_length=1000", "--json")
    answer = json.loads(result.stdout)
    assert answer["data"] == str(path)
    first, second = answer["rows"]
    assert first == {
        "origin": f"{path}:1", "shape": "prompt", "sequence": 1, "sequences": 1, "tokens": 904, "target_tokens": 4,
        "turns": 1, "prompt": long, "target": f"yes{EOS}", "learned": [f"yes{EOS}"], "text": f"{long}[[yes{EOS}]]",
        "ends_with_eos": True,
    }  # fmt: skip
    assert second["turns"] == 2
    assert second["learned"] == [f"ho{EOS}", f"<think>six</think>ha{EOS}"]


def test_a_long_prompt_is_shortened_in_its_middle_and_an_answer_never(
    spectune: Spectune, base: Path, tmp_path: Path
) -> None:
    prompt, answer = "a" * 99 + "é" + "x" * 1000 + "é" + "b" * 99, "c" * 600
    path = written(tmp_path / "rows.jsonl", [{"prompt": prompt, "completion": answer}])
    out = spectune("validate", "--model", base, "--data", path, "--set", "max_length=2000").stdout
    assert f"\n{'a' * 99}…(1,004 tokens)…{'b' * 99}[[{answer}{EOS}]]\n" in out


def test_train_on_last_learns_the_last_turn_alone(spectune: Spectune, chat_base: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", [{"messages": THOUGHTS}])
    out = spectune("validate", "--model", chat_base, "--data", path, "--train-on", "last").stdout
    assert f"user:hi\nA:ho{EOS}user:hm\nA:[[<think>six</think>ha{EOS}]]\n" in out
    assert counted(out, "turns learned") == "1"


def test_all_bad_rows_of_all_parts_are_named_at_once(spectune: Spectune, chat_base: Path, tmp_path: Path) -> None:
    upside_down = [{"role": "tool", "content": "hi"}]
    data = written(tmp_path / "a.jsonl", [YES, {"prompt": "a?"}, {"messages": upside_down}])
    valid = written(tmp_path / "b.jsonl", [{"prompt": "p" * 40, "completion": "yes"}, {}])
    arguments = ("--set", "max_length=20", "--set", "truncation=refuse", "--json")
    result = spectune("validate", "--model", chat_base, "--data", data, "--valid", valid, *arguments)
    assert result.exit_code == 3
    assert result.stdout == ""
    named = re.findall(r"^(?:error: )?(\S+?):(\d+): ", result.stderr, re.MULTILINE)
    assert sorted(named) == [(str(data), "2"), (str(data), "3"), (str(valid), "1"), (str(valid), "2")]


def test_a_file_without_one_good_row_names_them_all(spectune: Spectune, base: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", [{}, {"prompt": "p" * 40, "completion": "yes"}])
    arguments = ("--set", "max_length=20", "--set", "truncation=refuse")
    result = spectune("validate", "--model", base, "--data", path, *arguments)
    assert result.exit_code == 3
    assert f"{path}:1: has no keys" in result.stderr
    assert f"{path}:2: has 44 tokens" in result.stderr
    result = spectune("validate", "--model", base, "--data", written(path, [{}]))
    assert result.exit_code == 3
    assert f"{path}: 1 bad of 1 rows" in result.stderr


def test_ids_that_the_base_has_no_embedding_for_are_refused(spectune: Spectune, base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    path = written(tmp_path / "rows.jsonl", [YES, {"prompt": "a<new>", "completion": "yes"}])
    result = spectune("validate", "--model", folder, "--data", path)
    assert result.exit_code == 3
    assert f"{path}:2: holds the token '<new>' with id 257, and the base's embedding has 257 rows" in result.stderr


@pytest.mark.parametrize("named", [True, False])
def test_chats_without_a_chat_template_are_told_what_to_do(
    spectune: Spectune, base: Path, tmp_path: Path, named: bool
) -> None:
    path = written(tmp_path / "rows.jsonl", [YES, {"messages": THOUGHTS}])
    result = spectune("validate", "--data", path, *(("--model", base) if named else ()))
    assert result.exit_code == 2
    whose = str(base) if named else "spectune-tiny, which is taken without --model,"
    assert f"{path}:2: the row is a chat (messages), and the tokenizer of {whose} has no chat template" in result.stderr
    assert "--model" in result.stderr


def test_without_any_flag_the_embedded_data_are_checked(spectune: Spectune) -> None:
    result = spectune("validate")
    assert result.exit_code == 0, result.stderr
    assert [counted(result.stdout, "rows", block) for block in range(3)] == [
        "1,200 (1,200 prompt)", "200 (200 prompt)", "200 (200 prompt)"
    ]  # fmt: skip
    assert [counted(result.stdout, "equal rows", block) for block in range(3)] == ["0", "0", "0"]


def test_rows_of_several_files_are_counted_by_file(spectune: Spectune, base: Path, tmp_path: Path) -> None:
    one, two = written(tmp_path / "one.jsonl", [YES] * 2), written(tmp_path / "two.jsonl", [YES])
    out = spectune("validate", "--model", base, "--data", one, "--data", f"{two}=2", "--show", "0").stdout
    assert counted(out, "rows by source") == "2 one, 1 two"
    assert counted(out, "copies of an earlier row").startswith(f"2: {one}:2 = {one}:1, {two}:1 = {one}:1")
