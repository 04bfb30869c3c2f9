"""LoRA on experts: parameters of three dimensions, PEFT's `target_parameters`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import PreTrainedModel, XLNetConfig, XLNetLMHeadModel

from spectune.deltas import MatrixSite, attach, detach, merge, route
from spectune.errors import ConfigError
from spectune.families import describe
from spectune.methods import BitFit, DoRA, LoRA
from spectune.planning import plan
from spectune.planning.shape import Shape
from spectune.storage import load_delta
from spectune.storage.base_precision import quantise_base
from tests.contract.conftest import move, tokens
from tests.contract.families import TOKENS, VOCABULARY, llama
from tests.planning.steps import batch, real_peak
from tests.support.mixtures import MIXTURES, gpt_oss, mixtral

EXPERTS = LoRA(r=4, lora_alpha=8, target_parameters="all-experts")
#: what PEFT is told: with patterns, and a router that is a parameter where there is one
THEIRS: dict[str, dict[str, Any]] = {
    "mixtral": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj", "gate.weight"],
                "target_modules": ["q_proj"], "rank_pattern": {"down_proj": 2}, "alpha_pattern": {r".*\.1\..*": 3}},
    "gpt_oss": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": [],
                "use_rslora": True},
    "qwen3_next": {"target_parameters": ["experts.down_proj", "shared_expert.gate_proj.weight"],
                   "target_modules": ["o_proj"], "rank_pattern": {"gate_proj.weight": 2}},
}  # fmt: skip

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # PEFT says so of every pattern that names a parameter, and goes by it
    pytest.mark.filterwarnings("ignore:.*_pattern keys did not match any targeted module:RuntimeWarning"),
]


@pytest.fixture(params=list(MIXTURES))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tokens(2, 8), use_cache=False).logits
    return found


def apart(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).detach().abs().max())


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
def test_it_is_pefts(kind: str, implementation: str, tmp_path: Path) -> None:
    """Forward, gradients and merged weights; PEFT's folder is read here, and ours there."""
    bases = [MIXTURES[kind]() for _ in range(3)]
    for base in bases:
        base.set_experts_implementation(implementation)
    theirs: Any = peft.get_peft_model(
        bases[0], peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **THEIRS[kind])
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    bare = logits(bases[1])
    delta = load_delta(bases[1], tmp_path / "theirs", trainable=True)
    inputs = {"input_ids": tokens(2, 8), "labels": tokens(2, 8), "use_cache": False}
    out, mine = theirs(**inputs), bases[1](**inputs)
    assert apart(mine.logits, out.logits) <= 1e-5 < 1e-2 < apart(mine.logits, bare)
    out.loss.backward()
    mine.loss.backward()
    _, gradients = delta.method.to_folder({n: p.grad for n, p in delta.named_parameters()}, delta.family)
    wanted = {n.replace(".default.", "."): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    assert set(gradients) == set(wanted)
    assert all(apart(gradients[name], wanted[name]) <= 1e-5 for name in wanted)

    delta.save(tmp_path / "mine")
    saved = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("mine", "theirs"))
    ours, peers = saved
    assert set(ours) == set(peers)
    assert all(torch.equal(ours[name], peers[name]) for name in peers)
    back = peft.PeftModel.from_pretrained(bases[2], tmp_path / "mine").eval()
    assert apart(logits(back), mine.logits) <= 1e-5
    merged, by_peft = merge(bases[1], delta.name).state_dict(), theirs.merge_and_unload().state_dict()
    assert all(apart(merged[name], by_peft[name]) <= 1e-6 for name in by_peft)


def test_all_experts_start_at_the_base_and_leave_it_as_it_was(kind: str, tmp_path: Path) -> None:
    model, elsewhere = MIXTURES[kind](), MIXTURES[kind]()
    model.requires_grad_(False)  # by itself moves the last digit: torch folds products by whether they need gradients
    before = logits(model)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    delta = attach(model, EXPERTS, "task")
    assert torch.equal(logits(model), before)
    assert {site.path for site, _ in delta.sites if isinstance(site, MatrixSite)} == {
        matrix.where for matrix in describe(elsewhere).experts
    }
    assert delta.num_parameters() == sum(parameter.numel() for parameter in delta.parameters())
    move(delta, 0.1)
    changed = logits(model)
    assert apart(changed, before) > 1e-2
    delta.save(tmp_path / "task")
    load_delta(elsewhere, tmp_path / "task")
    assert torch.equal(logits(elsewhere), changed)
    peers = peft.PeftModel.from_pretrained(MIXTURES[kind](), tmp_path / "task").eval()
    assert apart(logits(peers), changed) <= 1e-5
    detach(model, "task")
    assert torch.equal(logits(model), before)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())


def test_peft_reads_linears_that_it_would_take_for_experts(tmp_path: Path) -> None:
    """A shared expert's `gate_proj`: by that name PEFT would wrap the experts."""
    model = MIXTURES["qwen3_next"]()
    delta = attach(model, LoRA(r=4, rank_pattern={"gate_proj": 2}, lora_dropout=0.1), "task")
    move(delta, 0.1)
    delta.save(tmp_path / "task")
    peers = peft.PeftModel.from_pretrained(MIXTURES["qwen3_next"](), tmp_path / "task").eval()
    assert apart(logits(peers), logits(model)) <= 1e-5
    (tmp_path / "task" / "spectune.json").unlink()
    alone = MIXTURES["qwen3_next"]()
    load_delta(alone, tmp_path / "task")
    assert torch.equal(logits(alone), logits(model))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model = gpt_oss()
        delta = attach(model, EXPERTS, "task")
        move(delta, 0.1)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        loss = model(input_ids=tokens(2, 8), labels=tokens(2, 8), use_cache=False).loss
        with route(model.eval(), None):
            logits(model)  # another route before backward
        model.train()
        loss.backward()
        found.append([parameter.grad.clone() for parameter in delta.parameters()])
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*found, strict=True))
    assert all(bool(gradient.any()) for gradient in found[0])


def test_compiled_equals_eager() -> None:
    model = mixtral()
    model.model.layers = model.model.layers[:1]
    move(attach(model, EXPERTS, "task"), 0.1)
    eager = logits(model)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert apart(logits(compiled), eager) <= 1e-5
    torch._dynamo.reset()


def test_masters_are_float32_on_a_bfloat16_base() -> None:
    """What is below a weight's last bit is not rounded away: tests/compute/test_low_rank.py."""
    model = mixtral().to(torch.bfloat16)
    delta = attach(model, EXPERTS, "task")
    move(delta, 0.1)
    model(input_ids=tokens(2, 8), labels=tokens(2, 8)).loss.backward()
    for parameter in delta.parameters():
        assert parameter.dtype == torch.float32 == parameter.grad.dtype
        assert bool(parameter.grad.any())


def test_rows_of_one_batch_cannot_differ_in_experts() -> None:
    model = mixtral()
    move(attach(model, EXPERTS, "a"), 0.1)
    alone = logits(model)
    with route(model, ["a", None]), pytest.raises(ConfigError, match="cannot share a batch"):
        logits(model)
    assert torch.equal(logits(model), alone)


def test_a_quantised_base_takes_it_and_its_files() -> None:
    model = mixtral()
    quantise_base(model, "int8")
    delta = attach(model, EXPERTS, "task")
    assert delta.num_parameters() == EXPERTS.num_parameters(describe(mixtral()))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_plan_is_a_step_s_real_memory(kind: str, checkpointing: bool) -> None:
    """No copy of the experts' weights, and no gradient of theirs."""
    inputs = batch(4, 40, VOCABULARY)
    model = MIXTURES[kind]()
    delta = attach(model, EXPERTS, "task")
    shape = Shape(4, 40, 39, int((inputs["labels"] != -100).sum()))
    estimate = plan(MIXTURES[kind](), EXPERTS, shape, device="cpu", gradient_checkpointing=checkpointing)
    measured = real_peak(model, delta, inputs, checkpointing=checkpointing)
    assert estimate.peak_allocated == pytest.approx(measured, rel=0.02)


# -- what is said --------------------------------------------------------------------------------------------------


def told(caplog: pytest.LogCaptureFixture, model: PreTrainedModel, method: Any) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="spectune"):
        attach(model, method, "task")
    detach(model, "task")
    return caplog.text


def test_experts_that_are_left_out_are_told_at_attach_with_what_to_write(caplog: pytest.LogCaptureFixture) -> None:
    model = mixtral()
    for method in (LoRA(), DoRA()):
        text = told(caplog, model, method)
        assert "86% of the weights in this mixtral model's layers are experts" in text
        assert "LoRA(target_parameters='all-experts')" in text
    assert "its experts, which are parameters and no linears, get none" in told(caplog, model, BitFit())
    assert "LoRA(target_parameters=['experts.gate_up_proj'])" in told(
        caplog, model, LoRA(target_parameters=("down_proj",))
    )
    for quiet in (EXPERTS, LoRA(target_modules=("q_proj",))):
        assert told(caplog, model, quiet) == ""
    assert "target_parameters='all-experts'" in told(
        caplog, MIXTURES["qwen3_next"](), LoRA(target_modules=("gate_proj",))
    )
    assert told(caplog, llama(), LoRA()) == ""


def test_a_base_whose_weights_are_mostly_no_linears_is_told(caplog: pytest.LogCaptureFixture) -> None:
    sizes = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
    model = XLNetLMHeadModel(XLNetConfig(**TOKENS, **sizes))
    notice = LoRA().notice(describe(model))
    assert notice is not None
    assert "parameters that are no linears (transformer.layer.0.rel_attn.q [32, 4, 8]" in notice


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "w1", "experts", "gate_up_proj", "mlp.experts.down_proj"])
def test_experts_among_target_modules_are_refused_with_what_to_write(name: str) -> None:
    with pytest.raises(ConfigError, match=r"experts are parameters and no linears; name them in target_parameters"):
        attach(mixtral(), LoRA(target_modules=("q_proj", name)), "task")


def test_what_target_parameters_cannot_be_is_refused() -> None:
    model = mixtral()
    before = logits(model)
    for method, words in (
        (LoRA(target_parameters=("down_prj",)), "the nearest is 'experts.down_proj'"),
        (LoRA(target_parameters=("q_proj.weight",)), "names weights of linears that target_modules names too"),
        (LoRA(target_parameters="all-experts", rank_pattern={"gate_up": 2}), "the nearest is 'gate_up_proj'"),
    ):
        with pytest.raises(ConfigError, match=words):
            attach(model, method, "task")
    assert torch.equal(logits(model), before)
    with pytest.raises(ConfigError, match="has no experts in parameters of their own"):
        attach(llama(), EXPERTS, "task")
    for fields, words in (
        ({"target_parameters": "experts"}, "all-experts"),
        ({"target_parameters": ("x",), "lora_dropout": 0.1}, "set lora_dropout to 0"),
        ({"target_modules": ()}, "nothing would be trained"),
    ):
        with pytest.raises(ValidationError, match=words):
            LoRA(**fields)
    with pytest.raises(ValidationError, match="DoRA does not act on target_parameters"):
        DoRA(target_parameters="all-experts")
