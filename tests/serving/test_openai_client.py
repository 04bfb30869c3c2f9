"""The official client, against a real server."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from spectune.deltas import detach
from spectune.inference import Request, Sampling, decoded, generate_ids
from spectune.inference.engine import Engine
from spectune.storage import load_delta
from tests.serving.conftest import METHODS, Material
from tests.serving.server import Running

PROMPT = "the quick brown fox"


def solo(material: Material, name: str, ids: list[int], new: int, **how: Any) -> list[int]:
    """What is written for one prompt alone, by `generate`."""
    model = material.made
    if name != "tiny":
        load_delta(model, material.deltas / name, name="solo")
    try:
        [found] = generate_ids(model, [ids], max_new_tokens=new, stops=[320], pad_token_id=320, **how)
    finally:
        if name != "tiny":
            detach(model, "solo")
    return found


@pytest.fixture(scope="module")
def client(served: Running) -> Iterator[openai.OpenAI]:
    with served.client() as found:
        yield found


def test_models_are_the_base_and_every_delta(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names[0] == "tiny"
    assert set(names) == {"tiny", *METHODS}
    assert client.models.retrieve("lora").id == "lora"


@pytest.mark.parametrize("name", ["tiny", *METHODS])
def test_a_completion_is_what_generate_writes(name: str, client: openai.OpenAI, material: Material) -> None:
    ids = material.ids(PROMPT)
    found = client.completions.create(model=name, prompt=PROMPT, max_tokens=12, temperature=0)
    expected = solo(material, name, ids, 12)
    assert found.choices[0].text == decoded(material.tokenizer, expected)
    assert found.choices[0].finish_reason == ("length" if len(expected) == 12 else "stop")
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(ids), len(expected))
    assert found.usage.total_tokens == len(ids) + len(expected)


def test_a_stream_is_the_same_text_in_pieces_with_the_usage_at_its_end(client: openai.OpenAI) -> None:
    asked: Any = {"model": "prefix", "prompt": [PROMPT, "who knows"], "max_tokens": 10, "temperature": 0, "n": 2}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    texts, ends = ["", "", "", ""], [None, None, None, None]
    for chunk in chunks[:-1]:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert chunks[-1].usage == whole.usage
    assert len(chunks) > 10
    assert not chunks[-1].choices


def test_a_chat_without_a_template_is_asked_as_a_prompt(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": PROMPT}]
    chat = client.chat.completions.create(model="ia3", messages=messages, max_tokens=8, temperature=0)
    text = client.completions.create(model="ia3", prompt=PROMPT, max_tokens=8, temperature=0).choices[0].text
    assert chat.choices[0].message.content == text
    assert chat.choices[0].message.role == "assistant"
    chunks = list(
        client.chat.completions.create(model="ia3", messages=messages, max_tokens=8, temperature=0, stream=True)
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == text
    assert chunks[-1].choices[0].finish_reason == chat.choices[0].finish_reason


def test_a_chat_that_names_no_limit_goes_on_to_the_end_of_the_context(
    client: openai.OpenAI, material: Material
) -> None:
    found = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": PROMPT}], temperature=0, logprobs=True
    )
    assert found.usage is not None
    assert found.choices[0].finish_reason == "stop" or found.usage.total_tokens == 96


def test_a_stop_string_ends_the_answer_before_it(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="dora", prompt=PROMPT, max_tokens=30, temperature=0).choices[0].text
    stop = whole[8:11]
    found = client.completions.create(model="dora", prompt=PROMPT, max_tokens=30, temperature=0, stop=[stop, "\0"])
    assert found.choices[0].text == whole[: whole.find(stop)]
    assert found.choices[0].finish_reason == "stop"
    pieces = client.completions.create(
        model="dora", prompt=PROMPT, max_tokens=30, temperature=0, stop=stop, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in pieces) == found.choices[0].text


def test_log_probabilities_are_the_model_s(client: openai.OpenAI, material: Material) -> None:
    import torch

    found = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=6, temperature=0, logprobs=3).choices[0]
    ids = material.ids(PROMPT)
    written = solo(material, "tiny", ids, 6)
    with torch.no_grad():
        expected = material.made(torch.tensor([ids + written])).logits[0, len(ids) - 1 : -1].double().log_softmax(-1)
    assert found.logprobs is not None
    assert found.logprobs.token_logprobs is not None
    assert found.logprobs.tokens == [material.tokenizer.decode([token]) for token in written]
    for place, (token, said) in enumerate(zip(written, found.logprobs.token_logprobs, strict=True)):
        assert math.isclose(said or 0, float(expected[place, token]), abs_tol=1e-4)
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": PROMPT}], max_tokens=6, temperature=0, logprobs=True,
        top_logprobs=2,
    )  # fmt: skip
    assert chat.choices[0].logprobs is not None
    assert chat.choices[0].logprobs.content is not None
    for score, token in zip(chat.choices[0].logprobs.content, written, strict=True):
        assert len(score.top_logprobs) == 2
        assert score.top_logprobs[0].token == score.token  # greedy
        assert bytes(score.bytes or []).decode(errors="replace") == material.tokenizer.decode([token])


def test_a_seed_repeats_an_answer_and_every_choice_of_one_request_is_its_own(
    client: openai.OpenAI, material: Material
) -> None:
    asked: Any = {"model": "lora", "prompt": PROMPT, "max_tokens": 12, "temperature": 1.3, "top_p": 0.9, "n": 3}
    first = [choice.text for choice in client.completions.create(**asked, seed=7).choices]
    assert first == [choice.text for choice in client.completions.create(**asked, seed=7).choices]
    assert len(set(first)) == 3
    assert first != [choice.text for choice in client.completions.create(**asked, seed=8).choices]
    load_delta(material.made, material.deltas / "lora", name="solo")
    engine = Engine(material.made, rows=1, pad_token_id=320)
    sampling = Sampling(7, 1.3, 0.9)
    tickets = [engine.submit(Request(material.ids(PROMPT), 12, "solo", (320,), sampling, i)) for i in range(3)]
    while not engine.idle:
        engine.step()
    detach(material.made, "solo")
    assert first == [decoded(material.tokenizer, ticket.ids) for ticket in tickets]


def test_ids_go_as_they_are(client: openai.OpenAI, material: Material) -> None:
    ids = material.ids(PROMPT)
    for prompt in (ids, [ids]):
        found = client.completions.create(model="bitfit", prompt=prompt, max_tokens=5, temperature=0)  # type: ignore[arg-type]
        assert found.choices[0].text == decoded(material.tokenizer, solo(material, "bitfit", ids, 5))


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ({"model": "loora"}, openai.NotFoundError, "did you mean 'lora'"),
        ({"model": "../deltas/lora"}, openai.NotFoundError, "does not exist"),
        ({"prompt": "x" * 500}, openai.BadRequestError, "context is 96 tokens"),
        ({"max_tokens": 200}, openai.BadRequestError, "context is 96 tokens"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens: Input should be greater"),
        ({"temperature": 3}, openai.BadRequestError, "temperature: "),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "did you mean 'temperature'"),
        ({"echo": True}, openai.BadRequestError, "echo is not served here; leave it out, or give false"),
        ({"presence_penalty": 0.5}, openai.BadRequestError, "presence_penalty is not served"),
        ({"n": 129}, openai.BadRequestError, "129 choices"),
        ({"prompt": ""}, openai.BadRequestError, "prompt is empty"),
        ({"prompt": [9999]}, openai.BadRequestError, "token id 9999"),
        ({"prompt": [[1, 2], []]}, openai.BadRequestError, "prompt is empty"),
        ({"prompt": ["a", 1]}, openai.BadRequestError, "prompt: expected text, ids, or a list of one of them"),
        ({"prompt": [[1], [True]]}, openai.BadRequestError, "prompt: expected text, ids, or a list of one of them"),
        ({"stop": ["a", "b", "c", "d", "e"]}, openai.BadRequestError, "stop: "),
        ({"stream_options": {"include_usage": True}}, openai.BadRequestError, "only allowed with stream"),
    ],
)
def test_what_cannot_be_answered_is_an_error_of_the_client_s_own_class(
    asked: dict[str, Any], error: type[openai.APIStatusError], said: str, client: openai.OpenAI
) -> None:
    with pytest.raises(error) as raised:
        client.completions.create(**({"model": "tiny", "prompt": PROMPT} | asked))
    assert said in str(raised.value)
    assert {"message", "type", "param", "code"} == set(raised.value.body)  # type: ignore[call-overload]


def test_parameters_that_change_nothing_are_taken(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": [{"type": "text", "text": PROMPT}]}], max_tokens=2,
        user="me", metadata={"a": "b"}, store=False, presence_penalty=0, frequency_penalty=0.0, logit_bias={},
        response_format={"type": "text"}, seed=None, stop=None,
    )  # fmt: skip
    assert found.choices[0].finish_reason in ("stop", "length")
