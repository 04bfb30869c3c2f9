"""What was proved of a base is kept by who attaches to it again, and nothing is proved twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spectune.compute.varlen import loop_by_document
from spectune.deltas import BaseFacts, attach, detach, kernel_serves, why_mask_is_needed, why_not_packed
from spectune.methods import BitFit, FullFineTuning, LoRA, PrefixTuning, PromptTuning
from tests.support import make_model

METHODS = [LoRA(r=2), BitFit(), PromptTuning(num_virtual_tokens=2), FullFineTuning()]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_base_is_not_run_for_what_is_known_of_it(method: Any) -> None:
    model, facts, runs = make_model(), BaseFacts(), list[int]()
    model.register_forward_hook(lambda *_: runs.append(1))

    def prove(seed: int) -> dict[str, torch.Tensor]:
        delta = attach(model, method, "a", seed=seed, keep_base=method.trains_base, facts=facts)
        assert why_mask_is_needed(model) is None
        assert why_not_packed(model) is None
        assert kernel_serves(model, loop_by_document)
        weights = {name: tensor.clone() for name, tensor in delta.state_dict().items()}
        detach(model, "a")
        return weights

    first = prove(seed=0)
    assert runs
    runs.clear()
    again = prove(seed=0)
    assert not runs
    assert facts.identity is not None
    assert first.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())


def test_other_settings_of_a_method_are_proved_by_themselves() -> None:
    model, facts, runs = make_model(), BaseFacts(), list[int]()
    model.register_forward_hook(lambda *_: runs.append(1))
    for method in (LoRA(r=2), LoRA(r=2, target_modules=["c_attn"])):
        runs.clear()
        attach(model, method, "a", facts=facts)
        assert why_not_packed(model) is None
        assert runs
        detach(model, "a")


def test_another_attention_function_is_no_other_base() -> None:
    """Prefix tuning exchanges it, and what it computes but for prefixes is the same."""
    model, runs = make_model(), list[int]()
    attach(model, LoRA(r=2), "a")
    attach(model, PrefixTuning(num_virtual_tokens=2), "prefix")
    model.register_forward_hook(lambda *_: runs.append(1))
    attach(model, LoRA(r=4), "b")
    attach(model, PrefixTuning(num_virtual_tokens=3), "prefix-3", seed=1)
    assert len(runs) <= 1  # a prefix takes its first keys and values of one text
