"""What generate and eval give the model, and what they print: prompts as in training, text as it stands."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from spectune import embedded
from spectune.cli.app import build_app
from spectune.data import Example, load_rows

Spectune = Callable[..., Any]
QUICK = ("--set", "max_steps=1", "--device", "cpu")
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "even"}]


@pytest.fixture
def run(spectune: Spectune, base: Path, rows: Path) -> Path:
    """A LoRA run of one step."""
    result = spectune("train", "--model", base, "--data", rows, *QUICK, "--output-dir", "runs/out")
    assert result.exit_code == 0, result.stderr
    return Path("runs/out")


@pytest.fixture
def chat_base(base: Path, tmp_path: Path) -> Path:
    """The base with a chat template."""
    folder = tmp_path / "chat-base"
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def chat_rows(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": CHAT}) + "\n" for _ in range(4)))
    return path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts, as text, that reach the model."""
    import spectune.inference as inference

    seen: list[str] = []

    def write(model: Any, tokenizer: Any, prompts: list[list[int]], **_: Any) -> list[str]:
        seen.extend(tokenizer.decode(ids) for ids in prompts)
        return ["[red]a :dog: " + "x" * 300] * len(prompts)

    monkeypatch.setattr(inference, "generate_texts", write)
    return seen


def record(run: Path, **keys: str) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, **keys}))


def test_a_typed_prompt_of_a_chat_run_goes_through_the_template(
    spectune: Spectune, chat_base: Path, chat_rows: Path, asked: list[str]
) -> None:
    trained = spectune("train", "--model", chat_base, "--data", chat_rows, *QUICK, "--output-dir", "runs/out")
    assert trained.exit_code == 0, trained.stderr
    record(Path("runs/out"), row_shape="messages", prompt_ends_with="")
    result = spectune("generate", "hello", "--json")
    assert result.exit_code == 0, result.stderr
    assert asked == ["<user>hello<assistant>"]
    assert json.loads(result.stdout)["outputs"][0]["prompt"] == "user: hello"
    shown = json.loads(spectune("generate", "--data", chat_rows, "--rows", "1", "--json").stdout)["outputs"]
    assert (shown[0]["prompt"], shown[0]["references"]) == ("user: two?", ["even"])


def test_eval_writes_the_answers_of_chats(
    spectune: Spectune, chat_base: Path, chat_rows: Path, asked: list[str]
) -> None:
    spectune("train", "--model", chat_base, "--data", chat_rows, *QUICK, "--output-dir", "runs/out")
    result = spectune("eval", "--data", chat_rows, "--json")
    assert result.exit_code == 0, result.stderr
    tuned = json.loads(result.stdout)["tuned"]
    assert tuned["generated_rows"] == 4
    assert tuned["exact_match"] == 0.0
    assert set(asked) == {"<user>two?<assistant>"}


@pytest.mark.parametrize(
    ("typed", "ending", "expected"),
    [
        ("ab", "\n", "ab\n"),
        ("ab\n", "\n", "ab\n"),
        ("ab\n", "\n\n", "ab\n\n"),
        ("ab", "", "ab"),
        ("ab ", "\n", "ab \n"),
    ],
)
def test_a_typed_prompt_ends_as_those_of_training(
    spectune: Spectune, run: Path, asked: list[str], typed: str, ending: str, expected: str
) -> None:
    record(run, row_shape="prompt", prompt_ends_with=ending)
    result = spectune("generate", typed)
    assert result.exit_code == 0, result.stderr
    assert asked == [expected]
    assert ("is put at its end" in result.stderr) == (typed != expected)


def test_a_prompt_of_a_text_run_is_text(spectune: Spectune, run: Path, asked: list[str]) -> None:
    record(run, row_shape="text", separator=": ")
    assert spectune("generate", "once").exit_code == 0
    assert asked == ["once"]


def test_a_prompt_that_is_no_unicode(spectune: Spectune, run: Path) -> None:
    result = spectune("generate", "a\udcff")
    assert result.exit_code == 2
    assert "prompt 1 holds '\\udcff'" in result.stderr


def test_the_prompt_in_generates_help_is_a_record_of_the_embedded_task(spectune: Spectune) -> None:
    [prompt] = re.findall(r'"(name: .*)"', spectune("generate", "--help").stdout)
    assert prompt + "\n" in {row.prompt for row in load_rows(embedded.TEST)}


def test_text_is_printed_as_it_stands(spectune: Spectune, run: Path, asked: list[str]) -> None:
    result = spectune("generate", "[b]p[/b]")
    assert "[b]p[/b]\n[red]a :dog: " + "x" * 300 + "\n" in result.stdout


def test_file_names_are_no_markup_and_lines_are_not_folded(
    spectune: Spectune, run: Path, base: Path, tmp_path: Path
) -> None:
    path = tmp_path / ("d" * 120) / ("e" * 120) / "chat[old].jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"prompt": "p" * 100, "completion": "[red]c :dog: " + "c" * 30}) + "\n")
    result = spectune("validate", "--model", base, "--data", path)
    assert result.exit_code == 0, result.stderr
    assert f"{path}\n" in result.stdout
    assert f"{path}:1 (prompt): 144 tokens" in result.stdout
    assert "[[[red]c :dog: " + "c" * 30 + "<|endoftext|>]]" in result.stdout
    judged = spectune("eval", "--data", path, "--generate-rows", "0")
    assert f"1 rows of {path}\n" in judged.stdout


@pytest.mark.parametrize("command", ["validate", "eval"])
def test_rows_that_are_cut_are_mentioned(spectune: Spectune, run: Path, base: Path, rows: Path, command: str) -> None:
    record(run, max_length=10)
    more = ("--model", base, "--set", "max_length=10") if command == "validate" else ("--generate-rows", "0")
    result = spectune(command, "--data", rows, *more)
    assert result.exit_code == 0, result.stderr
    assert f"{rows}: 12 of 12 rows cut to max_length (" in result.stderr
    assert "tokens lost)" in result.stderr


def test_eval_counts_rows_not_windows(spectune: Spectune, run: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("once upon a time " * 30)
    result = spectune("eval", "--data", path, "--json")
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert (answer["rows"], answer["data_report"]["split"], answer["data_report"]["tokens_lost"]) == (1, 1, 0)
    assert answer["tuned"]["target_tokens"] == 510


def test_a_dry_run_evaluates_a_few_windows_of_a_long_text(
    spectune: Spectune, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import spectune.training as training

    seen: list[list[Example]] = []
    original = training.train

    def train(model: Any, tokenizer: Any, delta: Any, rows: Any, held_out: Any, *more: Any, **named: Any) -> Any:
        seen.append(held_out.examples)
        return original(model, tokenizer, delta, rows, held_out, *more, **named)

    monkeypatch.setattr(training, "train", train)
    path = tmp_path / "long.txt"
    path.write_text("once upon a time " * 300)
    result = spectune("train", "--model", base, "--data", path, "--valid", path, "--dry-run", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    [few] = seen
    assert len(few) == 16
    assert max(len(example.input_ids) for example in few) <= 160


@pytest.mark.parametrize("command", ["generate", "eval"])
def test_model_names_the_base_of_a_delta_that_does_not(
    spectune: Spectune, run: Path, base: Path, rows: Path, command: str
) -> None:
    folder = Path(shutil.copytree(run / "best", "alone"))
    for file, key in (("spectune.json", "base_name"), ("adapter_config.json", "base_model_name_or_path")):
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, key: None}))
    few = ("--data", rows, "--max-new-tokens", "2", "--device", "cpu")
    refused = spectune(command, "--run", folder, *few)
    assert refused.exit_code == 3
    assert "name it with --model" in refused.stderr
    result = spectune(command, "--run", folder, "--model", base, *few)
    assert result.exit_code == 0, result.stderr
    record(run, model="moved/away")
    shutil.rmtree(folder)
    assert spectune(command, "--run", run, "--model", base, *few).exit_code == 0


def commands_in_readme() -> list[list[str]]:
    import shlex

    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("spectune ")]
    assert lines
    return [shlex.split(line, comments=True)[1:] for line in lines]


def test_the_readmes_commands_parse() -> None:
    import typer

    group: Any = typer.main.get_command(build_app())
    for name, *arguments in commands_in_readme():
        assert name in group.commands, name
        group.commands[name].make_context(name, arguments)  # raises on an unknown flag, runs nothing
