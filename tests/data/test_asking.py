"""What a user asks reaches a model exactly as a training row's prompt did."""

from __future__ import annotations

from typing import Any

import pytest

from spectune.data import Row, encode, prompt_ids
from spectune.data.asking import PromptForm, asked_ids
from spectune.data.shapes import row_of
from spectune.errors import ConfigError
from tests.support import tiny_tokenizers

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT = [
    {"role": "user", "content": "who"}, {"role": "assistant", "content": "me"}, {"role": "user", "content": "why"}
]  # fmt: skip


@pytest.fixture
def tokenizer() -> Any:
    return tiny_tokenizers.byte_level()


@pytest.fixture
def chatting() -> Any:
    made = tiny_tokenizers.byte_level(eos="</s>")
    made.chat_template = TEMPLATE
    return made


def learned_from(record: dict[str, Any], tokenizer: Any, **how: Any) -> list[int]:
    """The ids before the last answer of a training row."""
    [example] = encode([row_of("r", record)], tokenizer, max_length=4096, train_on="last", **how).examples
    return example.input_ids[: example.length - example.target_tokens]


def asked(form: PromptForm, messages: list[dict[str, Any]], tokenizer: Any) -> list[int]:
    return asked_ids(form.chat(messages, tokenizer), form.encoder(tokenizer))


def test_a_chat_is_asked_as_one_was_learned(chatting: Any) -> None:
    expected = learned_from({"messages": [*CHAT, {"role": "assistant", "content": "so"}]}, chatting)
    for form in (PromptForm(), PromptForm(row_shape="messages")):
        assert asked(form, CHAT, chatting) == expected


def test_the_system_message_that_all_chats_had_stands_before_one_that_has_none(chatting: Any) -> None:
    form = PromptForm(row_shape="messages", row_system="be brief")
    system = {"role": "system", "content": "be brief"}
    assert asked(form, CHAT, chatting) == asked(form, [system, *CHAT], chatting)
    own = [{"role": "developer", "content": "be long"}, *CHAT]
    assert "be brief" not in chatting.decode(asked(form, own, chatting))
    assert "<|system|>be long" in chatting.decode(asked(form, own, chatting))


def test_without_a_template_earlier_turns_stand_as_history_does_in_training(tokenizer: Any) -> None:
    alpaca = {"instruction": "why", "output": "so", "history": [["who", "me"]]}
    assert asked(PromptForm(row_shape="alpaca"), CHAT, tokenizer) == learned_from(alpaca, tokenizer)
    form = PromptForm(row_shape="prompt", prompt_ends_with=":\n", separator=" ")
    ids = asked(form, CHAT, tokenizer)
    assert tokenizer.decode(ids) == "who:\n me<|endoftext|>\n\nwhy:\n "
    assert asked(form, CHAT[:1], tokenizer) == prompt_ids(Row("r", prompt="who:\n", completion=""), tokenizer, " ")


def test_without_a_template_a_system_message_stands_before_the_first_prompt(tokenizer: Any) -> None:
    given = [{"role": "system", "content": "be brief"}, CHAT[0]]
    assert tokenizer.decode(asked(PromptForm(), given, tokenizer)) == "be brief\n\nwho"
    ids = asked(PromptForm(row_shape="alpaca"), given, tokenizer)
    assert ids == learned_from({"instruction": "who", "output": "so", "system": "be brief"}, tokenizer)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "are none"),
        ([*CHAT[:2]], "end with 'assistant'"),
        ([{"role": "user"}], "expected text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "expected text alone"),
        (["who"], "expected {'role'"),
        ([{"role": "user", "content": "\ud83d"}], "half a character"),
        ([{"role": "tool", "content": "12"}], "no chat template"),
        ([CHAT[0], CHAT[0]], "in turn"),
    ],
)
def test_what_is_no_conversation_is_refused(messages: list[Any], said: str, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=said):
        PromptForm().chat(messages, tokenizer)


def test_what_a_template_refuses_is_said(chatting: Any) -> None:
    chatting.chat_template = "{{ raise_exception('no tools here') }}"
    form = PromptForm()
    with pytest.raises(ConfigError, match=r"messages: the tokenizer's chat template refuses.*no tools here"):
        asked_ids(form.chat(CHAT, chatting), form.encoder(chatting))
