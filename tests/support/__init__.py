"""What several rooms' tests need: a tiny tokenizer and a tiny model that go together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from spectune.evaluation import passage_kls

CORPUS = [
    "name: Ada | town: Leeds\nAda lives in Leeds.",
    "name: Ben | town: York\nBen has his home in York.",
    "What is an atom ? description",
    "The quick brown fox jumps over the lazy dog.",
] * 4


def make_tokenizer(*, bos: bool = False, chat: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 300 words, EOS as padding; `bos`: it puts BOS in front, as Llama's does."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(CORPUS, trainer)
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        bos_token="<s>" if bos else "<|endoftext|>",
    )
    if chat:
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}"
            "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        )
    return tokenizer


def forgetting_kl(model: PreTrainedModel, passages: Sequence[Sequence[int]], batch_size: int = 8) -> float:
    """The mean over all positions of all passages, in nats per token."""
    return math.fsum(passage_kls(model, passages, batch_size)) / sum(map(len, passages))


def checkpointed_by_transformers(model: PreTrainedModel) -> None:
    """Switch on transformers' own checkpointing, whose name changed in 5.24."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def make_model(*, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A GPT-2 of two layers for that tokenizer."""
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=300,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
    )
    return GPT2LMHeadModel(config).to(dtype).eval()


NAMES = ["Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gil", "Hal"]
TOWNS = ["Leeds", "York", "Bath", "Hull", "Ely"]


def make_rows(count: int = 24) -> list[dict[str, str]]:
    """Records and sentences of unlike lengths."""
    rows = []
    for i in range(count):
        name, town = NAMES[i % len(NAMES)], TOWNS[(i // 3) % len(TOWNS)]
        sentence = f"{name} lives in {town}." if i % 2 else f"The town of {town} is where {name} has a home."
        rows.append({"prompt": f"name: {name} | town: {town}\n", "completion": sentence})
    return rows
