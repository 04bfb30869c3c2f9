"""What is learned of a sequence as text, and rows that stand twice."""

from __future__ import annotations

from typing import Any

import pytest

from spectune.data import encode, load_rows
from spectune.data.marked_text import marked, stretches
from spectune.data.overlaps import NAMED, Seen
from tests.support.chat_templates import tokenizer_for
from tests.support.tokenizers_zoo import KINDS

CHAT = [
    {"role": "user", "content": "hi there"}, {"role": "assistant", "content": "yes no"},
    {"role": "user", "content": "hi"}, {"role": "assistant", "content": "no because yes"},
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_stretches_of_a_sequence_are_its_text_and_its_learned_ids(kind: str) -> None:
    tokenizer = tokenizer_for("chatml", kind)
    rows = load_rows([{"messages": CHAT}, {"prompt": "hi", "completion": " yes no"}, {"text": "yes no maybe"}])
    for example in encode(rows, tokenizer, max_length=200).examples:
        pieces = stretches(example, tokenizer)
        assert "".join(piece.text for piece in pieces) == tokenizer.decode(example.input_ids)
        learned = [piece.text.strip() for piece in pieces if piece.learned]
        spans = [example.input_ids[max(start, 1) : stop] for start, stop in example.targets]
        assert learned == [str(tokenizer.decode(ids)).strip() for ids in spans]
        assert marked(pieces).count("[[") == len(learned)


def twice(*records: dict[str, Any]) -> tuple[int, int]:
    found = Seen(load_rows(list(records))).repeats
    return found.rows, found.prompts


def test_chats_are_equal_by_all_that_the_model_sees() -> None:
    asked, tools = {"messages": CHAT}, {"tools": [{"name": "f"}]}
    sharegpt = {"conversations": [{"from": m["role"], "value": m["content"] + " "} for m in CHAT]}
    assert twice(asked, sharegpt) == (1, 0)
    assert twice(asked, {"messages": [*CHAT[:3], {"role": "assistant", "content": "maybe"}]}) == (0, 1)
    assert twice(asked, {"messages": [{"role": "system", "content": "be brief"}, *CHAT]}) == (0, 0)
    assert twice(asked, asked | tools, asked | tools) == (1, 0)
    called = [{"name": "f", "arguments": {"x": number}} for number in (1, 2)]
    calls = [{"messages": [CHAT[0], {"role": "assistant", "tool_calls": [call]}]} for call in called]
    assert twice(calls[0], calls[1], calls[0]) == (1, 1)


def test_alpaca_rows_are_equal_to_the_prompts_that_they_become() -> None:
    alpaca = {"instruction": "do", "output": "done"}
    [row] = load_rows([alpaca])
    assert twice(alpaca, {"prompt": row.prompt, "completion": "done"}) == (1, 0)
    assert twice(alpaca, alpaca | {"history": [["a", "b"]]}) == (0, 0)


def test_rows_without_a_prompt_have_no_prompt_in_common() -> None:
    assert twice({"prompt": "", "completion": "a"}, {"prompt": "", "completion": "b"}) == (0, 0)
    assert twice({"text": "a"}, {"text": "b"}, {"prompt": " ", "completion": "a"}) == (1, 0)


def test_a_few_rows_are_named_and_all_are_counted() -> None:
    rows = load_rows([{"text": "yes"}] * 20)
    found = Seen(rows).repeats
    assert found.rows == 19
    assert [tuple(pair) for pair in found.equal_rows] == [(f"row {n}", "row 1") for n in range(2, 2 + NAMED)]
