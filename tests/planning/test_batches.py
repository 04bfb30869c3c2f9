"""Plans of batches that are not whole rows: packs of documents, and places that share a column with a target."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

from spectune.blocks.execution import Execution, Packing
from spectune.compute.varlen import loop_by_document
from spectune.data import Example, Row
from spectune.deltas import attach
from spectune.methods import method_from_name
from spectune.objectives import causal_lm
from spectune.planning import plan
from spectune.planning.planner import Planner
from spectune.planning.shape import Shape
from spectune.planning.workload import Workload
from spectune.training import TrainingConfig, train
from spectune.training.prediction import shape_of
from tests.contract.families import VOCABULARY, llama
from tests.planning.steps import real_peak
from tests.support import make_rows, make_tokenizer

ROWS, LENGTH, LEARNED = 6, 40, 6


class Bent(LlamaForCausalLM):
    """Its logits are no linear head's; it takes one list of places for all rows, as `logits_to_keep` is documented."""

    def forward(self, input_ids: Tensor, logits_to_keep: int | Tensor = 0, **given: Any) -> Any:  # type: ignore[override]
        found = self.model(input_ids=input_ids, **given)
        hidden = found.last_hidden_state
        logits = self.lm_head(hidden if isinstance(logits_to_keep, int) else hidden[:, logits_to_keep])
        found["logits"] = logits * logits.exp()
        return found


def bent() -> PreTrainedModel:
    """With so many words that its logits make the peak."""
    torch.manual_seed(0)
    config = llama().config
    config.vocab_size = 2000
    return Bent(config)


def learned_batch(columns: int) -> dict[str, Tensor]:
    """Rows of `LEARNED` targets each, in `columns` columns in all."""
    ids = torch.randint(1, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, -100)
    for row in range(ROWS):
        begin = LENGTH - LEARNED - (0 if row else columns - LEARNED)
        labels[row, begin : begin + LEARNED] = ids[row, begin : begin + LEARNED]
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("columns", [LEARNED, 2 * LEARNED])
def test_columns_that_hold_a_target(columns: int) -> None:
    model = bent()
    delta = attach(model, method_from_name("lora"))
    batch = learned_batch(columns)
    assert causal_lm.head_selection(model) == "column"
    measured = real_peak(model, delta, batch, checkpointing=False)
    shape = Shape(ROWS, LENGTH, LEARNED, ROWS * LEARNED, columns=columns)
    estimate = plan(model, "lora", shape, device="cpu")
    assert estimate.peak_allocated == pytest.approx(measured, rel=0.02)
    fewer, all_of_them = (plan(model, "lora", replace(shape, columns=n), device="cpu") for n in (columns - 4, None))
    assert fewer.logits < estimate.logits < all_of_them.logits


def test_more_tokens_have_more_columns() -> None:
    model = bent()
    estimate = plan(model, "lora", Shape(ROWS, LENGTH // 2, 4, 4 * ROWS, columns=8), device="cpu")
    longer = plan(model, "lora", Shape(ROWS, LENGTH, 8, 8 * ROWS, columns=16), device="cpu")
    # the share of targets and columns stays; both are rounded
    assert estimate.question.peaks(ROWS, LENGTH)[0] == pytest.approx(longer.peak_allocated, rel=0.01)


def row(length: int, learned: int) -> Example:
    return Example(list(range(length)), length - learned, Row(origin="row", text=""))


@pytest.mark.parametrize("padded", [True, False])
def test_the_columns_of_a_batch_are_those_of_its_labels(padded: bool) -> None:
    rows = [row(12, 4), row(12 if not padded else 7, 3), row(12 if not padded else 10, 1)]
    labels = torch.full((3, 12), -100)
    for number, example in enumerate(rows):
        end = len(example.input_ids)
        labels[number, end - example.target_tokens : end] = 1
    shape = shape_of([[example] for example in rows])
    assert shape.columns == int(causal_lm.target_mask(labels).any(0).sum())
    assert (shape.targets, shape.all_targets, shape.padded) == (4, 8, padded)


def test_the_columns_of_packs_are_counted_where_their_documents_lie() -> None:
    packs = [[row(5, 2), row(4, 1)], [row(8, 3)]]
    labels = torch.full((2, 9), -100)
    labels[0, [3, 4, 8]] = 1
    labels[1, [5, 6, 7]] = 1
    shape = shape_of(packs, Packing(True, loop_by_document))
    assert shape.columns == int(causal_lm.target_mask(labels).any(0).sum())
    assert shape.documents == ((5, 4), (8,))
    assert shape.kernel is loop_by_document


@pytest.mark.parametrize("method", ["lora", "prompt"])
@pytest.mark.parametrize("kernel", [None, loop_by_document], ids=["masks", "documents"])
def test_packs_in_a_deep_model_from_few_layers(method: str, kernel: Any) -> None:
    config = llama().config
    config.num_hidden_layers = 7
    packs = Shape(2, 40, 38, 74, documents=((25, 15), (20, 10, 8)), kernel=kernel)
    workload = Workload.of(config, method, torch.float32, "cpu")
    short, whole = (Planner(workload, Execution(), all_layers=every) for every in (False, True))
    assert short.peak(packs) == whole.peak(packs)
    assert short.built.repeats
    assert not whole.built.repeats


@pytest.mark.parametrize("method", ["lora", "full", "prefix"])
def test_a_packed_run_of_a_deep_model_is_predicted(method: str) -> None:
    sizes = {"vocab_size": 300, "n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 64}
    undropped = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(**sizes, **undropped, bos_token_id=0, eos_token_id=0, pad_token_id=0))
    config = TrainingConfig(max_steps=2, per_device_train_batch_size=8, packing=True)
    rows = make_rows(32)
    result = train(model, make_tokenizer(), method_from_name(method), rows[:24], rows[24:], config,
                   console=Console(quiet=True))  # fmt: skip
    assert result.memory_prediction_source == "trace"
    measured = result.peak_memory_bytes["train_allocated"]
    assert result.predicted_memory_bytes["peak_allocated"] == pytest.approx(measured, rel=0.03)
