"""The adapter's answers against each text alone, unpadded, in float64; lm-eval itself is not needed."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from spectune.deltas import attach, route
from spectune.errors import ConfigError, DataError
from spectune.evaluation.harness import HarnessModel, check_installed, harness_metrics
from spectune.methods import LoRA


def ask(*arguments: Any) -> list[Any]:
    """Requests as the harness makes them, as far as the adapter looks at them."""
    return [SimpleNamespace(args=one) for one in arguments]


@torch.no_grad()
def reference(model: PreTrainedModel, ids: list[int], start: int) -> tuple[float, bool]:
    model.eval()
    log_p = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    total = sum(float(log_p[t - 1, ids[t]]) for t in range(start, len(ids)))
    return total, all(int(log_p[t - 1].argmax()) == ids[t] for t in range(start, len(ids)))


def test_loglikelihood(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    likely = int(model.eval()(input_ids=torch.tensor([[5, 6]])).logits[0, -1].argmax())
    found = HarnessModel(model, tokenizer, 2).loglikelihood(
        ask(("w5 w6", " w8 w9"), ("w5 w6 ", "w8"), ("", "w3 w4"), ("w5 w6", f" w{likely}"))
    )
    ids = [([5, 6, 8, 9], 2), ([5, 6, 8], 2), ([0, 3, 4], 1), ([5, 6, likely], 2)]
    expected = [reference(model, *one) for one in ids]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert found[3][1]


def test_a_long_context_loses_its_beginning(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    words = [1 + i % 39 for i in range(40)]
    context = " ".join(f"w{i}" for i in words)
    [(value, _)] = HarnessModel(model, tokenizer).loglikelihood(ask((context, " w2 w3")))
    ids = [*words[-30:], 2, 3]
    assert value == pytest.approx(reference(model, ids, 30)[0], rel=1e-5)
    with pytest.raises(DataError, match="a continuation of 40 tokens; this base takes 32"):
        HarnessModel(model, tokenizer).loglikelihood(ask(("w1", f" {context}")))


def test_rolling_predicts_every_token_once(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    words = [1 + i % 39 for i in range(40)]
    text = " ".join(f"w{i}" for i in words)
    found = HarnessModel(model, tokenizer).loglikelihood_rolling(ask((text,), ("w1 w2",)))
    ids = [0, *words]
    whole = reference(model, ids[:32], 1)[0] + reference(model, ids[-32:], 32 - 9)[0]
    assert found == pytest.approx([whole, reference(model, [0, 1, 2], 1)[0]], rel=1e-5)


def test_generate_until(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    adapter = HarnessModel(model, tokenizer)
    [free, short] = adapter.generate_until(
        ask(("w5 w6", {"until": [], "max_gen_toks": 6}), ("w5 w6", {"until": ["zz"], "max_gen_toks": 3}))
    )
    words = free.split()
    assert len(words) >= 2
    assert short.split() == words[:3]
    stop = words[1]
    [cut] = adapter.generate_until(ask(("w5 w6", {"until": [stop], "max_gen_toks": 6, "do_sample": False})))
    assert cut == free.split(stop)[0]
    long = " ".join(["w7"] * 50)
    assert adapter.generate_until(ask((long, {"until": "w99", "max_gen_toks": 4}))) == adapter.generate_until(
        ask((" ".join(["w7"] * 28), {"max_gen_toks": 4}))
    )


def test_it_is_the_current_route(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    request = ask(("w5", " w6"))
    before = HarnessModel(model, tokenizer).loglikelihood(request)
    delta = attach(model, LoRA(r=2))
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(0.3)
    adapter = HarnessModel(model, tokenizer)
    assert adapter.loglikelihood(request)[0][0] != pytest.approx(before[0][0], rel=1e-3)
    with route(model, None):
        assert adapter.loglikelihood(request) == before


def test_without_the_extra_the_command_that_installs_it_is_named(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'spectune\[lm-eval\]'"):
        check_installed()
    with pytest.raises(ConfigError, match="lm-eval-harness is not installed"):
        harness_metrics(model, tokenizer, ["hellaswag"])
