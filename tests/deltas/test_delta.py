"""What a delta says of itself."""

from __future__ import annotations

import pytest

from spectune.deltas import attach, detach
from spectune.methods import LoRA
from tests.support import make_model


def test_print_trainable_parameters_prints_what_peft_prints(capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model()
    base = sum(p.numel() for p in model.parameters())
    delta = attach(model, LoRA(r=2), "task")
    delta.print_trainable_parameters()
    trained = sum(p.numel() for p in delta.parameters())
    share = 100 * trained / (base + trained)
    assert capsys.readouterr().out == (
        f"trainable params: {trained:,} || all params: {base + trained:,} || trainable%: {share:.4f}\n"
    )
    detach(model, "task")
