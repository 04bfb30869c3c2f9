"""A small base of a known shape from a corpus, in a given time: packed windows, AdamW over float32 weights, bfloat16
products, and a cosine of the time that has passed."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.rates.material import TOKENIZER, Codes, tokens_of
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

WINDOW = 512
WARMUP_STEPS = 100
VOCABULARY = 16_384
#: of each shape its config and its highest learning rate
SHAPES: dict[str, tuple[Callable[[], PretrainedConfig], float]] = {
    "gpt2-60m": (
        lambda: GPT2Config(
            vocab_size=VOCABULARY, n_positions=1024, n_embd=640, n_layer=10, n_head=10, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        ),
        1.5e-3,
    ),
    "llama-120m": (
        lambda: LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=896, intermediate_size=2432, num_hidden_layers=12,
            num_attention_heads=14, num_key_value_heads=7, max_position_embeddings=1024, tie_word_embeddings=True,
            bos_token_id=0, eos_token_id=0, pad_token_id=0,
        ),
        1e-3,
    ),
    "tiny-test": (
        lambda: GPT2Config(vocab_size=VOCABULARY, n_positions=1024, n_embd=64, n_layer=2, n_head=2,
                           bos_token_id=0, eos_token_id=0, pad_token_id=0),
        1e-3,
    ),
}  # fmt: skip


def pretrain(material: Path, shape: str, seconds: float, windows: int, bases: Path) -> dict[str, Any]:
    """Train for so many seconds, write the base as a transformers folder in bfloat16, and return what came of it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    make, highest = SHAPES[shape]
    model: Any = AutoModelForCausalLM.from_config(make(), attn_implementation="sdpa").to(device)
    train, valid = (_windows(tokens_of(material / f"{name}.xz"), device) for name in ("train", "valid"))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=highest, betas=(0.9, 0.95), fused=True)
    begin, step, loss = time.perf_counter(), 0, torch.zeros(())
    order = torch.randperm(len(train), device=device)
    while (passed := (time.perf_counter() - begin) / seconds) < 1:
        at = step * windows % (len(train) - windows + 1)
        rate = highest * min(1.0, (step + 1) / WARMUP_STEPS) * (0.05 + 0.475 * (1 + math.cos(math.pi * passed)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = _loss(model, train[order[at : at + windows]], device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 10 == 0 and device == "cuda":
            torch.cuda.synchronize()  # else the host runs ahead, and the clock with it
    passed_seconds = time.perf_counter() - begin
    with torch.no_grad():
        judged = [float(_loss(model, part, device)) for part in valid.split(windows) if len(part) == windows]
    folder = bases / shape
    model.to(torch.bfloat16).save_pretrained(folder)
    for file in (material / TOKENIZER).glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    return {
        "kind": "pretrain", "base": shape, "hidden": int(model.config.hidden_size), "steps": step,
        "parameters": sum(p.numel() for p in model.parameters()), "tokens": step * windows * WINDOW,
        "distinct_tokens": train.numel(), "seconds": round(passed_seconds, 1), "rate": highest,
        "train_loss": float(loss.detach()), "valid_loss": sum(judged) / max(1, len(judged)),
    }  # fmt: skip


def _windows(codes: Codes, device: str) -> torch.Tensor:
    whole = codes[: len(codes) // WINDOW * WINDOW].astype("int64")
    return torch.from_numpy(whole).view(-1, WINDOW).to(device)


def _loss(model: Any, ids: torch.Tensor, device: str) -> torch.Tensor:
    with torch.autocast(device, dtype=torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
