"""`spectune chat`: what a line is, what stays of a conversation, and how it ends."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from spectune.cli.app import build_app
from spectune.data import Row
from spectune.data.asking import PromptForm
from spectune.inference import Engine

Spectune = Callable[..., Any]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def chat_base(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(base, tmp_path_factory.mktemp("chats") / "base"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def talk(spectune: Spectune) -> Callable[..., Any]:
    def call(model: Path, typed: str | bytes, *flags: str | Path) -> Any:
        words = ["chat", "--model", model, "--device", "cpu", "--max-new-tokens", "3", *flags]
        return CliRunner().invoke(build_app(), [str(word) for word in words], input=typed)

    return call


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The messages of each question."""
    seen: list[Any] = []
    real = PromptForm.chat

    def chat(self: PromptForm, messages: Any, *given: Any) -> Row:
        seen.append([(message["role"], message["content"]) for message in messages])
        return real(self, messages, *given)

    monkeypatch.setattr(PromptForm, "chat", chat)
    return seen


def test_a_line_of_a_run_on_prompts_is_answered_as_generate_does(
    talk: Callable[..., Any], spectune: Spectune, base: Path, trained: Callable[[str], Path]
) -> None:
    run = trained("lora")
    found = talk(base, "number 1\nnumber 2\r\n\n//x\n", "--run", run)
    assert found.exit_code == 0, found.stderr
    alone = spectune("generate", "number 1", "number 2", "/x", "--run", run, "--max-new-tokens", "3", "--json")
    expected = [output["completion"] for output in json.loads(alone.stdout)["outputs"]]
    assert found.stdout == "".join(f"{text}\n" for text in expected)
    assert "each line is a prompt by itself" in found.stderr


def test_a_conversation_grows_begins_anew_and_has_a_system_message(
    talk: Callable[..., Any], chat_base: Path, asked: list[Any]
) -> None:
    found = talk(chat_base, "one\ntwo\n/reset\nthree\n/system Be brief.\nfour\n/exit\nfive\n")
    assert found.exit_code == 0, found.stderr
    first, second, third, fourth = asked
    assert (first, third) == ([("user", "one")], [("user", "three")])
    assert [role for role, _ in second] == ["user", "assistant", "user"]
    assert second[1][1] in found.stdout
    assert fourth == [("system", "Be brief."), ("user", "four")]


def test_the_earliest_turns_leave_where_the_context_ends(
    talk: Callable[..., Any], chat_base: Path, asked: list[Any]
) -> None:
    found = talk(chat_base, "".join(f"{letter * 45}\n" for letter in "abcd"))
    assert found.exit_code == 0, found.stderr
    assert "its earliest turn is left out" in found.stderr
    assert asked[-1][0][1] != "a" * 45
    too_long = talk(chat_base, "x" * 400 + "\nyes\n")
    assert "tokens; this base takes 160" in too_long.stderr
    assert too_long.stdout.count("\n") == 2  # and the next line is answered


def test_commands_are_listed_and_what_is_none_is_said(talk: Callable[..., Any], base: Path) -> None:
    found = talk(base, "/help\n/what\n/system x\n")
    assert found.exit_code == 0
    assert found.stdout == ""
    assert "/reset" in found.stderr
    assert "/what is no command" in found.stderr
    assert "no system message" in found.stderr


def test_what_is_no_text_is_a_line_as_any_other(talk: Callable[..., Any], base: Path) -> None:
    found = talk(base, b"\xff\xfe\n\x1b[31m\nend")
    assert found.exit_code == 0, found.stderr
    assert "\x1b" not in found.stdout


def test_ctrl_c_stops_an_answer_and_sigterm_the_conversation(
    talk: Callable[..., Any], chat_base: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, steps = Engine.step, []

    def interrupted(self: Engine) -> Any:
        steps.append(1)
        if len(steps) == 2:
            signal.raise_signal(signal.SIGINT)
        if len(asked) == 4:
            signal.raise_signal(signal.SIGTERM)
        return step(self)

    monkeypatch.setattr(Engine, "step", interrupted)
    found = talk(chat_base, "one\ntwo\nthree\nfour\nfive\n")
    assert "(stopped)" in found.stderr
    assert [role for role, _ in asked[1]] == ["user", "assistant", "user"]  # what was written of it was said
    assert found.exit_code == 130
    assert "stopped: SIGTERM" in found.stderr
    assert "five" not in str(asked)
