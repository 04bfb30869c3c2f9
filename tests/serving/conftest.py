"""A base with deltas of many methods on disk, served once for all tests that do not stop it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from spectune.deltas import Method, attach, detach
from spectune.methods import IA3, BitFit, BottleneckAdapter, DoRA, LNTuning, LoRA, PrefixTuning, PromptTuning
from spectune.serving.catalogue import Catalogue
from spectune.serving.loaded import Loaded
from spectune.storage import Bank
from tests.serving.server import Running, running
from tests.support import tiny_tokenizers

METHODS: dict[str, Method] = {
    "lora": LoRA(r=4, lora_alpha=8), "lora-wide": LoRA(r=8, lora_alpha=16), "dora": DoRA(r=4, lora_alpha=8),
    "adapter": BottleneckAdapter(bottleneck_dim=8, dropout=0.0), "bitfit": BitFit(), "ia3": IA3(), "ln": LNTuning(),
    "prefix": PrefixTuning(num_virtual_tokens=4), "prompt": PromptTuning(num_virtual_tokens=3),
}  # fmt: skip
CONTEXT = 96


def make_model() -> PreTrainedModel:
    """GPT-2 of two layers, with a vocabulary of bytes and some words."""
    torch.manual_seed(3)
    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
    config = GPT2Config(vocab_size=321, bos_token_id=320, eos_token_id=320, pad_token_id=320, **sizes)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():  # away from the first weights, under which one token is written again and again
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.15)
    return model


def make_deltas(model: PreTrainedModel, folder: Path) -> None:
    """A delta of each method, moved so that it does something."""
    for seed, (name, method) in enumerate(METHODS.items()):
        delta = attach(model, method, "task", seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in delta.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        delta.save(folder / name)
        detach(model, "task")


@dataclass(frozen=True)
class Material:
    """What is served: a model of its own for each server, deltas on disk."""

    tokenizer: Any
    deltas: Path
    made: PreTrainedModel

    def load(self, rows: int = 4, memory: str = "1GiB") -> Callable[[], Loaded]:
        def made() -> Loaded:
            model = make_model()
            return Loaded.of(model, self.tokenizer, Bank(model, device_memory=memory), rows)

        return made

    def catalogue(self) -> Catalogue:
        return Catalogue("tiny", self.deltas)

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    folder, model = tmp_path_factory.mktemp("deltas"), make_model()
    make_deltas(model, folder)
    return Material(tiny_tokenizers.byte_level(), folder, model)


@pytest.fixture(scope="session")
def served(material: Material) -> Iterator[Running]:
    with running(material.load(), material.catalogue()) as server:
        server.wait_until_ready()
        yield server
