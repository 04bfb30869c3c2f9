"""Rows that nobody here wrote, in a command: dated chats, foreign columns, several files, ids that are too high."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

Spectune = Callable[..., Any]
QUICK = ("--set", "max_steps=2", "--device", "cpu")
DATED = (
    "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
UNDATED = DATED.replace("{{ strftime_now('%Y-%m-%d') }}", "")
CHATS = [
    {"messages": [{"role": "system", "content": "brief"}, {"role": "user", "content": f"{i}?"},
                  {"role": "assistant", "content": "even" if i % 2 == 0 else "odd"}]}
    for i in range(8)
]  # fmt: skip


def copied(base: Path, folder: Path, change: Callable[[Any], None]) -> Path:
    """The base with another tokenizer."""
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def written(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def chats(base: Path, folder: Path, template: str, records: list[dict[str, Any]] = CHATS) -> tuple[Path, Path]:
    """A base with that chat template, and conversations for it."""

    def dress(tokenizer: Any) -> None:
        tokenizer.chat_template = template

    return copied(base, folder / "chat", dress), written(folder / "chats.jsonl", records)


class Day(datetime.date):
    """A clock that stands."""

    now = "2026-02-03"

    @classmethod
    def today(cls) -> datetime.date:  # type: ignore[override]
        return datetime.date.fromisoformat(cls.now)


@pytest.fixture
def day(monkeypatch: pytest.MonkeyPatch) -> type[Day]:
    monkeypatch.setattr("spectune.training.prepare.datetime.date", Day)
    monkeypatch.setattr(Day, "now", "2026-02-03")
    return Day


def test_a_run_keeps_the_date_that_it_began_with(
    spectune: Spectune, base: Path, tmp_path: Path, day: type[Day], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = chats(base, tmp_path, DATED)
    given = ("train", "--model", model, "--data", data, *QUICK, "--output-dir", "out")
    assert spectune(*given, "--set", "save_steps=1").exit_code == 0
    assert yaml.safe_load(Path("out/config.yaml").read_text())["template_date"] == "2026-02-03"
    Path("out/result.json").unlink()  # as if it had been killed before its end
    monkeypatch.setattr(day, "now", "2026-02-04")
    resumed = spectune(*given, "--set", "save_steps=1", "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    answer = spectune("generate", "4?", "--run", "out", "--max-new-tokens", "1", "--json")
    assert answer.exit_code == 0, answer.stderr
    # a second run on the next day has that day's date
    assert spectune(*given[:-1], "other").exit_code == 0
    assert yaml.safe_load(Path("other/config.yaml").read_text())["template_date"] == "2026-02-04"


@pytest.mark.slow
def test_a_comparison_keeps_the_date_that_it_began_with(
    spectune: Spectune, base: Path, tmp_path: Path, day: type[Day], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = chats(base, tmp_path, DATED)
    given = ("compare", "--quick", "--model", model, "--data", data, *QUICK, "--methods", "bitfit", "--seeds", "1")
    assert spectune(*given, "--output-dir", "out").exit_code == 0
    monkeypatch.setattr(day, "now", "2026-02-04")
    again = spectune(*given, "--output-dir", "out", "--resume")
    assert again.exit_code == 0, again.stderr


def test_a_typed_question_stands_behind_the_system_message_of_all_chats(
    spectune: Spectune, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = chats(base, tmp_path, UNDATED)
    assert spectune("train", "--model", model, "--data", data, *QUICK, "--output-dir", "out").exit_code == 0
    assert prompts_of(monkeypatch, spectune, "4?") == ["<system>brief<|endoftext|><user>4?<|endoftext|><assistant>"]


def test_a_typed_instruction_has_the_form_that_training_had(
    spectune: Spectune, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = written(tmp_path / "a.jsonl", [{"instruction": f"Say {i}", "output": str(i)} for i in range(6)])
    small = ("--set", "max_length=150")
    assert spectune("train", "--model", base, "--data", data, *QUICK, *small, "--output-dir", "out").exit_code == 0
    [prompt] = prompts_of(monkeypatch, spectune, "Say 4")
    assert prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay 4\n\n### Response:\n"
    )


def prompts_of(monkeypatch: pytest.MonkeyPatch, spectune: Spectune, typed: str) -> list[str]:
    """What reaches the model, as text."""
    import spectune.inference as inference

    seen: list[str] = []

    def write(model: Any, tokenizer: Any, prompts: list[list[int]], **_: Any) -> list[str]:
        seen.extend(tokenizer.decode(ids) for ids in prompts)
        return [""] * len(prompts)

    monkeypatch.setattr(inference, "generate_texts", write)
    result = spectune("generate", typed, "--run", "out")
    assert result.exit_code == 0, result.stderr
    return seen


COMMANDS = [
    ("train",), ("train", "--dry-run"), ("compare", "--quick", "--methods", "lora"), ("plan",), ("validate",)
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_ids_beyond_the_embedding_are_refused_by_name(
    spectune: Spectune, base: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    """A word was added to the tokenizer, and the table was not made larger."""
    model = copied(base, tmp_path / "larger", lambda tokenizer: tokenizer.add_tokens(["<river>"]))
    data = written(
        tmp_path / "a.jsonl", [{"prompt": f"{i}", "completion": "<river>" if i == 3 else "x"} for i in range(6)]
    )
    more = () if command[0] in ("plan", "validate") else ("--output-dir", "out", "--device", "cpu")
    result = spectune(*command, "--model", model, "--data", data, "--set", "max_steps=2", *more)
    assert result.exit_code == 3
    assert f"{data}:4: holds the token '<river>' with id 257, and the base's embedding has 257 rows" in result.stderr
    assert "resize_token_embeddings" in result.stderr


def test_padding_beyond_the_embedding_is_another_id(spectune: Spectune, base: Path, tmp_path: Path) -> None:
    def dress(tokenizer: Any) -> None:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})

    model = copied(base, tmp_path / "padded", dress)
    data = written(tmp_path / "a.jsonl", [{"prompt": "p" * i, "completion": "x"} for i in range(1, 9)])
    given = ("--model", model, "--data", data, *QUICK, "--set", "packing=false")
    assert spectune("train", *given, "--output-dir", "out").exit_code == 0
    for command in (("eval", "--data", data), ("generate", "--data", data, "--max-new-tokens", "2")):
        result = spectune(*command, "--run", "out")
        assert result.exit_code == 0, result.stderr


def test_columns_are_renamed_and_the_run_remembers(spectune: Spectune, base: Path, tmp_path: Path) -> None:
    data = written(tmp_path / "a.jsonl", [{"question": f"{i}?", "answer": "yes", "text": "other"} for i in range(6)])
    renamed = ("--set", "columns.prompt=question", "--set", "columns.completion=answer")
    result = spectune("train", "--model", base, "--data", data, *QUICK, *renamed, "--output-dir", "out")
    assert result.exit_code == 0, result.stderr
    assert yaml.safe_load(Path("out/config.yaml").read_text())["columns"] == {
        "prompt": "question",
        "completion": "answer",
    }
    assert json.loads(Path("out/data_report.json").read_text())["train"]["ignored_keys"] == {"text": 5}
    again = spectune("eval", "--run", "out", "--data", data, "--generate-rows", "0", "--json")
    assert json.loads(again.stdout)["rows"] == 6
    unknown = spectune("train", "--data", data, "--set", "columns.question=prompt", "--output-dir", "none")
    assert unknown.exit_code == 2
    assert "columns renames to question" in unknown.stderr


def test_the_last_turn_alone_is_learned_where_the_user_says_so(spectune: Spectune, base: Path, tmp_path: Path) -> None:
    twice = [{"messages": [*CHATS[i]["messages"], *CHATS[i]["messages"][1:]]} for i in range(6)]
    model, data = chats(base, tmp_path, UNDATED, twice)
    turns = {}
    for train_on in ("all", "last"):
        given = ("--model", model, "--data", data, *QUICK, "--train-on", train_on, "--output-dir", train_on)
        assert spectune("train", *given).exit_code == 0
        turns[train_on] = json.loads((Path(train_on) / "data_report.json").read_text())["train"]["turns"]
    assert turns == {"all": 10, "last": 5}


def test_eval_chooses_where_compare_does(spectune: Spectune, base: Path, tmp_path: Path) -> None:
    """The few labels that all training rows are answered with are the choices of rows to evaluate on, too."""
    rows = [{"prompt": f"{i}?", "completion": " even" if i % 2 == 0 else " odd"} for i in range(12)]
    data = written(tmp_path / "a.jsonl", rows)
    assert spectune("train", "--model", base, "--data", data, *QUICK, "--output-dir", "out").exit_code == 0
    one = written(tmp_path / "one.jsonl", [{"prompt": "1?", "completion": " odd"}])
    answer = json.loads(spectune("eval", "--run", "out", "--data", one, "--json").stdout)
    assert set(answer["tuned"]) >= {"choice_accuracy"}
    assert "exact_match" not in answer["tuned"]
