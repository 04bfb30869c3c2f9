from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from spectune.deltas import attach, route
from spectune.errors import ConfigError
from spectune.inference import Sampling, context_length, decoded, generate_ids, generate_texts, stop_ids
from spectune.methods import PrefixTuning, PromptTuning

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [16, 17], [8, 8]]


@pytest.fixture(autouse=True)
def no_log_warnings() -> Iterator[None]:
    """transformers warns through its logger, which pytest's filter does not see."""
    records: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    collector = Collector(logging.WARNING)
    logger = logging.getLogger("transformers")
    logger.addHandler(collector)
    yield
    logger.removeHandler(collector)
    assert records == []


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: list[int], tokens: int) -> list[int]:
    """One row, no padding, no cache: the definition."""
    training = model.training
    model.eval()
    ids = list(prompt)
    for _ in range(tokens):
        logits = model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    model.train(training)
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_padded_batches_with_cache_write_what_each_row_writes_alone(model: PreTrainedModel, batch_size: int) -> None:
    found = generate_ids(model, PROMPTS, max_new_tokens=9, batch_size=batch_size)
    assert found == [greedy(model, prompt, 9) for prompt in PROMPTS]


@pytest.mark.parametrize("method", [PrefixTuning(num_virtual_tokens=3), PromptTuning(num_virtual_tokens=3)])
def test_rows_run_under_the_route_with_virtual_tokens_too(
    model: PreTrainedModel, method: PrefixTuning | PromptTuning
) -> None:
    base = generate_ids(model, PROMPTS, max_new_tokens=6)
    delta = attach(model, method, name="a")
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.mul_(5)
    tuned = generate_ids(model, PROMPTS, max_new_tokens=6)
    assert tuned == [greedy(model, prompt, 6) for prompt in PROMPTS]
    assert tuned != base
    assert context_length(model) == 29
    with route(model, None):
        assert generate_ids(model, PROMPTS, max_new_tokens=6) == base
        assert context_length(model) == 32


def test_a_row_ends_before_its_first_stop_token_though_padding_is_the_same_token(model: PreTrainedModel) -> None:
    free = [greedy(model, prompt, 12) for prompt in PROMPTS]
    stop = free[0][2]
    found = generate_ids(model, PROMPTS, max_new_tokens=12, stops=[stop], pad_token_id=stop)
    assert found == [ids[: ids.index(stop)] if stop in ids else ids for ids in free]
    assert stop not in found[0]


def test_stop_tokens_are_those_of_tokenizer_and_checkpoint(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert stop_ids(model, tokenizer) == [0]
    model.generation_config.eos_token_id = [7, 0]
    assert stop_ids(model, tokenizer) == [0, 7]


def test_texts_are_the_decoded_continuations(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    expected = []
    for prompt in PROMPTS:
        ids = greedy(model, prompt, 8)
        expected.append(tokenizer.decode(ids[: ids.index(0)] if 0 in ids else ids))
    assert generate_texts(model, tokenizer, PROMPTS, max_new_tokens=8) == expected


def test_the_checkpoints_own_generation_defaults_have_no_say(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = generate_texts(model, tokenizer, PROMPTS, max_new_tokens=8)
    own = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.5, repetition_penalty=9.0, max_length=11)
    model.generation_config = own
    assert generate_texts(model, tokenizer, PROMPTS, max_new_tokens=8) == plain
    assert model.generation_config is own


def test_modes_and_random_state_are_given_back(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    frozen = next(module for module in model.modules() if isinstance(module, torch.nn.Embedding))
    frozen.eval()
    before = torch.get_rng_state()
    generate_texts(model, tokenizer, PROMPTS, max_new_tokens=3, sampling=Sampling())
    assert torch.equal(torch.get_rng_state(), before)
    assert [m for m in model.modules() if not m.training] == [frozen]


def test_sampling_is_a_function_of_the_seed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    def draw(seed: int) -> list[str]:
        return generate_texts(model, tokenizer, PROMPTS, max_new_tokens=8, sampling=Sampling(seed=seed))

    torch.manual_seed(1)
    first = draw(3)
    torch.manual_seed(2)
    assert draw(3) == first
    assert draw(4) != first
    cold = generate_texts(model, tokenizer, PROMPTS, max_new_tokens=8, sampling=Sampling(top_k=1, temperature=0.5))
    assert cold == generate_texts(model, tokenizer, PROMPTS, max_new_tokens=8)


def test_a_row_near_the_end_of_the_context_is_shorter_and_its_neighbours_are_not(model: PreTrainedModel) -> None:
    long = [1 + index % 30 for index in range(29)]
    found = generate_ids(model, [PROMPTS[0], long, PROMPTS[1]], max_new_tokens=8)
    assert [len(ids) for ids in found] == [8, 3, 8]
    assert found == [greedy(model, PROMPTS[0], 8), greedy(model, long, 3), greedy(model, PROMPTS[1], 8)]


@pytest.mark.parametrize(
    ("prompts", "tokens", "message"),
    [
        ([[1], []], 4, "prompt 2 is empty"),
        ([[1], [2] * 32], 4, "prompt 2 has 32 tokens; this base takes 32"),
        ([[1]], 0, "max_new_tokens = 0"),
    ],
)
def test_prompts_that_cannot_be_continued_are_named(
    model: PreTrainedModel, prompts: list[list[int]], tokens: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        generate_ids(model, prompts, max_new_tokens=tokens)


def test_no_prompt_gives_no_text(model: PreTrainedModel) -> None:
    assert generate_ids(model, [], max_new_tokens=4) == []


def test_special_tokens_are_text_but_for_eos_bos_and_padding(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<river>"], "pad_token": "<pad>"})
    river, pad = tokenizer.convert_tokens_to_ids(["<river>", "<pad>"])
    assert decoded(tokenizer, [river, 5, pad, 0, 6]) == tokenizer.decode([river, 5, 6])
    assert "<river>" in decoded(tokenizer, [river])
    assert decoded(tokenizer, [0, pad]) == ""
