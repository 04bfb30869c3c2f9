"""PEFT's SEQ_CLS and TOKEN_CLS folders there and back, and one step of training, equal to PEFT's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from spectune.deltas import attached
from spectune.errors import DataError
from spectune.objectives import objective_of
from spectune.storage import load_delta
from tests.contract.conftest import tokens
from tests.contract.test_heads import MODELS, batch_of, make

CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "dora": {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear", "use_dora": True},
    "prefix": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 5},
    "prompt": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5},
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


#: PEFT's "all-linear" would put LoRA at a token classifier's head too, which it then cannot save
TARGETS = {"llama": ["q_proj", "v_proj", "gate_proj", "down_proj"], "gpt2": ["c_attn", "c_fc", "c_proj"]}


def task_of(kind: str) -> str:
    return "SEQ_CLS" if "text" in kind else "TOKEN_CLS"


def peft_model(kind: str, name: str, **more: Any) -> Any:
    config = {**CONFIGS[name], "task_type": task_of(kind), **more}
    if "target_modules" in config:
        config["target_modules"] = TARGETS[kind.split("-")[0]]
    wrapped = peft.get_peft_model(make(kind), peft.get_peft_config(config))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return wrapped.eval()


def logits(model: Any, batch: dict[str, Tensor], virtual: int = 0) -> Tensor:
    """Of PEFT's model. Its prefix tuning hands keys and values to a `forward` that has no `past_key_values` any more,
    so they are put in for it; and its prompt tuning leaves outputs of virtual tokens in."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        if virtual:
            cache = model.get_prompt(len(ids))
            mask = torch.cat([mask.new_ones(len(ids), virtual), mask], dim=1)
            found: Tensor = model.base_model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits
        else:
            found = model(input_ids=ids, attention_mask=mask).logits
    return found[:, -ids.shape[1] :] if found.dim() == 3 else found


def ours(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return found


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("name", list(CONFIGS))
def test_there_and_back(kind: str, name: str, tmp_path: Path) -> None:
    theirs = peft_model(kind, name)
    theirs.save_pretrained(tmp_path / "theirs")
    model = make(kind, head=1)
    delta = load_delta(model, tmp_path / "theirs", name="from_peft")
    batch = batch_of(kind)
    if name == "prompt":  # PEFT gives its base no ids, so that it takes the last place for the last token
        batch = {"input_ids": tokens(), "attention_mask": torch.ones_like(tokens())}
    virtual = 5 if name == "prefix" else 0
    expected, real = logits(theirs, batch, virtual), batch["attention_mask"] == 1
    found = ours(model, batch)
    close = {"rtol": 0, "atol": 1e-5 * max(1.0, float(expected.abs().max()))}
    torch.testing.assert_close(*((found, expected) if found.dim() == 2 else (found[real], expected[real])), **close)

    delta.save(tmp_path / "mine")
    config = json.loads((tmp_path / "mine" / "adapter_config.json").read_text())
    assert config["task_type"] == task_of(kind)
    assert config["modules_to_save"] == ["classifier" if kind == "gpt2-tokens" else "score"]
    mine, peers = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("mine", "theirs"))
    assert mine.keys() == peers.keys()
    back = peft.PeftModel.from_pretrained(make(kind, head=1), tmp_path / "mine").eval()
    again = logits(back, batch, virtual)
    torch.testing.assert_close(*((again, expected) if again.dim() == 2 else (again[real], expected[real])), **close)


@pytest.mark.parametrize("kind", [*MODELS, "llama-text regression"])
def test_a_step_of_lora_is_pefts(kind: str, tmp_path: Path) -> None:
    """The same loss and the same gradients, the head's among them, from the same weights."""
    more = {"num_labels": 1} if "regression" in kind else {}
    kind, batch = kind.removesuffix(" regression"), batch_of(kind)
    if more:
        batch["labels"] = torch.tensor([0.5, -2.0, 1.0])
    targets = {"target_modules": TARGETS[kind.split("-")[0]]}
    config = peft.get_peft_config({**CONFIGS["lora"], "task_type": task_of(kind), **targets})
    wrapped = peft.get_peft_model(make(kind, **more), config)
    with torch.no_grad():
        for n, parameter in enumerate(p for p in wrapped.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(n)) * 0.1)
    wrapped.save_pretrained(tmp_path / "theirs")
    model = make(kind, head=1, **more)
    delta = load_delta(model, tmp_path / "theirs", name="from_peft", trainable=True)
    loss = wrapped(**batch).loss
    loss.backward()
    total, count = objective_of(model).loss_sum(model, batch)
    (total / count).backward()
    assert abs(float((total / count).detach()) - float(loss.detach())) <= 1e-5
    theirs = {
        name.removeprefix("base_model.model.").replace(".default", "").replace(".modules_to_save", ""): p.grad
        for name, p in wrapped.named_parameters()
        if p.grad is not None
    }
    mine = {f"{n}.weight" if "lora_" in n else n: p.grad for n, p in delta.named_parameters()}
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        found = mine[name]
        assert found is not None
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-5)


def test_more_modules_to_save_than_the_head_are_refused_by_name(tmp_path: Path) -> None:
    peft_model("llama-text", "lora", modules_to_save=["embed_tokens"]).save_pretrained(tmp_path)
    model = make("llama-text")
    with pytest.raises(DataError, match="modules_to_save"):
        load_delta(model, tmp_path)
    assert attached(model) == {}
