"""Text in pieces is the text that the ids decode to, whatever the tokenizer does at the edges of tokens."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tests.support import tiny_tokenizers

from spectune.inference import decoded
from spectune.inference.written_text import WrittenText

KINDS = {"byte_level": tiny_tokenizers.byte_level, "metaspace": tiny_tokenizers.metaspace,
         "wordpiece": tiny_tokenizers.wordpiece}  # fmt: skip
TEXT = "the quick brown fox: 12 or naïve हिन्दी 東京 🦊🦊 <tag> lazy  dogs, who knows\n\nyes"


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]()


def pieces(tokenizer: Any, ids: list[int], *stops: str) -> tuple[list[str], WrittenText]:
    writing = WrittenText(tokenizer, stops)
    return [*(writing.add(token) for token in ids), writing.end()], writing


def test_all_pieces_together_are_the_decoded_text_and_none_is_half_a_character(tokenizer: Any) -> None:
    ids = tokenizer(TEXT * 3, add_special_tokens=False)["input_ids"]
    found, writing = pieces(tokenizer, ids)
    assert "".join(found) == writing.text == decoded(tokenizer, ids)
    assert sum(map(bool, found)) > len(ids) // 3  # it is given as it comes, not at the end
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in found)


@pytest.mark.parametrize("seed", range(20))
def test_bytes_that_are_no_text_are_given_as_the_decoder_has_them(seed: int) -> None:
    tokenizer = tiny_tokenizers.byte_level()
    ids = random.Random(seed).choices(range(len(tokenizer)), k=120)
    assert "".join(pieces(tokenizer, ids)[0]) == decoded(tokenizer, ids)


@pytest.mark.parametrize("seed", range(5))
def test_no_bytes_stop_the_text_for_good(seed: int) -> None:
    """A decoder that falls back to bytes writes a whole run of them otherwise when one more does not fit."""
    tokenizer = tiny_tokenizers.metaspace()
    ids = random.Random(seed).choices(range(len(tokenizer)), k=200)
    fox = tokenizer("the quick brown fox", add_special_tokens=False)["input_ids"]
    found, writing = pieces(tokenizer, [*ids, *fox])
    assert writing.text == "".join(found)
    assert writing.text.endswith("the quick brown fox")


@pytest.mark.parametrize(
    "stops", [("fox",), ("\n\n",), ("quick br", "brown"), ("nowhere", "ox: 1"), ("🦊🦊",), ("yes",)]
)
def test_a_stop_string_ends_the_text_before_it_and_no_part_of_one_is_ever_shown(
    tokenizer: Any, stops: tuple[str, ...]
) -> None:
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    whole = decoded(tokenizer, ids)
    place = min((whole.find(stop) for stop in stops if stop in whole), default=len(whole))
    found, writing = pieces(tokenizer, ids, *stops)
    assert "".join(found) == whole[:place]
    assert writing.found == (place < len(whole))
    assert writing.add(ids[0]) == "" or not writing.found


def test_what_only_began_like_a_stop_string_is_shown_at_the_end() -> None:
    tokenizer = tiny_tokenizers.byte_level()
    ids = tokenizer("the answer is ye", add_special_tokens=False)["input_ids"]
    found, _ = pieces(tokenizer, ids, "yes")
    assert found[-1] == "ye"


def test_frame_tokens_are_no_text() -> None:
    tokenizer = tiny_tokenizers.byte_level()
    ids = tokenizer("yes", add_special_tokens=False)["input_ids"]
    assert "".join(pieces(tokenizer, [*ids, tokenizer.eos_token_id, *ids])[0]) == "yesyes"
