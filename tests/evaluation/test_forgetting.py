from __future__ import annotations

import copy
import math

import pytest
import torch
from tests.support import forgetting_kl
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from spectune.deltas import Delta, attach, route
from spectune.errors import ConfigError, DataError
from spectune.evaluation import passage_kls, sample_passages
from spectune.methods import BitFit, FullFineTuning, LoRA

PASSAGES = [[0, 5, 6, 7, 8, 9], [0, 3], [0, 11, 12, 13]]


def move(delta: Delta) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


@torch.no_grad()
def reference(base: PreTrainedModel, delta: Delta) -> list[float]:
    """Passage by passage, unpadded, from the definition, in float64 throughout: the LoRA is added to the weights."""
    base = copy.deepcopy(base).double().eval()
    tuned = copy.deepcopy(base)
    state = {name: tensor.double() for name, tensor in delta.state_dict().items()}
    for path in {name.rpartition(".")[0] for name in state}:
        change = state[f"{path}.lora_B"] @ state[f"{path}.lora_A"] * (32 / 2)
        module = tuned.get_submodule(path)
        module.weight += change.T if isinstance(module, Conv1D) else change
    sums = []
    for ids in PASSAGES:
        p = base(input_ids=torch.tensor([ids])).logits[0].softmax(-1)
        q = tuned(input_ids=torch.tensor([ids])).logits[0].softmax(-1)
        terms = [float(p[t, v]) * math.log(p[t, v] / q[t, v]) for t in range(len(ids)) for v in range(p.shape[1])]
        sums.append(math.fsum(terms))
    return sums


def test_nothing_is_forgotten_at_attach(model: PreTrainedModel) -> None:
    attach(model, LoRA(r=2))
    assert forgetting_kl(model, PASSAGES) == 0.0


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_kl_of_moved_weights_equals_a_float64_reference(model: PreTrainedModel, batch_size: int) -> None:
    base = copy.deepcopy(model)
    delta = attach(model, LoRA(r=2, lora_alpha=32), name="a")
    move(delta)
    expected = reference(base, delta)
    assert passage_kls(model, PASSAGES, batch_size) == pytest.approx(expected, rel=1e-4)
    kl = forgetting_kl(model, PASSAGES, batch_size)
    assert kl == pytest.approx(sum(expected) / 12, rel=1e-4)
    assert kl > 0.01
    assert all(module.training for module in model.modules())


def test_it_is_the_current_deltas(model: PreTrainedModel) -> None:
    attach(model, LoRA(r=2), name="still")
    move(attach(model, LoRA(r=2), name="moved"))
    assert forgetting_kl(model, PASSAGES) > 0.01
    with route(model, "still"):
        assert forgetting_kl(model, PASSAGES) == 0.0


def test_a_fully_tuned_model_needs_the_kept_base(model: PreTrainedModel) -> None:
    delta = attach(model, FullFineTuning(), keep_base=True)
    assert forgetting_kl(model, PASSAGES) == 0.0
    move(delta)
    assert forgetting_kl(model, PASSAGES) > 0.01


def test_a_fully_tuned_model_without_it_is_refused(model: PreTrainedModel) -> None:
    attach(model, FullFineTuning())
    with pytest.raises(ConfigError, match="keep_base"):
        forgetting_kl(model, PASSAGES)


def test_nothing_to_compare_is_an_error(model: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="nothing is attached"):
        forgetting_kl(model, PASSAGES)
    attach(model, LoRA(r=2))
    with pytest.raises(DataError, match="expected token ids"):
        forgetting_kl(model, [])
    with pytest.raises(DataError, match="expected token ids"):
        forgetting_kl(model, [[1], []])


def test_masked_vocabulary_entries_add_nothing(model: PreTrainedModel) -> None:
    attach(model, LoRA(r=2))

    def mask(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        return output.index_fill(-1, torch.tensor([3, 4]), -torch.inf)

    model.get_output_embeddings().register_forward_hook(mask)
    assert forgetting_kl(model, PASSAGES) == 0.0


def test_passages_come_from_the_bare_base_by_seed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    drawn = sample_passages(model, tokenizer, count=5, length=20, seed=3)
    assert [len(ids) for ids in drawn] == [20] * 5
    assert {ids[0] for ids in drawn} == {0}
    assert len({tuple(ids) for ids in drawn}) == 5
    move(attach(model, BitFit()))
    assert sample_passages(model, tokenizer, count=5, length=20, seed=3) == drawn
    assert sample_passages(model, tokenizer, count=5, length=20, seed=4) != drawn


def test_passages_follow_the_bases_distribution(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Second tokens are independent draws of p(. | start): frequencies within 5 standard deviations, EOS among them."""
    count = 2000
    drawn = sample_passages(model, tokenizer, count=count, length=2, batch_size=500)
    with torch.no_grad():
        p = model.eval()(input_ids=torch.tensor([[0]])).logits[0, 0].double().softmax(-1)
    frequency = torch.bincount(torch.tensor([ids[1] for ids in drawn]), minlength=40).double() / count
    assert ((frequency - p).abs() <= 5 * (p * (1 - p) / count).sqrt() + 1 / count).all()


def test_a_passage_goes_on_past_eos(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    def prefer_eos(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        return output.index_fill(-1, torch.tensor([0]), 1e4)

    model.get_output_embeddings().register_forward_hook(prefer_eos)
    assert sample_passages(model, tokenizer, count=1, length=5) == [[0] * 5]


def test_passages_that_cannot_be_drawn_are_refused(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="passages of 33 tokens; this base takes from 2 to 32"):
        sample_passages(model, tokenizer, length=33)
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="neither a BOS nor an EOS"):
        sample_passages(model, tokenizer, length=8)
