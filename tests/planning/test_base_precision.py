"""The plan of a base in few bits: its weights' bytes are those that loading gives, its step is the quantised one's."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from transformers import LlamaConfig

import spectune
from spectune.blocks.execution import Execution
from spectune.compute.fp8 import FrozenFp8Linear
from spectune.errors import ConfigError
from spectune.methods import FullFineTuning, LoRA
from spectune.planning.shape import Shape
from spectune.planning.skeleton import skeleton
from spectune.planning.training_step import trace_step
from spectune.planning.workload import Workload
from spectune.storage import PRECISIONS, load_config

needs = {"nf4": pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="NF4 needs bitsandbytes")}
PARAMS = [pytest.param(p, marks=needs.get(p, ())) for p in PRECISIONS]


@pytest.mark.parametrize("precision", PARAMS)
def test_from_the_config_alone_it_counts_the_bytes_that_loading_gives(precision: str) -> None:
    method = LoRA(r=4)
    planned = spectune.plan("spectune-tiny", method, 2, 32, device="cpu", base_precision=precision)
    model, _ = spectune.load("spectune-tiny", base_precision=precision)
    loaded = spectune.plan(model, method, 2, 32, device="cpu")
    held = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    delta = spectune.attach(model, method, "task")
    own = sum(p.numel() * p.element_size() for p in delta.parameters())
    assert loaded.weights == sum(held.values()) + own
    assert planned.weights == loaded.weights
    plain = spectune.plan("spectune-tiny", method, 2, 32, device="cpu")
    assert planned.weights < plain.weights
    assert planned.total_parameters == plain.total_parameters


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_large_bases_weights_shrink_by_its_bits_without_any_library(precision: str) -> None:
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, vocab_size=256
    )
    plain, few = (
        spectune.plan(config, LoRA(r=4), 1, 64, dtype="bfloat16", base_precision=p, device="cuda").weights
        for p in (None, precision)
    )
    linears = 4 * (4 * 512**2 + 3 * 512 * 1024)
    # the scales are some bytes more
    assert (plain - few) / linears == pytest.approx({"nf4": 2 - 0.5 - 1 / 64}.get(precision, 1.0), abs=0.02)


def test_the_step_over_fp8_keeps_no_more_from_forward_to_backward() -> None:
    """Nothing of a linear's input, and no second copy of its weight, which lives within one product of backward."""
    config = load_config("spectune-tiny")
    shape = Shape(2, 64, 63, 126)
    kept = []
    for precision in (None, "fp8"):
        built = skeleton(Workload.of(config, LoRA(r=4), torch.bfloat16, base_precision=precision), Execution(), 64)
        trace = trace_step(built, shape)
        cut = dict(trace.marks)["head"]
        live: set[int] = set()
        for event in trace.events[:cut]:
            (live.add if event >= 0 else live.discard)(max(event, ~event))
        kept.append(sum(trace.sizes[number] for number in live))
    assert any(isinstance(m, FrozenFp8Linear) for m in built.model.modules())
    assert kept[1] <= kept[0]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="base_precision 'fp4' is unknown"):
        spectune.plan("spectune-tiny", "lora", 1, 16, base_precision="fp4")
    with pytest.raises(ConfigError, match="trains the base's own weights"):
        spectune.plan("spectune-tiny", FullFineTuning(), 1, 16, base_precision="fp8")
    model, _ = spectune.load("spectune-tiny")
    with pytest.raises(ConfigError, match="loaded with None: plan it by name"):
        spectune.plan(model, "lora", 1, 16, base_precision="fp8")
