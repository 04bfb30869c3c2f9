from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from spectune.errors import ConfigError
from spectune.inference import decode, decode_tokens_per_second


def test_the_prefill_and_the_warm_up_are_not_in_the_time(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    # one pair of readings for the warm-up run and each repeat: 100 s (not counted), then 3 s, 1 s, 2 s
    readings = iter([0.0, 100.0, 0.0, 3.0, 5.0, 6.0, 10.0, 12.0])
    monkeypatch.setattr(decode, "time", SimpleNamespace(perf_counter=lambda: next(readings)))
    rate = decode_tokens_per_second(model, tokenizer, batch=2, new_tokens=5, repeats=3, prompt_tokens=3)
    assert rate == 2 * 4 / 2.0
    assert next(readings, None) is None


def test_eos_does_not_stop_it(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    # every token is a stop token of the checkpoint but one
    model.generation_config.eos_token_id = list(range(39))
    lengths = []
    model.register_forward_hook(lambda module, args, output: lengths.append(output.logits.shape))
    assert decode_tokens_per_second(model, tokenizer, new_tokens=6, repeats=1, prompt_tokens=3) > 0
    assert len(lengths) == 2 * 6


def test_mode_is_given_back(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    decode_tokens_per_second(model, tokenizer, new_tokens=2, repeats=1, prompt_tokens=2, warm_up=0)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"new_tokens": 1}, "new_tokens = 1"),
        ({"repeats": 0}, "repeats = 0"),
        ({"new_tokens": 30}, "16 prompt tokens and 30 new ones; this base takes 32"),
    ],
)
def test_settings_that_measure_nothing_are_refused(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, arguments: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        decode_tokens_per_second(model, tokenizer, **arguments)
