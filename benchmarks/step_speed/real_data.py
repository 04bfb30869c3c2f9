"""What packing and a loss on completions alone add on short rows: E2E's lengths, steps drawn as by `spectune train`."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

import torch
from benchmarks.step_speed import ours
from benchmarks.step_speed.data import RATE, RATES, USED_IDS, Watched
from benchmarks.step_speed.peers import compile_blocks, peft_model
from benchmarks.step_speed.setting import Setting
from torch import nn

from spectune.data import Example, Row, batches, by_length, collate
from spectune.methods import BY_NAME
from spectune.training.decisions import decide

#: deciles of the tokens of E2E's prompts and completions (every tenth training row, gpt2's tokenizer, end token
#: included), and how the two go together
PROMPTS = (16, 26, 29, 32, 34, 36, 39, 42, 45, 50, 58)
COMPLETIONS = (4, 17, 20, 22, 24, 26, 29, 32, 35, 40, 74)
CORRELATION = 0.71
#: rows: as many as steps could take
STEPS = 64
SYSTEMS: dict[str, dict[str, Any]] = {
    "real-ours-packed": {"packing": True},
    "real-ours-padded": {},
    "real-ours-padded-all": {},
}


def rows_like_e2e(count: int, vocabulary: int, *, all_targets: bool, longest: int | None = None) -> list[Example]:
    """Rows of random tokens, as long as E2E's; where a base has no room for `longest` tokens, prompts are shorter."""
    generator = torch.Generator().manual_seed(0)
    first, other = torch.randn(2, count, generator=generator)
    second = CORRELATION * first + (1 - CORRELATION**2) ** 0.5 * other
    lengths = [_quantile(PROMPTS, first), _quantile(COMPLETIONS, second)]
    top = min(vocabulary, USED_IDS)
    if longest is not None:
        lengths[0] = [min(p, longest - c) for p, c in zip(*lengths, strict=True)]
    return [
        Example(torch.randint(0, top, (p + c,), generator=generator).tolist(), 0 if all_targets else p, Row("", ""))
        for p, c in zip(*lengths, strict=True)
    ]


def _quantile(deciles: tuple[int, ...], normal: torch.Tensor) -> list[int]:
    """Lengths of the distribution with these deciles, straight between them, at the ranks of normal numbers."""
    place = torch.special.ndtr(normal) * (len(deciles) - 1)
    low = place.long().clamp(max=len(deciles) - 2)
    values = torch.tensor(deciles, dtype=torch.float32)
    return (values[low] + (place - low) * (values[low + 1] - values[low])).round().long().tolist()


def windows(examples: list[Example], rows: int) -> list[list[int]]:
    """The rows of each step, as the loop draws them."""
    lengths = [len(example.input_ids) for example in examples]
    return [batch for step in batches(lengths, rows, seed=0, epoch=0) for batch in by_length(step, lengths, rows)]


def run(setting: Setting) -> dict[str, Any]:
    """Steps under the setting's meter, which counts the tokens of rows, not their padding."""
    name = setting.case.system
    examples = rows_like_e2e(
        STEPS * setting.rows,
        setting.config.vocab_size,
        all_targets=name.endswith("padded-all"),
        longest=setting.config.max_position_embeddings - BY_NAME[setting.case.method]().virtual_tokens,
    )
    drawn = windows(examples, setting.rows)
    facts = _peft(setting, examples, drawn) if "peft" in name else _ours(setting, examples, drawn)
    lengths = [len(example.input_ids) for example in examples]
    padded = statistics.fmean(max(lengths[i] for i in batch) * len(batch) for batch in drawn)
    return {**facts, "padding_share": 1 - statistics.fmean(lengths) * setting.rows / padded}


def _ours(setting: Setting, examples: list[Example], drawn: list[list[int]]) -> dict[str, Any]:
    variant = {"packing": False, **SYSTEMS[setting.case.system]}
    if setting.device.type == "cuda":
        variant["torch_compile"] = True
    prepared = ours.prepare(setting, variant)
    delta, config = prepared.delta, prepared.config
    lengths = [len(example.input_ids) for example in examples]
    how = decide(config, delta.family, delta.method, lengths, setting.device.type, steps=STEPS, delta=delta)
    packing = how.packing if config.packing is True else None
    with ours.our_step(prepared, examples, setting.most_steps, packing=packing, cudnn=how.cudnn) as step:
        setting.meter.begin()
        for batch in itertools.cycle(drawn):
            if setting.meter.step(step([batch]), *_counts(examples, batch)):
                break
    return prepared.facts()


def _peft(setting: Setting, examples: list[Example], drawn: list[list[int]]) -> dict[str, Any]:
    model = peft_model(setting.build(), setting.case.method)
    if setting.case.system.endswith("compiled"):
        compile_blocks(model)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    watched = Watched(trained)
    optimizer = torch.optim.AdamW(
        trained, lr=RATES.get(setting.case.method, RATE), weight_decay=0.0, fused=True
    )  # fmt: skip
    inputs: dict[str, Any] = {} if setting.case.method == "prefix" else {"use_cache": False}
    setting.meter.begin()
    for batch in itertools.cycle(drawn):
        collated = collate([examples[i] for i in batch], 0)
        placed = {name: tensor.to(setting.device, non_blocking=True) for name, tensor in collated.items()}
        loss = model(**placed, **inputs).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if setting.meter.step(loss, *_counts(examples, batch)):
            break
    return {"trained_parameters": sum(p.numel() for p in trained), "changed": watched.changed()}


def _counts(examples: list[Example], batch: list[int]) -> tuple[int, int]:
    """Tokens of a batch's rows, and those with a loss."""
    return sum(len(examples[i].input_ids) for i in batch), sum(examples[i].target_tokens for i in batch)
