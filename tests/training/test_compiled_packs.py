"""Packs in compiled blocks: one graph for all batches, with the kernel that CUDA has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.nn.attention import varlen as torch_varlen
from transformers import GPT2Config, GPT2LMHeadModel

from spectune.blocks.compile import compiled
from spectune.compute.varlen import flash_by_document, loop_by_document
from spectune.deltas import attach, packed, packing
from spectune.deltas.hooks import packed_attention
from spectune.methods import method_from_name
from spectune.training import TrainingConfig
from spectune.training.decisions import decide


def documented(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """What the kernel's documentation says, by masks made of the bounds; `[tokens, heads, dim]`."""
    assert window_size == (-1, 0)
    own, to_end = [], []
    for tokens, bounds in ((query, cu_seq_q), (key, cu_seq_k)):
        places = torch.arange(tokens.shape[0])
        document = torch.bucketize(places, bounds[1:], right=True)
        own.append(document)
        to_end.append(bounds[document + 1] - places)
    seen = (own[0][:, None] == own[1]) & (to_end[1] >= to_end[0][:, None])
    q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, seen, scale=scale)[0].transpose(0, 1)


@pytest.mark.parametrize(
    "method", ["lora", *(pytest.param(method, marks=pytest.mark.slow) for method in ("prefix", "prompt"))]
)
def test_batches_of_other_documents_share_a_graph(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setattr(torch_varlen, "varlen_attn", documented)
    monkeypatch.setattr(packed_attention, "flash_takes", lambda *tensors: True)
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 128, "vocab_size": 50}
    model = GPT2LMHeadModel(GPT2Config(**sizes, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)).train()
    delta = attach(model, method_from_name(method), "task")
    model.train()
    torch._dynamo.reset()
    counters.clear()

    def loss(lengths: list[int]) -> Tensor:
        ids = torch.arange(sum(lengths))[None] % 50
        documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
        places = torch.cat([torch.arange(n) for n in lengths])[None]
        with packed(model, documents):
            logits: Tensor = model(input_ids=ids, position_ids=places, use_cache=False).logits
        return logits.square().mean()

    # longest documents of 11 to 44 tokens
    batches = [[30, 41, 9], [40, 23], [7, 8, 9, 10, 11], [33, 2, 44], [38, 19], [6, 5, 9, 3], [36, 39, 2]]
    graphs, compiled_losses = [], []
    with packing(model, flash_by_document, longest=44):
        losses = [float(loss(lengths).detach()) for lengths in batches]
        with compiled(model, delta.family, backend="eager"):
            for lengths in batches:
                found = loss(lengths)
                found.backward()
                compiled_losses.append(float(found.detach()))
                graphs.append(counters["stats"]["unique_graphs"])

    assert compiled_losses == pytest.approx(losses, rel=1e-5)
    assert not counters["graph_break"]
    # the second batch has other sizes, which are then taken to vary
    assert len(set(graphs[1:])) == 1, graphs


def test_a_compiled_run_on_a_cpu_packs_by_masks() -> None:
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 64, "vocab_size": 50}
    model = GPT2LMHeadModel(GPT2Config(**sizes, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0))
    delta = attach(model, method_from_name("bitfit"), "task")
    lengths = [3, 9, 20, 4]
    for compiling, kernel in ((False, loop_by_document), (True, None)):
        config = TrainingConfig(packing=True, torch_compile=compiling)
        found = decide(config, delta.family, delta.method, lengths, "cpu", steps=1, delta=delta)
        assert found.packing.kernel is kernel
