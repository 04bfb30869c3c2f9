"""Where the tokens of a text stand, told by their bytes or by the tokenizer's offsets."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings

from spectune.data import encode, encoding, load_rows
from spectune.data.token_places import ByOffsets, TokenBytes
from spectune.data.tokenizing import Text, TextTokenizer, Tokens
from tests.data.test_template_properties import PROPERTY, TEXT
from tests.support.chat_templates import tokenizer_for
from tests.support.tokenizers_zoo import KINDS

#: an answer grows onto the space that its prompt ends with, in each turn
MERGING = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def chat(turns: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": role, "content": f"{said} {number}."}
            for number in range(turns)
            for role, said in (("user", "what is it, é or 🙂"), ("assistant", "it is the number"))
        ]
    }


@settings(PROPERTY, max_examples=200)
@given(TEXT, TEXT)
def test_bytes_and_offsets_tell_the_same_places(first: str, second: str) -> None:
    tokenizer = tokenizer_for("chatml", "byte_level")
    backend, text = tokenizer.backend_tokenizer, f"{first}<|im_start|>{second}"
    told = backend.encode(text, add_special_tokens=False)
    found = TokenBytes(backend).placed(told.ids, text)
    assert found is not None
    assert backend.decode(told.ids, skip_special_tokens=False) == text
    offsets = ByOffsets(told, text)
    specials = frozenset(tokenizer.all_special_ids)
    for place in range(1, len(text)):
        if (token := offsets.token_at(place)) is not None and token > 0:  # else a letter of several tokens begins here
            assert found.token_at(place) == token
            special = found.special_before(place, token, specials)
            assert special == offsets.special_before(place, token, specials)
            if special is not None:
                assert found.since(special, place) == offsets.since(special, place)


def test_ids_that_do_not_give_the_text_are_told_no_places_by_their_bytes() -> None:
    backend = tokenizer_for("chatml", "byte_level").backend_tokenizer
    ids = backend.encode("a text", add_special_tokens=False).ids
    assert TokenBytes(backend).placed(ids, "a text") is not None
    assert TokenBytes(backend).placed(ids, "A text") is None
    assert TokenBytes(backend).placed(ids, "a texts") is None
    assert TokenBytes(backend).placed([], "") is None


def test_each_token_s_bytes_are_what_the_tokenizer_decodes_it_to() -> None:
    tokenizer = tokenizer_for("chatml", "byte_level")
    backend = tokenizer.backend_tokenizer
    found = TokenBytes(backend)
    for token in range(len(tokenizer)):
        assert found[token].decode(errors="replace") == backend.decode([token], skip_special_tokens=False)
        assert found[token]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_encoded_together_as_each_by_itself(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_CHUNK", 3)
    tokenizer = tokenizer_for("chatml", kind)
    rows = load_rows([chat(1 + number % 4) for number in range(20)])
    together = encode(rows, tokenizer, max_length=1000)
    alone = [example for row in rows for example in encode([row], tokenizer, max_length=1000).examples]
    assert together.examples == alone
    assert together.report.kept == 20


@pytest.mark.parametrize("characters", [1, 300])
def test_no_more_text_is_tokenized_together_than_memory_has_room_for(
    characters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, rows = tokenizer_for("chatml", "byte_level"), load_rows([chat(2) for _ in range(30)])
    whole = encode(rows, tokenizer, max_length=1000)
    monkeypatch.setattr(encoding, "_CHARACTERS", characters)
    sizes = []
    tokenize = TextTokenizer.tokenize

    def counted(self: TextTokenizer, texts: list[Text]) -> Any:
        sizes.append(sum(len(text.text) for text in texts[:-1]))
        return tokenize(self, texts)

    monkeypatch.setattr(TextTokenizer, "tokenize", counted)
    monkeypatch.setattr(encoding, "_CHUNK", 20)
    assert encode(rows, tokenizer, max_length=1000).examples == whole.examples
    assert max(sizes) <= characters


def test_a_conversation_whose_seams_all_merge_takes_a_few_calls_for_each_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_for("chatml", "byte_level")
    texts = TextTokenizer(tokenizer)
    characters = 0
    ids = TextTokenizer._ids

    def counted(self: TextTokenizer, given: list[str]) -> list[list[int]]:
        nonlocal characters
        characters += sum(map(len, given))
        return ids(self, given)

    monkeypatch.setattr(TextTokenizer, "_ids", counted)
    text = "".join(f"user: what is {number}? bot: the number " for number in range(50))
    places = [at for at in range(len(text)) if text[at - 5 : at] == "bot: "]
    assert len(places) == 50
    [found] = texts.tokenize([Text(text, tuple(places), frozenset(places))])
    assert isinstance(found, Tokens)
    assert found.exact
    assert texts.decode(found.ids[: found.places[7]]) == text[: places[7]]
    assert characters < 10 * len(text)
