"""The planner against real steps: every method on every family, tensors counted one by one on the CPU."""

from __future__ import annotations

import math
import statistics
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen3Config,
)

from spectune.blocks import offload
from spectune.blocks.execution import Execution
from spectune.blocks.recompute import Recomputation
from spectune.deltas import attach, place
from spectune.deltas.modules import DeltaModule
from spectune.errors import ConfigError
from spectune.methods import BY_NAME, LoRA, method_from_name
from spectune.planning import plan
from spectune.planning.planner import Planner
from spectune.planning.shape import Shape
from spectune.planning.skeleton import skeleton
from spectune.planning.training_step import trace_step
from spectune.planning.workload import Workload
from tests.contract.families import FAMILIES, VOCABULARY
from tests.planning.steps import batch, fake_peak, real_peak
from tests.support.transfers import LateTransfers

ROWS, LENGTH = 4, 40
#: what every run of the tests plans on each family
FEW = ("full", "adapter", "prefix", "prompt", "lora", "bitfit")


def check(family: str, method: str, *, checkpointing: Recomputation, shorter: int = 0) -> None:
    inputs = batch(ROWS, LENGTH, VOCABULARY, shorter=shorter)
    model = FAMILIES[family]()
    targets = int((inputs["labels"] != -100).sum())
    try:
        delta = attach(model, method_from_name(method))
    except ConfigError:
        pytest.skip("the method refuses this family")
    shape = Shape(ROWS, LENGTH, LENGTH - 1, targets, padded=shorter > 0)
    estimate = plan(model, method, shape, device="cpu", gradient_checkpointing=checkpointing)
    measured = real_peak(model, delta, inputs, checkpointing=checkpointing)
    assert estimate.peak_allocated == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(
    ("family", "method"),
    [
        pytest.param(family, method, marks=() if family == "llama" or method in FEW else pytest.mark.slow)
        for family in ("gpt2", "llama", "mixtral")
        for method in BY_NAME
    ],
)
def test_every_method(family: str, method: str) -> None:
    check(family, method, checkpointing=False)


def test_factors_that_a_start_keeps_are_counted() -> None:
    inputs, method = batch(ROWS, LENGTH, VOCABULARY), LoRA(r=16, init_lora_weights="pissa")
    model = FAMILIES["llama"]()
    delta = attach(model, method)
    shape = Shape(ROWS, LENGTH, LENGTH - 1, int((inputs["labels"] != -100).sum()), padded=False)
    estimate = plan(model, method, shape, device="cpu", gradient_checkpointing=False)
    assert estimate.peak_allocated == pytest.approx(real_peak(model, delta, inputs, checkpointing=False), rel=0.02)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_step_that_is_recorded_has_the_chunked_loss(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """How a model makes its logits is found on the meta device too: no tensor is as large as those of all targets."""
    monkeypatch.setattr("spectune.compute.linear_cross_entropy._CHUNK_BYTES_ON_CPU", 0)
    built = skeleton(Workload.of(FAMILIES[family]().config, "lora", torch.float32, "cpu"), Execution(), 60)
    trace = trace_step(built, Shape(10, 60, 60, 600))
    made = {size for size, label in zip(trace.sizes, trace.labels, strict=True) if label == "logits"}
    assert 4 * 200 * VOCABULARY in made  # probabilities of three chunks
    assert 4 * 600 * VOCABULARY not in made


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_with_recomputation(family: str) -> None:
    check(family, "lora", checkpointing=True)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_with_selective_recomputation(family: str) -> None:
    check(family, "lora", checkpointing="selective")


@pytest.mark.parametrize("method", ["full", "adapter", "prefix", "prompt", "bitfit"])
def test_methods_with_selective_recomputation(method: str) -> None:
    check("llama", method, checkpointing="selective", shorter=11)


@pytest.mark.parametrize("method", ["full", "adapter", "lora", "prefix", "prompt"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_block_inputs_in_host_memory(family: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By copies that nobody counts as tensors; `plan` itself refuses a CPU."""
    monkeypatch.setattr(offload.HostStates.__init__, "__defaults__", (0,))
    model = FAMILIES[family]()
    delta = attach(model, method_from_name(method))
    planner = Planner(Workload.of(model, method, device="cpu"), Execution(recomputation="offload"))
    predicted = planner.step(Shape(ROWS, LENGTH, LENGTH - 1, ROWS * (LENGTH - 1))).peak_allocated
    transfers = LateTransfers()
    measured = real_peak(model, delta, batch(ROWS, LENGTH, VOCABULARY), checkpointing="offload", transfers=transfers)
    assert predicted == pytest.approx(measured, rel=0.02)
    # pinned memory comes in powers of two
    sizes = [2 ** math.ceil(math.log2(buffer.size)) for buffer in transfers.buffers]
    assert planner.built.host_bytes == sum(sizes) > 0


@pytest.mark.parametrize("method", ["prefix", "prompt", "bitfit"])
def test_rows_of_unlike_length(method: str) -> None:
    check("llama", method, checkpointing=False, shorter=11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_8bit", "adamw_in_backward"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_every_optimizer(method: str, optim: str, dtype: torch.dtype) -> None:
    """On few tokens, so that what the optimizer does makes the peak where the base is trained."""
    model = FAMILIES["llama"]().to(dtype)
    delta = attach(model, method_from_name(method))
    estimate = plan(model, method, 1, 6, device="cpu", dtype=dtype, optim=optim)
    measured = real_peak(model, delta, batch(1, 6, VOCABULARY), checkpointing=False, optim=optim)
    assert estimate.peak_allocated == pytest.approx(measured, rel=0.02)


def test_prompts_of_unlike_length_under_a_large_vocabulary() -> None:
    """The gradient of the logits is larger than those that the loss is taken of: it decides the peak."""
    inputs, learned = batch(8, LENGTH, 1000), torch.tensor([30, *[2] * 7])
    inputs["labels"][torch.arange(LENGTH) < LENGTH - learned[:, None]] = -100
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20000, n_embd=16, n_head=2, n_layer=2, resid_pdrop=0.0,
                                       embd_pdrop=0.0, attn_pdrop=0.0))  # fmt: skip
    delta = attach(model, method_from_name("lora"))
    estimate = plan(model, "lora", Shape(8, LENGTH, 30, int(learned.sum())), device="cpu")
    assert estimate.peak_allocated == pytest.approx(real_peak(model, delta, inputs, checkpointing=False), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("shorter", [0, 11], ids=["whole", "padded"])
@pytest.mark.parametrize("checkpointing", [False, "selective", True], ids=["kept", "selective", "recomputed"])
@pytest.mark.parametrize("method", list(BY_NAME))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_method_on_every_family(family: str, method: str, checkpointing: Recomputation, shorter: int) -> None:
    check(family, method, checkpointing=checkpointing, shorter=shorter)


#: widths as people use them, of six layers: under FakeTensorMode they cost no memory
WIDE: dict[str, PretrainedConfig] = {
    "gpt2": GPT2Config(n_layer=6, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "llama": LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=6,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "qwen3": Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=6,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
    ),
    "opt": OPTConfig(num_hidden_layers=6, dropout=0.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", list(WIDE))
def test_formulas_against_a_tracker_over_fake_steps(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers run, in bfloat16, by an oracle that shares no code with the planner: fake tensors and a tracker."""
    # what attach proves by values, it cannot prove of tensors that have none
    monkeypatch.setattr("spectune.deltas.delta.fingerprint", lambda *_: {})
    for module in ("attach", "probe"):
        monkeypatch.setattr(sys.modules[f"spectune.deltas.{module}"], "can_run", lambda _: False)
    monkeypatch.setattr(DeltaModule, "to", lambda self, *_: self)  # they are where the model is, and cannot be moved
    # values would tell that no row is packed; without them each layer gets a mask, for which keys are repeated
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda *_: None)
    errors = {}
    for method in BY_NAME.values():
        for checkpointing, length in ((False, 900), ("selective", 900), (True, 900), (False, 256)):
            estimate = plan(WIDE[family], method(), 4, length, dtype="bfloat16", device="cpu",
                                gradient_checkpointing=checkpointing)  # fmt: skip
            with FakeTensorMode():
                model = AutoModelForCausalLM.from_config(WIDE[family], dtype=torch.bfloat16)
                delta = place(model, method(), "oracle", fill=lambda _: None)
                measured = fake_peak(model, delta, 4, length, checkpointing=checkpointing)
            errors[estimate.method, checkpointing, length] = abs(estimate.peak_allocated / measured - 1)
    assert statistics.median(errors.values()) <= 0.02
    assert max(errors.values()) <= 0.05, errors
