"""LoRA that starts at factors of the base's weight, and LoRA+."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from pydantic import ValidationError

import spectune
from spectune.deltas import attached
from spectune.errors import ConfigError
from spectune.methods import DoRA, LoRA
from spectune.storage import load_delta
from spectune.training import TrainingConfig
from spectune.training.optimizers import make_optimizer
from spectune.training.run_state import rate_factors
from tests.contract.conftest import move, tokens
from tests.contract.families import FAMILIES
from tests.support import make_model

STARTS = ("pissa", "olora")


def llama() -> torch.nn.Module:
    torch.manual_seed(7)
    return FAMILIES["llama"]().eval()


@pytest.mark.parametrize("start", STARTS)
def test_a_start_at_the_bases_weights_leaves_the_base_and_its_outputs_bit_for_bit(start: str) -> None:
    model = llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = model(input_ids=tokens()).logits
    delta = spectune.attach(model, LoRA(r=4, init_lora_weights=start), "task")
    assert torch.equal(model(input_ids=tokens()).logits, expected)
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in before.items())
    _, module = delta.sites[0]
    weight = model.get_submodule(delta.sites[0][0].path).weight.double()
    left, values, right = torch.linalg.svd(weight)
    first = module.scale * (module.lora_B @ module.lora_A).double()
    if start == "pissa":  # its product is the best of rank 4 to the weight
        assert torch.allclose(first, (left[:, :4] * values[:4]) @ right[:4], atol=1e-6)
    else:  # what is left of the weight has no part in the span of B
        rest = weight - first / module.scale
        assert float((module.lora_B.double().T @ rest).abs().max().detach()) < 1e-6
    assert delta.num_parameters() == spectune.attach(llama(), LoRA(r=4), "plain").num_parameters()
    spectune.detach(model, "task")
    assert torch.equal(model(input_ids=tokens()).logits, expected)


@pytest.mark.parametrize("start", STARTS)
def test_dropout_is_for_the_trained_factors_alone_as_in_peft(start: str) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.5, init_lora_weights=start, target_modules=["q_proj"])
    theirs = peft.get_peft_model(llama(), config).train()
    ours = llama()
    spectune.attach(
        ours, LoRA(r=4, lora_alpha=6, lora_dropout=0.5, init_lora_weights=start, target_modules=("q_proj",)), "task"
    )
    ours.train()
    outputs = []
    for model in (theirs, ours):
        torch.manual_seed(0)
        outputs.append(model(input_ids=tokens()).logits)
    assert float((outputs[0] - outputs[1]).abs().max().detach()) <= 1e-5


def test_mixed_rows_merging_and_reloading_hold_for_a_start_at_the_bases_weights(tmp_path: Path) -> None:
    model = make_model()  # GPT-2's Conv1D
    for name, method in (("a", LoRA(r=4, init_lora_weights="pissa")), ("b", LoRA(r=2, init_lora_weights="olora"))):
        move(spectune.attach(model, method, name, seed=1))
    alone = {}
    for name in ("a", "b", None):
        with spectune.route(model, name):
            alone[name] = model(input_ids=tokens(1)).logits
    with spectune.route(model, ["a", None, "b"]):
        together = model(input_ids=tokens(1).expand(3, -1)).logits
    for row, name in enumerate(("a", None, "b")):
        assert torch.allclose(together[row], alone[name][0], atol=1e-5)
    for name in ("a", "b"):
        merged = spectune.merge(model, name)
        assert torch.allclose(merged(input_ids=tokens(1)).logits, alone[name], atol=1e-5)
        attached(model)[name].save(tmp_path / name)
        again = make_model()
        load_delta(again, tmp_path / name)
        assert torch.equal(again(input_ids=tokens(1)).logits, alone[name])


def test_what_a_start_cannot_be_is_refused_with_the_model_as_it_was() -> None:
    with pytest.raises(ValidationError, match="DoRA starts at the base's norms"):
        DoRA(init_lora_weights="pissa")
    model = llama()
    with pytest.raises(ConfigError, match="more than its rank"):
        spectune.attach(model, LoRA(r=500, init_lora_weights="olora"))
    assert not hasattr(model, "_spectune")
    quantised, _ = spectune.load("spectune-tiny", device="cpu", base_precision="int8")
    with pytest.raises(ConfigError, match="quantised"):
        spectune.attach(quantised, LoRA(r=4, init_lora_weights="pissa"))
    assert not hasattr(quantised, "_spectune")


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_8bit", "adamw_in_backward"])
def test_loraplus_is_pefts(optim: str, tmp_path: Path) -> None:
    """The same weights as AdamW in the groups of PEFT's `create_loraplus_optimizer`."""
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"]))
    ours = llama()
    delta = spectune.attach(ours, LoRA(r=4, lora_alpha=8, target_modules=("q_proj", "o_proj"), loraplus_lr_ratio=8))
    theirs.save_pretrained(tmp_path)
    delta.files.read(tmp_path)
    config = TrainingConfig(optim=optim, weight_decay=0.0, max_grad_norm=0)
    factors = rate_factors(delta, list(delta.parameters()))
    assert sorted(set(factors)) == [1.0, 8.0]
    mine = make_optimizer(list(delta.parameters()), config, 1e-2, 1, factors)
    reference = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=8, eps=config.adam_epsilon
    )
    for rate in (1e-2, 5e-3):
        mine.begin(rate)
        ours(input_ids=tokens(), labels=tokens()).loss.backward()
        mine.step(rate, 0.0)
        for group, factor in zip(reference.param_groups, (1, 1, 8, 8), strict=True):
            group["lr"] = rate * factor
        theirs(input_ids=tokens(), labels=tokens()).loss.backward()
        reference.step()
        reference.zero_grad()
    weights = {
        name.replace("base_model.model.", "").replace(".default.weight", ""): p for name, p in theirs.named_parameters()
    }
    for name, p in delta.named_parameters():
        assert torch.allclose(p, weights[name], atol=1e-6), name
