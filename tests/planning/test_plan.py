"""What a plan says: by hand where it can be, consistent where not."""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, LlamaConfig

import spectune
from spectune.blocks.execution import Execution
from spectune.blocks.recompute import ORDER
from spectune.errors import ConfigError
from spectune.methods import BitFit, BottleneckAdapter, FullFineTuning, LoRA, PrefixTuning, PromptTuning
from spectune.planning import plan
from spectune.planning.device_memory import free_memory
from spectune.planning.estimate import TERMS, Estimate, shown
from spectune.planning.kernels import cudnn_head_limit, kernel_for
from spectune.planning.planner import Planner
from spectune.planning.shape import Shape
from spectune.planning.workload import Workload
from spectune.sizes import bytes_of
from tests.contract.families import gemma3, llama

LLAMA = LlamaConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)
GIB = 2**30


def learned(rows: int, length: int, targets: int) -> Shape:
    """Rows in which so many tokens have a loss."""
    return Shape(rows, length, targets, rows * targets)


def test_states_by_hand() -> None:
    full = plan(LLAMA, FullFineTuning(), 2, 64, dtype="bfloat16")
    weights = full.total_parameters
    assert full.trainable_parameters == weights
    assert full.weights - 2 * weights < 1024  # and the frequencies of rotary positions, float32
    # bfloat16, and float32 copies of a small part while the optimizer steps
    assert 2 * weights < full.gradients < (2 + 4 / 8) * weights
    stepping = next(moment for moment in full.moments if moment.name == "optimizer")
    assert 16 * weights < stepping.total - stepping.terms["workspace"] < 16.5 * weights
    steps = len(list(llama_parameters()))
    assert full.optimizer == (4 + 4 + 4) * weights + 4 * steps  # masters, two moments, a count of steps each
    lora = plan(LLAMA, LoRA(r=8), 2, 64, dtype="bfloat16")
    assert lora.weights - 2 * weights - 4 * lora.trainable_parameters < 1024
    assert lora.gradients == 4 * lora.trainable_parameters
    assert lora.optimizer == 8 * lora.trainable_parameters + 4 * 2 * 7 * 8


def llama_parameters() -> Any:
    with torch.device("meta"):
        return list(type(llama())(LLAMA).parameters())


def test_the_peak_is_that_of_a_moment_and_not_the_sum_of_all_terms() -> None:
    estimate = plan(LLAMA, "full", 8, 512, device="cpu")
    assert [moment.name for moment in estimate.moments] == ["forward", "loss", "backward", "optimizer"]
    assert estimate.peak_allocated == estimate.peak_moment.total
    assert estimate.peak_allocated < sum(getattr(estimate, term) for term in TERMS)
    for moment in estimate.moments:
        assert all(0 <= moment.terms[term] <= getattr(estimate, term) for term in TERMS)
    assert next(m for m in estimate.moments if m.name == "optimizer").terms["activations"] == 0
    assert next(m for m in estimate.moments if m.name == "forward").terms["gradients"] == 0


def test_activations_by_hand() -> None:
    """What BitFit's frozen Llama keeps of a layer, in numbers a token: linears keep nothing (their weights have no
    gradient), norms, rotary positions, attention and SwiGLU keep what follows."""
    rows, length, layers = 4, 512, 8
    hidden, inner, kv, heads = 256, 512, 128, 8
    deeper, shallow = (
        plan(LlamaConfig(**{**LLAMA.to_dict(), "num_hidden_layers": n}), BitFit(), rows, length, dtype="bfloat16")
        for n in (2 * layers, layers)
    )
    measured = (deeper.activations - shallow.activations) / layers / rows / length
    norms = 2 * (2 * 4 * hidden + 4)  # the sum of squares and the product keep float32, and the root's inverse
    attention = 2 * (hidden + 2 * kv + hidden) + 4 * heads  # q, k, v, output; sums of exponentials
    swiglu = 2 * 3 * inner  # gate, its SiLU, up
    assert measured == pytest.approx(norms + attention + swiglu, rel=0.35)
    assert measured >= attention + swiglu


def test_recomputation_keeps_one_hidden_state_a_layer() -> None:
    rows, length = 4, 512
    deeper, shallow = (
        plan(
            LlamaConfig(**{**LLAMA.to_dict(), "num_hidden_layers": n}),
            BitFit(),
            rows,
            length,
            dtype="bfloat16",
            gradient_checkpointing=True,
        )
        for n in (16, 8)
    )
    assert (deeper.activations - shallow.activations) / 8 == pytest.approx(2 * rows * length * 256, rel=0.01)


def test_an_adapter_after_a_block_is_recomputed_with_it() -> None:
    rows, length = 4, 512
    method = BottleneckAdapter(bottleneck_dim=64, placement="block")
    deeper, shallow = (
        plan(LlamaConfig(**{**LLAMA.to_dict(), "num_hidden_layers": n}), method, rows, length, dtype="bfloat16",
             gradient_checkpointing=True)
        for n in (16, 8)
    )  # fmt: skip
    assert (deeper.activations - shallow.activations) / 8 == pytest.approx(2 * rows * length * 256, rel=0.01)


def test_block_inputs_in_host_memory_do_not_add_up() -> None:
    rows, length = 16, 512
    hidden = 2 * rows * length * 256
    deeper, shallow = (
        plan(LlamaConfig(**{**LLAMA.to_dict(), "num_hidden_layers": n}), BitFit(), rows, length, dtype="bfloat16",
             gradient_checkpointing="offload")
        for n in (16, 8)
    )  # fmt: skip
    assert deeper.source == "trace"
    assert deeper.activations == shallow.activations
    assert deeper.host == 15 * hidden
    assert shallow.host == 7 * hidden
    kept = plan(LLAMA, BitFit(), rows, length, dtype="bfloat16", gradient_checkpointing=True)
    assert kept.host == 0
    # the last block's stays, and one comes back beside backward
    assert kept.activations - shallow.activations == pytest.approx(6 * hidden, rel=0.01)


@pytest.mark.slow
def test_forms_of_recomputation_keep_less_and_auto_takes_the_first_that_fits() -> None:
    asked: dict[str, Any] = {"batch": learned(8, 1024, 16), "dtype": "bfloat16"}
    config = LlamaConfig(**{**LLAMA.to_dict(), "num_hidden_layers": 12})
    found = [plan(config, BitFit(), **asked, gradient_checkpointing=mode) for mode in ORDER]
    needs = [estimate.needed for estimate in found]
    assert needs == sorted(needs, reverse=True)
    assert len(set(needs)) == 4
    for mode, need in zip(ORDER, needs, strict=True):
        assert (
            plan(config, BitFit(), **asked, gradient_checkpointing="auto", memory=need).gradient_checkpointing == mode
        )
    nothing = plan(config, BitFit(), **asked, gradient_checkpointing="auto", memory="1MiB")
    assert nothing.gradient_checkpointing == "offload"
    assert not nothing.fits("1MiB")
    on_cpu = {**asked, "device": "cpu"}
    assert plan(config, BitFit(), **on_cpu, gradient_checkpointing="auto", memory="1MiB").gradient_checkpointing is True
    with pytest.raises(ConfigError, match="offload needs a CUDA device"):
        plan(config, BitFit(), **on_cpu, gradient_checkpointing="offload")


def test_more_rows_more_tokens_and_masks_take_more() -> None:
    small = plan(LLAMA, "prefix", 2, 64)
    assert small.peak_allocated < plan(LLAMA, "prefix", 4, 64).peak_allocated
    assert small.peak_allocated < plan(LLAMA, "prefix", 2, 128).peak_allocated
    assert small.logits > plan(LLAMA, "prefix", learned(2, 64, 8)).logits
    padded, whole = (
        plan(LLAMA, "lora", replace(Shape.whole(4, 256), padded=p), dtype="bfloat16") for p in (True, False)
    )
    assert padded.activations > whole.activations
    # a batch that finds gradients there has them beside its activations
    once, again = (plan(LLAMA, "full", 2, 64, gradient_accumulation_steps=n) for n in (1, 2))
    assert again.peak_moment.terms["gradients"] > once.peak_moment.terms["gradients"]


def test_virtual_tokens_come_on_top_and_need_positions() -> None:
    config = GPT2Config(n_layer=2)
    few, many = (plan(config, PromptTuning(num_virtual_tokens=n), 4, 500) for n in (10, 500))
    assert many.activations > 1.8 * few.activations
    with pytest.raises(
        ConfigError, match="24 virtual ones of Prefix tuning, but this base has 1024 positions: at most"
    ):
        plan(config, PrefixTuning(num_virtual_tokens=24), 4, 1001)


def test_nothing_is_left_on_the_model_and_its_random_state() -> None:
    model = llama()
    before = ({n: p.requires_grad for n, p in model.named_parameters()}, model.config.to_json_string())
    state, attention = torch.get_rng_state(), F.scaled_dot_product_attention
    with torch.random.fork_rng():
        plan(model, "prefix", 2, 16, device="cpu", gradient_checkpointing=True)
    assert ({n: p.requires_grad for n, p in model.named_parameters()}, model.config.to_json_string()) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert F.scaled_dot_product_attention is attention
    assert not model._forward_hooks


def test_layers_of_two_kinds_are_both_recorded() -> None:
    config = gemma3().config
    config.num_hidden_layers = 12
    config.layer_types = ["sliding_attention", "sliding_attention", "full_attention"] * 4
    for method in (FullFineTuning(), LoRA(), PromptTuning()):
        short = Planner(Workload.of(config, method, torch.bfloat16, "cuda"), Execution())
        whole = Planner(Workload.of(config, method, torch.bfloat16, "cuda"), Execution(), all_layers=True)
        shape = Shape(2, 40, 39, 78)
        assert short.peak(shape) == whole.peak(shape)
        assert short.built.repeats
        assert not whole.built.repeats


def test_weights_in_some_layers_only_are_traced_whole() -> None:
    some = plan(LLAMA, LoRA(target_modules=r"model\.layers\.[67]\..*proj"), 2, 128)
    lower = plan(LLAMA, LoRA(target_modules=r"model\.layers\.[01]\..*proj"), 2, 128)
    assert some.source == lower.source == "full trace"
    assert some.activations < 0.5 * lower.activations  # below the lowest weight nothing is kept


def test_fits_and_its_inverse() -> None:
    estimate = plan(LLAMA, "lora", 8, 256, dtype="bfloat16")
    room = estimate.needed
    assert estimate.fits(room)
    assert not estimate.fits(room - 1)
    assert estimate.largest_batch(room) >= 8
    memory = estimate.context + 200 * 2**20
    rows, tokens = estimate.largest_batch(memory), estimate.largest_length(memory)
    assert rows >= 1
    for batch, length in ((rows, 256), (8, tokens)):
        assert plan(LLAMA, "lora", batch, length, dtype="bfloat16").needed <= 1.05 * memory
    for batch, length in ((rows + 2, 256), (8, tokens + 60)):
        assert plan(LLAMA, "lora", batch, length, dtype="bfloat16").needed >= 0.95 * memory
    assert estimate.largest_batch(1) == estimate.largest_length(1) == 0
    assert estimate.largest_length(1000 * GIB) == LLAMA.max_position_embeddings


@pytest.mark.parametrize(
    ("method", "settings", "says"),
    [
        ("full", {"batch": 1, "length": 16}, "A method that leaves the base as it is"),
        ("lora", {"batch": 32, "length": 512}, "gradient_checkpointing=auto keeps less"),
        ("lora", {"batch": 32, "length": 512}, "as much as it takes (selective, true, offload)."),
        ("lora", {"batch": 32, "length": 512, "device": "cpu"}, "(selective, true)."),
        (
            "lora",
            {"batch": Shape(64, 512, 8, 64 * 8), "gradient_checkpointing": "selective"},
            "gradient_checkpointing=true or offload keeps",
        ),
        ("lora", {"batch": 32, "length": 512, "gradient_checkpointing": True}, "per_device_train_batch_size="),
        ("lora", {"batch": 32, "length": 512, "cuda_graphs": True}, "cuda_graphs=false keeps no captured blocks"),
        ("lora", {"batch": 1, "length": 16, "validation": Shape.whole(64, 512)}, "per_device_eval_batch_size"),
        ("lora", {"batch": 1, "length": 16, "dtype": "float32", "device": "cpu"}, "bfloat16"),
    ],
)
def test_advice_names_what_helps(method: str, settings: dict[str, Any], says: str) -> None:
    estimate: Estimate = plan(LLAMA, method, **{"dtype": "bfloat16", **settings})
    assert says in estimate.advice(estimate.needed - 2**20)
    assert estimate.advice(estimate.needed) == ""


def test_an_estimate_is_a_value() -> None:
    model = llama()
    asked = {"device": "cpu", "validation": 4}
    estimate = plan(model, LoRA(r=4), 4, 32, **asked)
    assert plan(model, LoRA(r=4), 4, 32, **asked) == estimate
    assert plan(model, LoRA(r=4), 4, 33, **asked) != estimate
    stored = pickle.dumps(estimate)
    assert len(stored) < 2**16, "no weights are in it"
    copied = pickle.loads(stored)
    assert copied == estimate
    memory = 2 * estimate.peak_reserved
    assert copied.largest_batch(memory) == estimate.largest_batch(memory) > 4
    assert asdict(estimate)["moments"] == tuple(asdict(moment) for moment in estimate.moments)


def test_an_execution_says_what_the_settings_say() -> None:
    settings = plan(LLAMA, PromptTuning(), 4, 64, torch_compile=True, cuda_graphs=True, validation=2)
    said = plan(
        LLAMA, PromptTuning(), Shape.whole(4, 64), execution=Execution(True, True), validation=Shape.whole(2, 64)
    )
    assert said == settings
    lean = plan(LLAMA, BitFit(), 4, 64, execution=Execution(recomputation="selective"))
    assert lean == plan(LLAMA, BitFit(), 4, 64, gradient_checkpointing="selective")
    # with a mask cuDNN's kernels are never taken, whatever was decided
    masked = replace(Shape.whole(4, 64), padded=True)
    with_cudnn, without = (
        plan(LLAMA, "prefix", masked, dtype="bfloat16", execution=Execution(cudnn=allowed)) for allowed in (True, False)
    )
    assert with_cudnn == without


def test_a_batch_of_another_size_has_the_same_share_of_targets() -> None:
    shape = Shape(4, 33, 8, 20, padded=True, columns=16, documents=((33,),) * 4)
    assert shape.resized(2, 65) == Shape(2, 65, 16, 32, padded=True, columns=32)
    assert shape.cut(5) == replace(shape, length=5, targets=4, all_targets=16)
    assert shape.cut(33) is shape


def test_sizes() -> None:
    assert bytes_of("24GiB") == 24 * GIB
    assert bytes_of("1.5 GB") == 1_500_000_000
    assert bytes_of("512m") == 512_000_000
    assert bytes_of("1024") == bytes_of(1024) == 1024
    assert shown(24 * GIB) == "24 GiB"
    for wrong in ("many", "24 XB", "-3GiB", ""):
        with pytest.raises(ConfigError, match="such as 24GiB"):
            bytes_of(wrong)


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(ConfigError, match="at least 1 row of 2 tokens"):
        plan(LLAMA, "lora", 0, 16)
    with pytest.raises(ConfigError, match="did you mean 'lora'"):
        plan(LLAMA, "lore")


def test_public_and_for_json() -> None:
    estimate = spectune.plan("spectune-tiny", "ia3", 4, 64)
    assert isinstance(estimate, spectune.Estimate)
    assert json.loads(json.dumps(estimate.to_dict()))["peak_reserved"] == estimate.peak_reserved
    assert set(estimate.memory()) == {*TERMS, "peak_allocated", "peak_reserved"}
    assert estimate.peak_reserved >= estimate.peak_allocated
    assert estimate.context > 0
    assert spectune.plan("spectune-tiny", "ia3", 4, 64, device="cpu").context == 0


def test_kernels() -> None:
    def heads(count: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(2, count, 16, dim, dtype=dtype, device="meta")

    half, single = heads(8, 64, torch.bfloat16), heads(8, 64, torch.float32)
    mask = torch.empty(2, 1, 16, 16, dtype=torch.bool, device="meta")
    if not torch.cuda.is_available():  # then a Hopper is meant
        assert cudnn_head_limit() == 256
        assert kernel_for("cuda", half, half, half, mask) == "cudnn"
    assert kernel_for("cuda", single, single, single, mask) == "efficient"
    wide = heads(8, 260, torch.bfloat16)
    assert kernel_for("cuda", wide, wide, wide, None) == "efficient"
    assert kernel_for("cpu", single, single, single, mask) == "cpu-flash"
    assert kernel_for("cpu", single, single, single, mask, 0.1) == "math"


def test_free_memory_is_the_system_s_or_the_container_s(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable: 50 kB\n")
    assert free_memory("cpu", proc=tmp_path, cgroup=tmp_path / "none") == 50 * 1024
    (tmp_path / "memory.max").write_text("30000\n")
    (tmp_path / "memory.current").write_text("20000\n")
    (tmp_path / "memory.stat").write_text("anon 15000\nfile 5000\n")
    assert free_memory("cpu", proc=tmp_path, cgroup=tmp_path) == 15000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory("cpu", proc=tmp_path, cgroup=tmp_path) == 50 * 1024
    assert free_memory("mps") is None
