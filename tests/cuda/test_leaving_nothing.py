"""A run that has ended leaves not a byte on the device, however it was executed; it holds little beside its tensors."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from rich.console import Console

import spectune
from spectune.deltas import Method
from spectune.methods import METHODS
from spectune.training import TrainingConfig
from tests.support import make_model, make_rows, make_tokenizer
from tests.training.test_compiling import undropped

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore:TensorFloat32")]


@pytest.mark.parametrize("how", [{}, {"cuda_graphs": True, "packing": False}, {"cuda_graphs": False}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_no_byte(method: type[Method], how: dict[str, Any]) -> None:
    model, tokenizer = make_model().cuda(), make_tokenizer()
    config = TrainingConfig(per_device_train_batch_size=4, max_steps=12, **how)
    before = torch.cuda.memory_allocated()
    for _ in range(2):
        delta = spectune.attach(model, undropped(method), keep_base=method.trains_base)
        result = spectune.train(model, tokenizer, delta, make_rows(), make_rows(6), config, console=Console(quiet=True))
        spectune.detach(model, delta.name)
        del delta
        gc.collect()
        assert torch.cuda.memory_allocated() == before
    peaks = result.peak_memory_bytes
    assert peaks["train_reserved"] <= peaks["train_allocated"] + 128 * 2**20
