"""On a CUDA device: a prefix before causal text goes through flash or cuDNN attention, and is what it should be; and
padding on the right needs no mask there either. `pytest -m cuda tests/cuda`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from spectune.blocks.compile import compiled
from spectune.data import Example, Row, collate
from spectune.deltas import Method, attach, why_mask_is_needed
from spectune.deltas.hooks import prefix_kernel
from spectune.methods import LoRA, PrefixTuning, PromptTuning
from spectune.objectives import CAUSAL_LM

pytestmark = pytest.mark.cuda

#: bfloat16 has 8 bits: an error of 2^-8 of the largest number is one rounding; probabilities, output and gradients are
#: rounded once each, and sums over queries and rows average that out
TOLERANCE = 2e-2
#: cosine of gradients in bfloat16 with those in float32, over all weights
COSINE = 0.999
KERNELS = {
    "flash": [SDPBackend.FLASH_ATTENTION],
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "whichever": [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION],
}
BATCH, TEXT, HEADS = 2, 300, 8


class Host(nn.Module):
    """What transformers' function asks of an attention module."""

    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def dense(query: Tensor, key: Tensor, value: Tensor, lead_key: Tensor, lead_value: Tensor) -> Tensor:
    """The prefix and the text up to itself for each query, `[batch, text, heads, dim]`."""
    groups, count, text = query.shape[1] // key.shape[1], lead_key.shape[1], query.shape[2]
    keys, values = (
        torch.cat([lead.expand(len(own), -1, -1, -1), own], 2).repeat_interleave(groups, 1)
        for lead, own in ((lead_key, key), (lead_value, value))
    )
    scores = query @ keys.transpose(2, 3) * query.shape[-1] ** -0.5
    place = torch.arange(count + text, device=query.device)
    hidden = place > torch.arange(text, device=query.device)[:, None] + count
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(1, 2)


def with_gradients(out: Tensor, weights: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), tensors)]


@pytest.mark.parametrize("run", ["eager", "compiled"])
@pytest.mark.parametrize("kernel", list(KERNELS))
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("count", [1, 20, 37])
@pytest.mark.parametrize("kv_heads", [8, 2], ids=["MHA", "GQA"])
def test_output_and_gradients(kv_heads: int, count: int, dim: int, kernel: str, run: str) -> None:
    """Against float64, with no other kernel to fall back on."""
    hopper = torch.cuda.get_device_capability() >= (9, 0)  # before it, torch does not choose cuDNN
    generator = torch.Generator("cuda").manual_seed(count)
    shapes = [(BATCH, HEADS, TEXT, dim), *[(BATCH, kv_heads, TEXT, dim)] * 2, *[(kv_heads, count, dim)] * 2]
    tensors = [
        torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for shape in shapes
    ]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    weights = torch.randn(BATCH, TEXT, HEADS, dim, generator=generator, device="cuda", dtype=torch.bfloat16)
    wanted = with_gradients(dense(*exact), weights.double(), exact)

    def ours(query: Tensor, key: Tensor, value: Tensor, lead_key: Tensor, lead_value: Tensor) -> Tensor:
        lead, host = (lead_key, lead_value), Host(HEADS // kv_heads)
        return prefix_kernel.attend(sdpa_attention_forward, host, query, key, value, lead, {})[0]

    torch._dynamo.reset()
    function = torch.compile(ours, fullgraph=True) if run == "compiled" else ours
    with sdpa_kernel(KERNELS[kernel if hopper else "flash"]):
        found = with_gradients(function(*tensors), weights, tensors)
    for name, a, b in zip(
        ("output", "query", "key", "value", "prefix key", "prefix value"), found, wanted, strict=True
    ):
        error = float((a.double() - b).abs().max() / b.abs().max())
        assert error <= TOLERANCE, f"{name}: off by {error:.2g} of the largest"


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=512, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2,
        intermediate_size=1024,
    )  # fmt: skip
    return LlamaForCausalLM(config).cuda()


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 512, "n_layer": 3, "n_head": 8, "n_positions": 512, "vocab_size": 1024}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).cuda()


def rows(*lengths: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, 1024, (length,), generator=generator).tolist() for length in lengths]
    batch = collate([Example(row, 0, Row(f"t:{n}", text="")) for n, row in enumerate(ids)], 3)
    return {name: tensor.cuda() for name, tensor in batch.items()}


def step(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[float, Tensor]:
    """Mean loss, and all gradients in a row, float32."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = None
    loss, count = CAUSAL_LM.loss_sum(model, batch)
    (loss / count).backward()
    return float(loss.detach()) / count, torch.cat([p.grad.float().flatten() for p in trained if p.grad is not None])


def assert_alike(found: tuple[float, Tensor], wanted: tuple[float, Tensor]) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=5e-3)
    assert float(torch.cosine_similarity(found[1], wanted[1], dim=0)) >= COSINE
    assert float(found[1].norm()) == pytest.approx(float(wanted[1].norm()), rel=TOLERANCE)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_step_in_compiled_blocks_is_that_of_a_dense_mask_in_float32(make: Callable[[], PreTrainedModel]) -> None:
    """Through flash or cuDNN attention alone."""
    model = make()
    delta = attach(model, PrefixTuning(num_virtual_tokens=20), "task")
    batch = rows(256, 256)
    del batch["attention_mask"]
    model.set_attn_implementation("eager")
    wanted = step(model, batch)
    model.to(torch.bfloat16).train()
    model.set_attn_implementation("sdpa")
    with sdpa_kernel(KERNELS["whichever"]):
        eager = step(model, batch)
        torch._dynamo.reset()
        with compiled(model, delta.family):
            fast = step(model, batch)
            before = torch._dynamo.utils.counters["frames"]["ok"]
            again = step(model, batch)
            assert torch._dynamo.utils.counters["frames"]["ok"] == before
    for found in (eager, fast, again):
        assert_alike(found, wanted)


@pytest.mark.parametrize("method", [LoRA(r=4), PrefixTuning(num_virtual_tokens=20), PromptTuning()], ids=repr)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_padding_on_the_right_needs_no_mask(make: Callable[[], PreTrainedModel], method: Method) -> None:
    model = make().to(torch.bfloat16)
    attach(model, method, "task")
    assert why_mask_is_needed(model) is None
    batch = rows(256, 31, 130)
    told = step(model, batch)
    del batch["attention_mask"]
    with sdpa_kernel(KERNELS["whichever"]):
        assert_alike(step(model, batch), told)
