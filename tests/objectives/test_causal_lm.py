from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from spectune.compute.memory import AllocationTracker
from spectune.objectives import CAUSAL_LM, causal_lm
from spectune.objectives.causal_lm import causal_lm_loss_sum


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=37, n_positions=32, n_embd=16, n_layer=2, n_head=2)).eval()


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config).eval()


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 37, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :4] = -100
    labels[1, :2] = -100
    labels[2, :7] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def reference(logits: Tensor, labels: Tensor) -> float:
    """Target by target, in float64, from the definition."""
    log_probabilities = logits.double().log_softmax(-1)
    total = 0.0
    for row in range(labels.shape[0]):
        for position in range(1, labels.shape[1]):
            if labels[row, position] != -100:
                total -= float(log_probabilities[row, position - 1, labels[row, position]])
    return total


def test_sum_and_count_equal_a_float64_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 9, 37, generator=generator) * 5
    labels = batch()["labels"]
    loss, count = causal_lm_loss_sum(logits, labels)
    assert loss.dtype == torch.float32
    assert count == int((labels[:, 1:] != -100).sum()) == 11
    assert loss.item() == pytest.approx(reference(logits, labels), rel=1e-6)


def test_gradient_equals_softmax_minus_target_in_float64() -> None:
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([[3, -100, 2, 6, -100], [-100, -100, 1, 0, 5]])
    causal_lm_loss_sum(logits, labels)[0].backward()
    expected = torch.zeros(2, 5, 7, dtype=torch.float64)
    for row in range(2):
        for position in range(1, 5):
            if (target := int(labels[row, position])) != -100:
                expected[row, position - 1] = logits[row, position - 1].detach().double().softmax(-1)
                expected[row, position - 1, target] -= 1
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.double(), expected, atol=1e-6, rtol=0)


def test_low_precision_logits_lose_no_more_than_their_own_rounding() -> None:
    exact = torch.randn(4, 64, 500, generator=torch.Generator().manual_seed(0)) * 4
    labels = torch.randint(0, 500, (4, 64), generator=torch.Generator().manual_seed(1))
    low = exact.bfloat16()
    truth = reference(low, labels)
    ours = causal_lm_loss_sum(low, labels)[0].item()
    naive = F.cross_entropy(low[:, :-1].reshape(-1, 500), labels[:, 1:].reshape(-1), reduction="sum").item()
    assert abs(ours - truth) <= 1e-6 * abs(truth)
    assert abs(ours - truth) <= abs(naive - truth)


def test_a_batch_without_targets_is_zero_with_a_gradient() -> None:
    logits = torch.randn(1, 3, 5, requires_grad=True)
    loss, count = causal_lm_loss_sum(logits, torch.full((1, 3), -100))
    loss.backward()
    assert (loss.item(), count) == (0.0, 0)
    assert logits.grad is not None
    assert not logits.grad.any()


def test_shapes_that_do_not_belong_together_are_named() -> None:
    with pytest.raises(ValueError, match=r"\[1, 3, 5\].*\[1, 4\]"):
        causal_lm_loss_sum(torch.zeros(1, 3, 5), torch.zeros(1, 4, dtype=torch.int64))


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("selection", ["row", "column", "none"])
def test_labelled_positions_give_the_loss_and_gradients_of_all_logits(
    make: type, selection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    if causal_lm.head_selection(model) != "row" and selection == "row":
        pytest.skip("this transformers picks positions for all rows together")
    monkeypatch.setattr(causal_lm, "head_selection", lambda _: selection)
    data = batch()
    full = model(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits
    expected, expected_count = causal_lm_loss_sum(full, data["labels"])
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    found = CAUSAL_LM.labelled_logits(model, data)
    keep = data["labels"][:, 1:] != -100
    # matrix products of other shapes may round the last bit otherwise
    torch.testing.assert_close(found.logits, full[:, :-1][keep], atol=1e-6, rtol=0)
    assert found.targets.tolist() == data["labels"][:, 1:][keep].tolist()
    assert found.rows.tolist() == [0] * 5 + [1] * 4 + [2] * 2

    loss, count = CAUSAL_LM.loss_sum(model, data)
    loss.backward()
    assert count == expected_count
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_the_head_runs_on_fewer_positions(make: type) -> None:
    model = make()
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: seen.append(output.shape[:2]))
    CAUSAL_LM.loss_sum(model, batch())
    rows, columns = seen[0]
    assert (rows, columns) == (3, 5 if causal_lm.head_selection(model) == "row" else 7)


def test_a_batch_without_targets_goes_through_the_model() -> None:
    data = batch()
    data["labels"] = torch.full_like(data["labels"], -100)
    loss, count = CAUSAL_LM.loss_sum(gpt2(), data)
    assert (loss.item(), count) == (0.0, 0)


class Headless(nn.Module):
    """A model without `logits_to_keep`, or with one that means something else."""

    def forward(self, input_ids: Tensor, use_cache: bool = True) -> SimpleNamespace:
        return SimpleNamespace(logits=F.one_hot(input_ids, 37).float())


class Ignores(Headless):
    def forward(self, input_ids: Tensor, use_cache: bool = True, logits_to_keep: object = 0) -> SimpleNamespace:
        return super().forward(input_ids)


class Strange(Headless):
    def forward(self, input_ids: Tensor, use_cache: bool = True, logits_to_keep: object = 0) -> SimpleNamespace:
        return super().forward(input_ids[:, :2])


def test_models_without_the_argument_or_deaf_to_it_are_run_in_full() -> None:
    data = batch()
    data.pop("attention_mask")
    expected = causal_lm_loss_sum(Headless()(data["input_ids"]).logits, data["labels"])
    assert causal_lm.head_selection(Headless()) == "none"
    assert causal_lm.head_selection(Ignores()) == "column"
    assert CAUSAL_LM.loss_sum(Headless(), data) == expected
    assert CAUSAL_LM.loss_sum(Ignores(), data) == expected


def test_an_argument_that_means_something_else_is_an_error() -> None:
    data = batch()
    data.pop("attention_mask")
    with pytest.raises(ValueError, match="Strange gave logits for"):
        CAUSAL_LM.loss_sum(Strange(), data)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_losses_of_tokens_add_up_to_the_sum_and_name_their_rows(make: type) -> None:
    model, data = make(), batch()
    found = CAUSAL_LM.token_losses(model, data)
    loss, count = CAUSAL_LM.loss_sum(model, data)
    assert found.losses.shape == found.rows.shape == (count,)
    assert found.losses.sum().item() == pytest.approx(loss.item(), rel=1e-6)
    assert found.rows.tolist() == [0] * 5 + [1] * 4 + [2] * 2


def test_losses_of_tokens_are_those_of_all_logits_which_never_exist() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40_000, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    model, ids = GPT2LMHeadModel(config).eval(), torch.randint(0, 40_000, (40, 32))
    data = {"input_ids": ids, "labels": ids}
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].double()
        CAUSAL_LM.prepare(model, data)
        with AllocationTracker(model.parameters()) as tracker:
            before = tracker.live_bytes
            found = CAUSAL_LM.token_losses(model, data)
    expected = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(found.losses.double(), expected, rtol=1e-6, atol=1e-6)
    assert tracker.peak_bytes - before < 4 * logits.numel() / 2


def test_what_is_computed_ahead_changes_nothing() -> None:
    model, data = llama(), batch()
    expected = CAUSAL_LM.loss_sum(model, data)
    CAUSAL_LM.precompute(data)
    assert CAUSAL_LM.loss_sum(model, data) == expected
    assert set(data) == {"input_ids", "attention_mask", "labels", "positions"}


def test_an_empty_model_has_the_head_and_no_weights() -> None:
    model = CAUSAL_LM.empty_model(llama().config, dtype=torch.bfloat16)
    assert type(model) is LlamaForCausalLM
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
