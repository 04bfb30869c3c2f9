"""LoRA on experts with the kernels of a CUDA device: grouped products in bfloat16."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from spectune.blocks.compile import compiled
from spectune.blocks.cuda_graphs import graphed
from spectune.deltas import attach, attached, detach, merge_and_measure
from spectune.methods import LoRA
from spectune.objectives import CAUSAL_LM

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore:TensorFloat32"),
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`"),
]

SIZES = {"vocab_size": 512, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512}  # fmt: skip
METHOD = LoRA(r=5, lora_alpha=10, target_modules=(), target_parameters="all-experts")


def qwen3_moe() -> PreTrainedModel:
    config = Qwen3MoeConfig(**SIZES, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128)
    return Qwen3MoeForCausalLM(config)


def gpt_oss() -> PreTrainedModel:
    config = GptOssConfig(**SIZES, intermediate_size=128, num_local_experts=8, num_experts_per_tok=2, sliding_window=64)
    return GptOssForCausalLM(config)


def made(kind: str, dtype: torch.dtype, implementation: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = {"qwen3_moe": qwen3_moe, "gpt_oss": gpt_oss}[kind]().eval().to("cuda", dtype)
    model.set_experts_implementation(implementation)
    return model


def moved(model: PreTrainedModel) -> nn.Module:
    delta = attach(model, METHOD, "task")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_((torch.randn(parameter.shape, generator=generator) * 0.05).cuda())
    return model


def stepped(kind: str, dtype: torch.dtype, implementation: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model = made(kind, dtype, implementation)
    ids = torch.randint(0, 512, (2, 64), generator=torch.Generator().manual_seed(4)).cuda()
    moved(model)
    out = model(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    gradients = [p.grad.flatten() for name, p in model.named_parameters() if ".deltas." in name]
    return out.logits.detach().float(), gradients


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_bfloat16_is_near_float32(kind: str, implementation: str) -> None:
    """A rank that fills no 16 bytes, too. Routers choose by rounded scores: some tokens go elsewhere."""
    exact, exact_gradients = stepped(kind, torch.float32, "eager")
    got, gradients = stepped(kind, torch.bfloat16, implementation)
    assert float((got - exact).abs().mean()) <= 0.05 * float(exact.abs().mean())
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    cosine = torch.cosine_similarity(torch.cat(gradients), torch.cat(exact_gradients), dim=0)
    assert float(cosine) >= 0.97


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_float32_is_what_eager_gives(implementation: str) -> None:
    exact, exact_gradients = stepped("qwen3_moe", torch.float32, "eager")
    got, gradients = stepped("qwen3_moe", torch.float32, implementation)
    assert torch.allclose(got, exact, atol=1e-4)
    assert torch.allclose(torch.cat(gradients), torch.cat(exact_gradients), atol=1e-4)


def test_no_copy_of_the_experts_and_no_gradient_of_theirs_is_made() -> None:
    """Against one trained by hand on the sum: memory of a step beyond the weights."""
    model = made("qwen3_moe", torch.bfloat16, "grouped_mm")
    experts = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if ".experts." in n)
    ids = torch.randint(0, 512, (1, 16), generator=torch.Generator().manual_seed(4)).cuda()
    moved(model)
    for _ in range(2):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        peak = torch.cuda.max_memory_allocated() - before
        model.zero_grad()
    assert peak < experts / 2, (peak, experts)


def test_merged_and_taken_off() -> None:
    model = made("gpt_oss", torch.float32, "grouped_mm")
    ids = torch.randint(0, 512, (2, 64), generator=torch.Generator().manual_seed(4)).cuda()
    with torch.no_grad():
        model.requires_grad_(False)
        before = model(input_ids=ids, use_cache=False).logits
        moved(model)
        merged, _ = merge_and_measure(model, "task")
        assert torch.allclose(
            merged(input_ids=ids, use_cache=False).logits, model(input_ids=ids, use_cache=False).logits, atol=1e-4
        )
        detach(model, "task")
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)


@pytest.mark.parametrize("how", ["compiled", "graphs"])
def test_compiled_and_captured_blocks_give_what_the_blocks_give(how: str) -> None:
    ids = torch.randint(0, 512, (2, 64), generator=torch.Generator().manual_seed(4)).cuda()
    found: list[Any] = []
    for executed in (False, True):
        model = made("qwen3_moe", torch.bfloat16, "grouped_mm")
        moved(model).train()
        delta = attached(model)["task"]
        torch._dynamo.reset()
        with contextlib.ExitStack() as stack:
            if executed and how == "compiled":
                stack.enter_context(compiled(model, delta.family))
            if executed and how == "graphs":
                stack.enter_context(graphed(model, delta.family, list(delta.parameters())))
            for _ in range(6):
                for parameter in delta.parameters():
                    parameter.grad = None
                loss, _ = CAUSAL_LM.loss_sum(model, {"input_ids": ids, "labels": ids})
                loss.backward()
        found.append((float(loss.detach()), torch.cat([p.grad.flatten().double() for p in delta.parameters()])))
    (loss, gradient), (other_loss, other) = found
    assert other_loss == pytest.approx(loss, rel=1e-2)
    assert float(torch.cosine_similarity(gradient, other, dim=0)) >= (0.99 if how == "compiled" else 0.9999)
