"""Masks in training: none where padding stands on the right of a causal model's rows; what needs one has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, masking_utils

from spectune.blocks.execution import Execution, Packing
from spectune.compute.masks import OneTextRows
from spectune.deltas import Method, attached
from spectune.methods import LoRA, PromptTuning
from spectune.objectives import CAUSAL_LM
from spectune.training import RunResult, TrainingConfig, decisions, train
from spectune.training import loop as loop_module
from spectune.training.prediction import shape_of
from tests.support import make_model, make_rows, make_tokenizer
from tests.training.test_packing import METHODS


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each training batch, whether it has a mask."""
    seen: list[bool] = []
    real = CAUSAL_LM.loss_sum

    def watched(model: Any, batch: Mapping[str, Tensor], **named: Any) -> Any:
        seen.append("attention_mask" in batch)
        return real(model, batch, **named)

    monkeypatch.setattr(CAUSAL_LM, "loss_sum", watched)
    return seen


def run(
    method: Method, base: PreTrainedModel | None = None, rows: Any = None, **changes: Any
) -> tuple[RunResult, dict[str, Tensor]]:
    settings: dict[str, Any] = {"per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-3} | changes
    model = base or make_model()
    given = make_rows() if rows is None else rows
    result = train(model, make_tokenizer(), method, given, make_rows(6), TrainingConfig(packing=False, **settings))
    return result, {name: t.clone() for name, t in attached(model)["default"].training_state_dict().items()}


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_run_without_masks_is_the_one_with(
    method: Method, masks: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    untold, ours = run(method)
    assert masks
    assert not any(masks)
    masks.clear()
    monkeypatch.setattr(decisions, "why_mask_is_needed", lambda model: "the test says so")
    told, theirs = run(method)
    assert all(masks)
    assert untold.train_loss == pytest.approx(told.train_loss, rel=1e-5)
    assert untold.valid_loss == pytest.approx(told.valid_loss, rel=1e-4)
    # Adam divides by the gradient's size: where that is rounding alone, so is the step
    apart = [((ours[name] - tensor).abs() > 2e-5).float().mean().item() for name, tensor in theirs.items()]
    assert max(apart) < 0.02


def test_experts_are_told(masks: list[bool]) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    run(LoRA(r=2), MixtralForCausalLM(config))
    assert all(masks)


def test_rows_of_one_length_need_no_probe(masks: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: Any) -> str:
        raise AssertionError("there is no padding")

    monkeypatch.setattr(decisions, "why_mask_is_needed", refuse)
    run(LoRA(r=2), rows=make_rows()[:1] * 8)
    assert not any(masks)


def test_a_plan_has_the_masks_that_the_run_has() -> None:
    from spectune.data import encode, load_rows

    examples = encode(load_rows(make_rows()), make_tokenizer(), max_length=64).examples
    packs = [[example] for example in examples]
    assert shape_of(packs).padded
    assert not shape_of(packs, Packing(mask_free=True)).padded


def test_what_was_decided_is_the_same_again() -> None:
    from spectune.data import encode, load_rows
    from spectune.deltas import attach

    model = make_model()
    delta = attach(model, PromptTuning(num_virtual_tokens=4))
    examples = encode(load_rows(make_rows()), make_tokenizer(), max_length=64).examples
    config, lengths = TrainingConfig(packing=False), [len(example.input_ids) for example in examples]
    first, again = (
        decisions.decide(config, delta.family, delta.method, lengths, "cpu", steps=3, delta=delta) for _ in range(2)
    )
    assert first == again == Execution(packing=Packing(mask_free=True), cudnn=False)


def test_whether_rows_hold_several_texts_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A question that waits for the device, in every step of a run without masks."""
    asked: list[torch.Size] = []
    real = masking_utils.find_packed_sequence_indices

    def counting(position_ids: Tensor) -> Tensor | None:
        asked.append(position_ids.shape)
        return real(position_ids)

    begin, steps = loop_module.Loop.begin, list[int]()

    def counted(self: Any, window: Any) -> None:
        before = len(asked)
        begin(self, window)
        steps.append(len(asked) - before)

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", counting)
    monkeypatch.setattr(loop_module.Loop, "begin", counted)
    run(LoRA(r=2), max_steps=6)
    # the first also finds out what the head is
    assert steps[0] > 0
    assert steps[1:] == [0] * 5
    assert masking_utils.find_packed_sequence_indices is counting


def test_rows_that_hold_several_texts_are_found_in_every_pass() -> None:
    rows = OneTextRows()
    alone, packs = torch.arange(4)[None], torch.tensor([[0, 1, 0, 1]])
    for _ in range(2):
        with rows.passes():
            assert masking_utils.find_packed_sequence_indices(alone) is None
            found = masking_utils.find_packed_sequence_indices(packs)
        assert found is not None
        assert found.tolist() == [[0, 0, 1, 1]]


def test_padding_without_a_mask_is_not_looked_for() -> None:
    model = make_model()
    model.config.pad_token_id = 0
    rows = OneTextRows()
    with rows.passes():
        model.warn_if_padding_and_no_attention_mask(None, None)  # would index the tokens
    with pytest.raises(TypeError):
        model.warn_if_padding_and_no_attention_mask(None, None)
