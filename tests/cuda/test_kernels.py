"""On a CUDA device: every attention kernel that a run may take is finite and right, forward and gradients; and a run on
padded rows with a mask is finite where a plain loop is not (docs/results/kernels.md)."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel

from spectune.health.attention_cases import FEW, MASKS, SPECIAL, AttentionCase
from spectune.health.attention_check import REFUSED, RIGHT, check_case
from spectune.methods import FullFineTuning, LoRA
from spectune.training import TrainingConfig, decisions, train
from spectune.training.loop import Loop
from tests.support import make_rows, make_tokenizer

pytestmark = pytest.mark.cuda
WIDE = [AttentionCase(mask, 1000, dim, dtype) for mask in MASKS for dim, dtype in ((64, "bfloat16"), (128, "float16"))]


@pytest.mark.parametrize("case", [*FEW, *SPECIAL, *WIDE], ids=str)
def test_what_a_run_may_take_is_finite_and_right(case: AttentionCase) -> None:
    found = check_case(case, torch.device("cuda"))
    wrong = [f"{finding.kernel}: {finding.status} {finding.why}" for finding in found
             if finding.asked and finding.status not in (RIGHT, REFUSED)]  # fmt: skip
    assert not wrong, wrong
    assert {finding.kernel: finding.status for finding in found}.get("chosen", RIGHT) == RIGHT


@pytest.mark.parametrize("method", [FullFineTuning(), LoRA()], ids=lambda method: method.name)
def test_padded_rows_with_a_mask_train_on_finite_gradients(
    method: FullFineTuning | LoRA, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of unlike lengths, whose mask nobody takes away, in the shape of gpt2-27m."""
    monkeypatch.setattr(decisions, "why_mask_is_needed", lambda _: "this test wants one")
    monkeypatch.setattr(decisions, "takes_cudnn", lambda *_, **__: True)
    monkeypatch.setattr(decisions, "why_not_cudnn", lambda *_: None)
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "n_embd": 448, "n_head": 7, "n_layer": 8, "n_positions": 1024}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **dropout)).to("cuda", torch.bfloat16)
    rows = [{**row, "completion": " ".join([row["completion"]] * (1 + n % 8))} for n, row in enumerate(make_rows(128))]
    config = TrainingConfig(per_device_train_batch_size=64, max_steps=6, packing=False, cuda_graphs=False)
    losses: list[float] = []
    finish = Loop.finish
    monkeypatch.setattr(Loop, "finish", lambda self: (losses.append(finish(self)), losses[-1])[1])
    # a run that is not finite raises DivergedError
    train(model, make_tokenizer(), method, rows, rows[:8], config, console=Console(quiet=True))
    assert len(losses) == config.max_steps
