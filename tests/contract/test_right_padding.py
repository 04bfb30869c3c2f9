"""Rows padded on the right without an attention mask are those with one: the same loss and the same gradients, of every
method, on every family that the probe lets go without; and models that look at padding are found out."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertLMHeadModel, MambaConfig, MambaForCausalLM, PreTrainedModel

from spectune.data import Example, Row, collate
from spectune.deltas import Method, attach, attached, why_mask_is_needed
from spectune.errors import ConfigError
from spectune.methods import LoRA
from spectune.objectives import CAUSAL_LM
from tests.contract.conftest import CASES, move, put_on
from tests.contract.families import SIZES, TOKENS, VOCABULARY

LENGTHS = [9, 4, 13, 2]  # longer than Gemma's window of 6, and shorter


def batch() -> dict[str, Tensor]:
    drawn = random.Random(4)
    rows = [[drawn.randrange(1, VOCABULARY) for _ in range(length)] for length in LENGTHS]
    # the padding is a token like any other
    return collate([Example(row, n % 2, Row(f"t:{n}", text="")) for n, row in enumerate(rows)], 3)


def gradients(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    delta = attached(model)["task"]
    for parameter in delta.parameters():
        parameter.grad = None
    loss, count = CAUSAL_LM.loss_sum(model, inputs)
    (loss / count).backward()
    return float(loss.detach()), {name: p.grad for name, p in delta.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_mask_no_difference(model: PreTrainedModel, method: Method, attention: str, family: str) -> None:
    model.set_attn_implementation(attention)
    move(put_on(model, method))
    reason = why_mask_is_needed(model)
    if family == "mixtral":
        assert "experts" in str(reason)
        return
    assert reason is None
    inputs = batch()
    told = gradients(model, inputs)
    del inputs["attention_mask"]
    untold = gradients(model, inputs)
    assert untold[0] == pytest.approx(told[0], rel=1e-6)
    assert untold[1].keys() == told[1].keys()
    size = max(float(gradient.abs().max()) for gradient in told[1].values())
    assert size > 0
    for name, gradient in untold[1].items():
        torch.testing.assert_close(gradient, told[1][name], atol=1e-5 * max(1.0, size), rtol=1e-5, msg=name)


@pytest.mark.parametrize("case", ["lora", "prefix", "prompt"])
def test_the_probe_leaves_everything_as_it_was(model: PreTrainedModel, case: str) -> None:
    put_on(model, CASES[case])
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    why_mask_is_needed(model)
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_state_over_positions_never_sees_what_comes_after() -> None:
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(**TOKENS, hidden_size=32, num_hidden_layers=2, state_size=4))
    attach(model, LoRA(r=2, target_modules=["in_proj"]))
    assert why_mask_is_needed(model) is None


def test_a_model_that_looks_ahead_is_told(model: PreTrainedModel) -> None:
    """Its first block is given the mean over all tokens as well, padding left out where it is told of it."""
    put_on(model, LoRA(r=2))
    told: dict[str, Any] = {}
    decoder = model.get_decoder()
    first = next(module for name, module in decoder.named_modules() if name.endswith(".0"))

    def note(module: Any, args: Any, kwargs: Any) -> None:
        told["mask"] = kwargs.get("attention_mask")

    def look_ahead(module: Any, args: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        mask = told["mask"]
        weights = torch.ones(states.shape[:2]) if mask is None else mask.float()
        states = states + 0.3 * torch.einsum("btd,bt->bd", states, weights / weights.sum(1, keepdim=True))[:, None]
        return (states, *output[1:]) if isinstance(output, tuple) else states

    handles = [decoder.register_forward_pre_hook(note, with_kwargs=True), first.register_forward_hook(look_ahead)]
    reason = why_mask_is_needed(model)
    for handle in handles:
        handle.remove()
    assert reason is not None
    assert "logits change by" in reason or "experts" in reason


def test_attention_both_ways_is_told() -> None:
    torch.manual_seed(0)
    sizes = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    model = BertLMHeadModel(BertConfig(**sizes, intermediate_size=48, max_position_embeddings=64, is_decoder=False))
    attach(model, LoRA(r=2))
    assert "logits change by" in str(why_mask_is_needed(model))


def test_a_bare_model_is_not_asked(model: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="attached delta"):
        why_mask_is_needed(model)
