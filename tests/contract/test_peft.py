"""PEFT -> spectune -> PEFT for the methods that PEFT has: same logits, same loss, same gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import PreTrainedModel

from spectune.storage import load_delta
from tests.contract.conftest import tokens

Make = Callable[[], PreTrainedModel]

CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "rslora": {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear", "use_rslora": True},
    "prefix": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 5},
    "prompt": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5},
}


def peft_model(model: PreTrainedModel, name: str) -> Any:
    wrapped = peft.get_peft_model(model, peft.get_peft_config({**CONFIGS[name], "task_type": "CAUSAL_LM"}))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return wrapped.eval()


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_there_and_back(make_model: Make, name: str, tmp_path: Path) -> None:
    ids = tokens()
    labels = ids.clone()
    labels[:, 0] = -100  # PEFT scores the first text token from the last virtual one; we never do
    theirs = peft_model(make_model(), name)
    out = theirs(input_ids=ids, labels=labels, attention_mask=torch.ones_like(ids))
    out.loss.backward()
    theirs_logits = out.logits[:, -ids.shape[1] :].detach()
    theirs.save_pretrained(tmp_path / "theirs")

    model = make_model()
    delta = load_delta(model, tmp_path / "theirs", name="from_peft", trainable=True)
    mine = model(input_ids=ids, labels=labels, attention_mask=torch.ones_like(ids))
    mine.loss.backward()
    assert (mine.logits - theirs_logits).abs().max().item() <= 1e-5
    assert abs(mine.loss.item() - out.loss.item()) <= 1e-6
    assert gradient_norms_agree(delta, theirs)

    delta.save(tmp_path / "mine")
    back = peft.PeftModel.from_pretrained(make_model(), tmp_path / "mine")
    with torch.no_grad():
        again = back(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]
    assert float((again - theirs_logits).abs().max()) <= 1e-5


def gradient_norms_agree(delta: Any, theirs: Any) -> bool:
    """The sums of squared gradients: layouts differ, the numbers must not."""
    mine = torch.stack([p.grad.double().square().sum() for p in delta.parameters()]).sum()
    other = torch.stack([p.grad.double().square().sum() for p in theirs.parameters() if p.grad is not None]).sum()
    return bool(torch.isclose(mine, other, rtol=1e-4))
