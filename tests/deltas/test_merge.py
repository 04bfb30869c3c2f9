"""Merging: the copy answers the same, is plain, and what cannot be merged is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from spectune.data import encode, load_rows
from spectune.deltas import Delta, Method, attach, attached, merge
from spectune.deltas.difference import Difference, measure, own_rounding
from spectune.deltas.merging import _judge, merge_and_measure
from spectune.errors import ConfigError
from spectune.methods import BitFit, FullFineTuning, LoRA, PrefixTuning, PromptTuning
from tests.support import make_model, make_rows, make_tokenizer

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def llama(**more: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, **more))


def qwen2() -> PreTrainedModel:
    """Biases on queries, keys and values only; tied embeddings."""
    return Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=2, tie_word_embeddings=True))


def phi() -> PreTrainedModel:
    """A head whose weight is the embeddings', and whose bias is its own."""
    return PhiForCausalLM(PhiConfig(**SMALL, tie_word_embeddings=True))


BASES: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": make_model,
    "llama": llama,
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "qwen2": qwen2,
    "phi": phi,
}


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(3)
    model = BASES[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # away from zeros and ones, and large enough that greedy words differ
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def put_on(model: PreTrainedModel, method: Method, name: str = "task", size: float = 0.05) -> Delta:
    delta = attach(model, method, name)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return delta


def written(model: PreTrainedModel) -> Tensor:
    ids = torch.arange(1, 9).reshape(2, 4)
    tokens: Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return tokens


def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.arange(1, 25).reshape(2, 12)
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return found


@pytest.mark.parametrize(
    ("base", "method"),
    [(base, method) for base in BASES for method in (LoRA(r=4), BitFit()) if "llama" not in base or method != BitFit()],
)
def test_a_merged_model_is_saved_loaded_and_writes_the_same(base: str, method: Method, tmp_path: Path) -> None:
    model = build(base)
    put_on(model, method)
    expected, tokens = logits(model), written(model)
    assert not torch.equal(tokens, written(build(base)))  # the delta changes what is written
    merged = merge(model, "task")
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(written(again), tokens)
    assert torch.equal(logits(again), logits(merged))
    assert float((logits(again) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("method", [LoRA(r=4), BitFit()], ids=["lora", "bitfit"])
@pytest.mark.parametrize("base", ["gpt2", "qwen2", "phi"])
def test_tied_embeddings_stay_tied_and_unchanged(base: str, method: Method, tmp_path: Path) -> None:
    model, bare = build(base), build(base)
    put_on(model, method)
    merged = merge(model, "task")
    merged.save_pretrained(tmp_path)
    for found in (merged, type(merged).from_pretrained(tmp_path)):
        embeddings, head = found.get_input_embeddings(), found.get_output_embeddings()
        assert head.weight is embeddings.weight
        assert torch.equal(embeddings.weight, bare.get_input_embeddings().weight)
    if base == "phi" and method.name == "bitfit":
        assert not torch.equal(merged.get_output_embeddings().bias, bare.get_output_embeddings().bias)


def test_a_tied_weight_at_a_site_is_never_written_through() -> None:
    model = build("llama")
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    put_on(model, LoRA(r=2, target_modules=r"model\.layers\.1\.mlp\.up_proj"))
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.up_proj\.weight and .*layers\.1\..* are one tied weight"):
        merge(model, "task", check=False)


def test_bitfit_merges_into_the_real_biases_of_a_partly_biased_base() -> None:
    model, bare = build("qwen2"), build("qwen2")
    delta = put_on(model, BitFit())
    changed = {f"{site.path}.bias" for site, _ in delta.sites}
    assert len(changed) == 6
    merged = merge(model, "task")
    for name, parameter in merged.named_parameters():
        assert torch.equal(parameter, bare.get_parameter(name)) == (name not in changed)


def test_bitfit_on_a_base_without_biases_is_refused_by_name() -> None:
    model = build("llama")
    put_on(model, BitFit())
    before = logits(model)
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.q_proj, .* and 9 more: Linear has no bias to merge"):
        merge(model, "task")
    assert torch.equal(logits(model), before)
    biased = llama(attention_bias=True, mlp_bias=True)
    put_on(biased, BitFit())
    assert not attached(merge(biased, "task"))


def traces(model: PreTrainedModel) -> dict[str, Any]:
    return {
        name: (
            set(module.__dict__),
            set(module._modules),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            len(module._backward_hooks),
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("base", list(BASES))
def test_nothing_of_spectune_is_left_on_the_copy(base: str) -> None:
    model, bare = build(base), build(base)
    for found in (model, bare):
        found.gradient_checkpointing_enable({"use_reentrant": False})
        found.get_input_embeddings().weight.requires_grad_(False)
    put_on(model, LoRA(r=2))
    put_on(model, PromptTuning(num_virtual_tokens=3), "prompt")
    put_on(model, PrefixTuning(num_virtual_tokens=3), "prefix")
    logits(model.train())  # gradient checkpointing is noticed in a forward pass
    model.eval()
    merged = merge(model, "task")
    assert traces(merged) == traces(bare)
    assert list(merged.state_dict()) == list(bare.state_dict())
    assert [n for n, _ in merged.named_buffers()] == [n for n, _ in bare.named_buffers()]
    assert merged.config.to_dict() == bare.config.to_dict()
    assert merged.config._attn_implementation == bare.config._attn_implementation
    flags = {name: parameter.requires_grad for name, parameter in bare.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in merged.named_parameters()} == flags
    for module in merged.modules():
        for value in module.__dict__.values():
            assert "spectune" not in type(value).__module__
    assert list(attached(model)) == ["task", "prompt", "prefix"]


def test_a_fully_tuned_base_is_copied(capsys: pytest.CaptureFixture[str]) -> None:
    model = build("gpt2")
    put_on(model, FullFineTuning())
    merged = merge(model, "task")
    assert torch.equal(logits(merged), logits(model))
    assert capsys.readouterr().out == ""


# -- what is measured -----------------------------------------------------------------------------------------------


def test_the_largest_difference_is_printed_with_what_it_was_measured_on(capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = build("gpt2"), make_tokenizer()
    put_on(model, LoRA(r=2))
    examples = encode(load_rows(make_rows(40)), tokenizer, max_length=32).examples
    ids = [[1, 2, 3], [4, 5]]
    for rows, expected in (
        (None, "measured on fixed random tokens; rows= takes real ones"),
        (examples, "measured on 32 of 40 real rows ("),
        (ids, "measured on 2 real rows (5 tokens)"),
        ([torch.tensor(row) for row in ids], "measured on 2 real rows (5 tokens)"),
        ([{"input_ids": row} for row in ids], "measured on 2 real rows (5 tokens)"),
        (["Ada lives in Leeds."], "measured on 1 real row ("),
        ([list(range(200))], "measured on 1 real row (64 tokens)"),
    ):
        merge(model, "task", rows=rows, tokenizer=tokenizer)
        [line] = capsys.readouterr().out.splitlines()
        assert line.startswith("merged 'task': largest logit difference ")
        assert expected in line
    merge(model, "task", check=False)
    assert capsys.readouterr().out == ""


def test_the_difference_is_that_of_the_rows() -> None:
    model = build("gpt2")
    put_on(model, LoRA(r=2))
    rows = [torch.tensor([1, 2, 3]), torch.tensor([7, 8, 9, 10])]
    merged, difference = merge_and_measure(model, "task", rows=rows)
    with torch.no_grad():
        apart = [(merged(row[None]).logits - model(row[None]).logits).abs() for row in rows]
        largest = max(float(model(row[None]).logits.abs().max()) for row in rows)
    assert difference is not None
    assert difference.largest == max(float(a.max()) for a in apart)
    assert difference.largest_logit == largest
    assert difference.mean == pytest.approx(sum(float(a.sum()) for a in apart) / (7 * 300), rel=1e-4)
    assert difference.mean_effect > 1000 * difference.mean


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no token"),
        (["text"], "give their tokenizer"),
        ([{"prompt": "a", "completion": "b"}], r"a row to measure on is dict .*expected a list of token ids"),
        ([[1, 300]], "token 300, this base has 300"),
    ],
)
def test_rows_of_another_kind_are_refused(rows: Any, message: str) -> None:
    model = build("gpt2")
    put_on(model, LoRA(r=2))
    with pytest.raises(ConfigError, match=message):
        merge(model, "task", rows=rows)


def test_what_differs_by_more_than_rounding_is_refused() -> None:
    model = build("gpt2")
    put_on(model, LoRA(r=2))
    merged = merge(model, "task")
    with torch.no_grad():
        merged.transformer.h[0].mlp.c_fc.weight.mul_(1.01)
    with pytest.raises(ConfigError, match="more than rounding"):
        _judge(measure(model, merged, "task", [torch.tensor([1, 2, 3])], "a row"), merged, "task")
    with pytest.raises(ConfigError, match="more than rounding"):
        _judge(Difference(float("nan"), 1.0, float("nan"), 1.0, "a row"), merged, "task")
    with pytest.raises(ConfigError, match="rounds the delta away"):
        _judge(Difference(float("nan"), 1.0, float("nan"), 1.0, "a row"), merged.bfloat16(), "task")


def test_a_base_that_rounds_more_itself_is_judged_by_that(capsys: pytest.CaptureFixture[str]) -> None:
    model = build("gpt2")
    with torch.no_grad():  # the last norm takes a large common offset away, float32 has rounded by then
        model.transformer.wpe.weight.add_(300.0)
    put_on(model, LoRA(r=2))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    merged = merge(model, "task")
    assert "in float32 the unmerged logits themselves are off by up to " in capsys.readouterr().out
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == places
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.state_dict().keys() == state.keys()
    with torch.no_grad():
        merged.transformer.h[0].mlp.c_fc.weight.mul_(1.1)
    wrong = measure(model, merged, "task", [torch.tensor([1, 2, 3])], "a row")
    rounding = own_rounding(model, "task", [torch.tensor([1, 2, 3])])
    with pytest.raises(ConfigError, match="more than rounding"):
        _judge(replace(wrong, own_rounding=rounding), merged, "task")


def test_low_precision_that_rounds_the_delta_away_is_refused() -> None:
    model = build("gpt2").bfloat16()
    put_on(model, LoRA(r=2), size=1e-3)
    with pytest.raises(ConfigError, match=r"torch\.bfloat16 rounds the delta away.*dtype float32 and merge there"):
        merge(model, "task")


# -- quantised bases ------------------------------------------------------------------------------------------------


class Packed(nn.Module):
    """A stand-in for bitsandbytes' linears: integers, and a scale."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = float(linear.weight.detach().abs().max()) / 127
        whole = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(whole, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.float() * self.scale).T


class Disguised(Tensor):
    """A stand-in for torchao's tensors: says it is float32, and is not plain."""


def with_disguised(linear: nn.Linear) -> nn.Linear:
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Disguised), requires_grad=False)
    return linear


@pytest.mark.parametrize(
    ("change", "type_"), [(Packed, "Parameter of torch.int8"), (with_disguised, "Disguised of torch.float32")]
)
def test_a_quantised_base_is_refused_by_name(change: Callable[[nn.Linear], nn.Module], type_: str) -> None:
    model = build("llama")
    model.model.layers[1].mlp.up_proj = change(model.model.layers[1].mlp.up_proj)
    put_on(model, LoRA(r=2))
    message = rf"quantised \(model\.layers\.1\.mlp\.up_proj: {type_}\).*without quantisation.*spectune\.load_delta"
    with pytest.raises(ConfigError, match=message):
        merge(model, "task")


def test_a_base_whose_config_says_quantised_is_refused() -> None:
    model = build("llama")
    put_on(model, LoRA(r=2))
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ConfigError, match=r"its config has .*gptq"):
        merge(model, "task")
