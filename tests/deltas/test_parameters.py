"""Parameters that a delta changes in their own place: biases of convolutions and experts, uncalled linears."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

from spectune.deltas import Delta, ParameterSite, attach, detach, merge, route
from spectune.errors import ConfigError
from spectune.methods import BitFit, DoRA, LoRA, PromptTuning
from spectune.storage import load_delta
from tests.contract.conftest import move, tokens
from tests.contract.families import SIZES, TOKENS, llama


def mamba() -> PreTrainedModel:
    """The step's projection is used by its weight and bias alone, the convolution has a bias."""
    config = MambaConfig(**TOKENS, hidden_size=16, num_hidden_layers=2, state_size=4, use_conv_bias=True)
    return _filled(MambaForCausalLM(config))


def gpt_oss() -> PreTrainedModel:
    """Experts are 3-D parameters, each with a row of biases."""
    config = GptOssConfig(**SIZES, head_dim=8, num_local_experts=3, num_experts_per_tok=2, sliding_window=6)
    return _filled(GptOssForCausalLM(config))


def _filled(model: PreTrainedModel) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


MAKE = {"mamba": mamba, "gpt_oss": gpt_oss}


@pytest.fixture(params=list(MAKE))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    return MAKE[request.param]()


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(2, 8), use_cache=False).logits


def written_in(model: PreTrainedModel, delta: Delta) -> PreTrainedModel:
    """The base with every offset added to its bias by hand."""
    elsewhere = type(model)(model.config).eval()
    state = {name: t for name, t in model.state_dict().items() if ".deltas." not in name}
    elsewhere.load_state_dict(state)
    with torch.no_grad():
        for site, module in delta.sites:
            path = site.path if isinstance(site, ParameterSite) else f"{site.path}.bias"
            elsewhere.get_parameter(path).add_(module.offset)
    return elsewhere


def test_offsets_are_the_same_as_changed_biases(model: PreTrainedModel) -> None:
    model.requires_grad_(False)  # by itself moves the last digit: torch folds products by whether they need gradients
    before = logits(model)
    delta = attach(model, BitFit(), "task")
    assert torch.equal(logits(model), before)
    assert any(isinstance(site, ParameterSite) for site, _ in delta.sites)
    biases = {name for name, _ in model.named_parameters() if name.endswith("bias") and ".deltas." not in name}
    sites = {site.path if isinstance(site, ParameterSite) else f"{site.path}.bias" for site, _ in delta.sites}
    assert sites == biases
    move(delta, 0.2)
    changed = logits(model)
    assert float((changed - before).abs().max()) > 1e-3
    assert torch.allclose(changed, logits(written_in(model, delta)), atol=1e-5)
    detach(model, "task")
    assert torch.equal(logits(model), before)
    assert not any("deltas" in name for name, _ in model.named_modules())


def test_gradients_are_those_of_the_biases(model: PreTrainedModel) -> None:
    delta = attach(model, BitFit(), "task")
    move(delta, 0.1)
    elsewhere = written_in(model, delta)
    for each in (model, elsewhere):
        each(input_ids=tokens(2, 8), labels=tokens(2, 8), use_cache=False).loss.backward()
    for site, module in delta.sites:
        path = site.path if isinstance(site, ParameterSite) else f"{site.path}.bias"
        expected = elsewhere.get_parameter(path).grad
        assert torch.allclose(module.offset.grad, expected, atol=1e-5 * max(1.0, float(expected.abs().max()))), path


@pytest.mark.parametrize("method", [BitFit(), LoRA(r=2), DoRA(r=2)], ids=lambda method: method.name)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(model: PreTrainedModel, method: BitFit | LoRA, reentrant: bool) -> None:
    delta = attach(model, method, "task")
    move(delta, 0.1)
    model.train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        with route(model, "task"):
            loss = model(input_ids=tokens(2, 8), labels=tokens(2, 8), use_cache=False).loss
        model.eval()
        with route(model, None):
            logits(model)  # another route before backward
        model.train()
        loss.backward()
        found.append([p.grad.clone() for p in delta.parameters()])
        for parameter in delta.parameters():
            parameter.grad = None
    for plain, recomputed in zip(*found, strict=True):
        assert torch.allclose(plain, recomputed, atol=1e-5 * max(1.0, float(plain.abs().max())))


def test_saved_and_loaded_elsewhere(model: PreTrainedModel, tmp_path: Path) -> None:
    delta = attach(model, BitFit(), "task")
    move(delta, 0.2)
    delta.save(tmp_path / "task")
    elsewhere = type(model)(model.config).eval()
    elsewhere.load_state_dict({name: t for name, t in model.state_dict().items() if ".deltas." not in name})
    load_delta(elsewhere, tmp_path / "task")
    assert torch.equal(logits(elsewhere), logits(model))


def test_merged(model: PreTrainedModel) -> None:
    for number, method in enumerate((BitFit(), LoRA(r=2), DoRA(r=2))):
        name = f"task-{number}"
        move(attach(model, method, name, seed=number), 0.1)
        merged = merge(model, name)
        assert torch.allclose(logits(merged), logits(model), atol=1e-4)


def test_rows_of_one_batch_cannot_differ_in_it(model: PreTrainedModel) -> None:
    move(attach(model, BitFit(), "a"), 0.1)
    move(attach(model, LoRA(r=2, target_modules=("out_proj" if hasattr(model, "backbone") else "o_proj",)), "b"), 0.1)
    alone = logits(model)
    with route(model, ["a", "b"]), pytest.raises(ConfigError, match="cannot share a batch"):
        logits(model)
    with route(model, ["b", None]):
        logits(model)
    assert torch.equal(logits(model), alone)
    with route(model, ["a", "a"]):
        both = logits(model)
    with route(model, "a"):
        assert torch.equal(both, logits(model))


def test_an_error_inside_a_layer_leaves_the_base_as_it_was(model: PreTrainedModel) -> None:
    before = logits(model)
    parameters = dict(model.named_parameters())
    move(attach(model, BitFit(), "task"), 0.1)
    expected = logits(model)
    layers = (model.backbone if hasattr(model, "backbone") else model.model).layers
    inner = next(layers[1].children())

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    handle = inner.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        logits(model)
    handle.remove()
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert torch.equal(logits(model), expected)
    detach(model, "task")
    assert torch.equal(logits(model), before)


def module_at(delta: Delta, path: str) -> Any:
    return next(module for site, module in delta.sites if site.path == path)


def test_lora_acts_on_linears_that_are_used_by_their_weight() -> None:
    """Each by itself: at the step's projection too, which a hook on its output would never see."""
    model = mamba()
    before = logits(model)
    delta = attach(model, LoRA(r=2), "task")
    for path in ("x_proj", "dt_proj"):
        module = module_at(delta, f"backbone.layers.1.mixer.{path}")
        with torch.no_grad():
            module.lora_B.add_(0.5)
        assert float((logits(model) - before).abs().max()) > 1e-4, path
        with torch.no_grad():
            module.lora_B.sub_(0.5)


def test_lora_acts_in_training_where_the_base_calls_a_linear_in_evaluation_only() -> None:
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3nTextConfig(
        **SIZES | {"num_hidden_layers": 4, "intermediate_size": [48] * 4}, head_dim=8, layer_types=kinds * 2,
        num_kv_shared_layers=2, vocab_size_per_layer_input=97, hidden_size_per_layer_input=8, laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4,
    )  # fmt: skip
    model = _filled(Gemma3nForCausalLM(config))
    delta = attach(model, LoRA(r=2), "task")
    move(delta, 0.1)
    for training in (False, True):
        model.train(training)
        model(input_ids=tokens(2, 8), labels=tokens(2, 8), use_cache=False).loss.backward()
        found = module_at(delta, "model.layers.1.altup.correction_coefs")
        assert found.lora_B.grad is not None, training
        found.lora_B.grad = None


def test_dropout_that_cannot_act_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="spectune"):
        attach(mamba(), LoRA(r=2, lora_dropout=0.1), "task")
    assert "dropout does not act at backbone.layers.0.mixer.dt_proj, backbone.layers.1.mixer.dt_proj" in caplog.text


def test_weights_without_gradients_are_told_and_a_delta_of_nothing_else_is_refused(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base whose own code takes something off the graph."""
    model = gpt_oss()
    router = type(model.model.layers[0].mlp.router)
    forward = router.forward

    def without_gradients(self: torch.nn.Module, hidden: torch.Tensor) -> object:
        with torch.no_grad():
            return forward(self, hidden)

    monkeypatch.setattr(router, "forward", without_gradients)
    with caplog.at_level(logging.WARNING, logger="spectune"):
        delta = attach(model, BitFit(), "task")
    assert f"3 of its {len(list(delta.parameters()))} tensors get no gradient" in caplog.text
    assert "model.layers.0.mlp.router.bias.offset" in caplog.text
    detach(model, "task")
    monkeypatch.setattr(type(model.model), "forward", torch.no_grad()(type(model.model).forward))
    before = logits(model)
    with pytest.raises(ConfigError, match="no gradient comes from the logits"):
        attach(model, LoRA(r=2), "task")
    assert torch.equal(logits(model), before)


def test_in_inference_mode_gradients_are_not_asked_for() -> None:
    model = gpt_oss()
    with torch.inference_mode():
        attach(model, LoRA(r=2), "task")
        assert model(input_ids=tokens(1, 4)).logits.isfinite().all()


def test_prompts_of_unlike_lengths_share_no_batch_where_padding_moves_the_answers() -> None:
    """A decoder that numbers its positions by itself: a shorter row would be shifted by its neighbour's prompt."""
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "vocab_size": 97,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}  # fmt: skip
    model = _filled(BartForCausalLM(BartConfig(**sizes)))
    for name, method in (("a", PromptTuning(num_virtual_tokens=3)), ("b", PromptTuning(num_virtual_tokens=3))):
        attach(model, method, name)
    attach(model, LoRA(r=2), "lora")
    with pytest.raises(ConfigError, match="prompts of unlike lengths"), route(model, ["a", "lora"]):
        pass
    with route(model, ["a", "b"]):
        together = logits(model)
    with route(model, "a"):
        assert torch.allclose(together[0], logits(model)[0], atol=1e-5)
    with route(model, ["lora", None]):
        logits(model)


def test_lora_at_a_linear_of_a_class_of_its_own_changes_its_weight() -> None:
    """A router gives scores of the chosen experts, not its linear map: a low-rank change of the scores would be none of
    the weight."""

    class Scores(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).softmax(-1)

    model = llama()
    for layer in model.model.layers:
        layer.mlp.up_proj.__class__ = Scores
    delta = attach(model, LoRA(r=2), "task")
    move(delta, 0.3)
    expected = logits(model)
    by_hand = copy.deepcopy(model)
    detach(by_hand, "task")
    with torch.no_grad():
        for site, module in delta.sites:
            by_hand.get_submodule(site.path).weight.add_(module.lora_B @ module.lora_A * module.scale)
    assert torch.allclose(logits(by_hand), expected, atol=1e-4)
