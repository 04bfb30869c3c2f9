"""The benchmark of losses against a plain loop: that its plain loop is right, and that it finds what is wrong."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.parity import compared, fast, plain, worker
from benchmarks.parity.driver import Plan, read, runs_of
from benchmarks.parity.paths import METHODS, PATHS
from benchmarks.parity.table import page
from benchmarks.parity.task import Order, Task, method_of
from benchmarks.parity.verdict import checks
from transformers import GPT2Config, GPT2LMHeadModel

import spectune.storage.bases
from spectune import embedded
from spectune.methods import BY_NAME
from spectune.objectives import CAUSAL_LM
from spectune.training.in_backward import InBackwardAdamW

STEPS, HELD = 3, 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("rows")
    for name, source in (("train", embedded.TRAIN), ("valid", embedded.VALID)):
        lines = Path(source).read_text(encoding="utf-8").splitlines()[:12]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random weights: the embedded base passes float32's rounding on until a tenth of its gradient is rounding."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = spectune.storage.bases.load_tokenizer("spectune-tiny")
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 512, "initializer_range": 0.1}
    config = GPT2Config(vocab_size=len(tokenizer), attn_pdrop=0, embd_pdrop=0, resid_pdrop=0, **sizes)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def references(base: str, data: str, method: str) -> worker.References:
    order = Order(base, data, "cpu", STEPS, HELD, rows=2)
    return worker.References(Task(order, method_of(method)))


@pytest.fixture(scope="module")
def lora(base: str, data: str) -> worker.References:
    return references(base, data, "lora")


@pytest.fixture(scope="module")
def known(lora: worker.References) -> dict[str, Any]:
    return {name: worker.measure(lora, name) for name in ("plain", "plain-attention")}


@pytest.mark.parametrize("name", ["eager", "packed", "checkpointed", "in-backward"])
def test_exact_paths_are_the_plain_loop(lora: worker.References, known: dict[str, Any], name: str) -> None:
    line = worker.measure(lora, name)

    assert [check.name for check in checks(PATHS[name], line, known) if not check.holds] == []
    assert line["held"]["first_cosine"] > 0.999999
    assert len(line["losses"]) == STEPS


def test_a_base_in_int8_is_the_plain_loop_over_its_decoded_weights(lora: worker.References) -> None:
    line = worker.measure(lora, "int8")

    assert 10 * line["held_decoded"]["error"] < line["held"]["error"]


@pytest.mark.parametrize("method", ["full", "prompt"])
def test_other_methods_follow_the_plain_loop(base: str, data: str, method: str) -> None:
    own = references(base, data, method)
    found = {name: worker.measure(own, name) for name in ("plain", "plain-attention", "packed")}

    assert [c.name for c in checks(PATHS["packed"], found["packed"], found) if not c.holds] == []


def test_a_loss_and_a_gradient_that_are_off_by_a_thousandth_are_found(
    lora: worker.References, known: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:

    right = CAUSAL_LM.loss_sum
    monkeypatch.setattr(CAUSAL_LM, "loss_sum", lambda *a, **k: (right(*a, **k)[0] * 1.001, 0))

    bad = {check.name for check in checks(PATHS["eager"], worker.measure(lora, "eager"), known) if not check.holds}

    assert {"loss at given weights", "gradient at given weights", "losses, first steps"} <= bad


def test_held_steps_do_not_move_the_weights_and_the_free_run_begins_at_the_first(lora: worker.References) -> None:
    moved = lora.states[1]
    first = lora.states[0]
    assert any(not torch.equal(moved[name], first[name]) for name in first)
    task = lora.task
    delta = task.attach(task.load(torch.float32))
    made: list[InBackwardAdamW] = []

    def make() -> InBackwardAdamW:
        config = task.config(optim="adamw_in_backward", max_grad_norm=0.0)
        made.append(InBackwardAdamW(list(delta.parameters()), config, 1e-3))
        return made[0]

    seen: list[int] = []
    holding = fast.Holding(delta, lora.states, lambda step, gradients: seen.append(step), make)
    for state in (moved, first):
        holding.begin(1e-3)
        batch, _ = task.batch(task.steps()[0])
        plain.loss_sum(delta.model, batch).backward()
        assert made == []  # nothing steps in backward yet
        holding.step(1e-3, 0.0, torch.zeros(()))
        own = dict(delta.named_parameters())
        assert all(torch.equal(own[name].detach(), state[name]) for name in state)
    assert seen == [0, 1]
    assert len(made) == 1
    holding.close()


def test_gradients_are_compared_as_a_whole() -> None:
    reference = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    turned = {"a": torch.tensor([3.0, 5.0]), "b": torch.tensor([4.0])}

    assert compared.near(reference, reference) == compared.Near(pytest.approx(1.0), 0.0, 5.0)
    assert compared.near(turned, reference) == compared.Near(pytest.approx(2**-0.5), pytest.approx(1.0), 5.0)
    with pytest.raises(ValueError, match="other tensors"):
        compared.near({"a": turned["a"]}, reference)


def test_errors_of_several_gradients_weigh_by_their_sizes() -> None:
    small, large = compared.Near(1.0, 1.0, 3.0), compared.Near(1.0, 0.5, 4.0)

    assert compared.held_steps([0.0], [small], [0.0])["pooled"] == 1.0
    assert compared.held_steps([0, 0], [small, large], [0, 0])["pooled"] == pytest.approx((13 / 25) ** 0.5)


def test_plain_runs_come_before_what_is_held_against_them_and_paths_are_named_right() -> None:
    for method in METHODS:
        runs = runs_of(method, "cuda", [])
        assert runs[:3] == ["plain", "plain-attention", "plain-bf16"]
        assert len(set(runs)) == len(runs)
        assert not {"fp8", "int8", "nf4"} & set(runs) or not BY_NAME[method].trains_base
    assert runs_of("lora", "cpu", ["int8"]) == ["plain", "plain-attention", "plain-last-bit", "int8"]
    assert "offload" not in runs_of("full", "cpu", [])


def test_a_process_that_dies_of_a_run_is_begun_again_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dies = """
import json, os, sys
told = json.loads(sys.argv[-1])
for name in told["runs"]:
    open(told["now"], "w").write(name)
    if name == "packed":
        os._exit(9)
    open(told["out"], "a").write(json.dumps({"path": name, "method": told["method"]}) + "\\n")
    os.unlink(told["now"])
"""
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{dies}' \"$@\"\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    out = tmp_path / "out.jsonl"
    order = Order("b", "d", "cpu", STEPS, HELD, rows=2)

    Plan(out, order, workers=1, gpus=1, until=time.time() + 60).run({"lora": ["plain", "packed", "eager", "int8"]})

    lines = read(out)
    assert [(line["path"], "failed" in line) for line in lines] == [
        ("plain", False),
        ("packed", True),
        ("eager", False),
        ("int8", False),
    ]
    assert "the process ended with 9" in capsys.readouterr().out


def test_the_page_shows_passes_failures_and_what_was_not_run(tmp_path: Path) -> None:
    held = {"loss": 1e-6, "error": 1e-5, "pooled": 1e-5, "first_cosine": 1.0, "least_cosine": 1.0}
    free = {"early": 1e-5, "largest": 1e-4, "mean": 1e-5, "valid": 1e-5}
    environment = {"packages": {"torch": "2.11"}, "spectune": "0"}
    common = {"method": "lora", "device": "GPU", "base": "b", "data": "d", "steps": 200, "held_steps": 8, "rows": 16}
    common |= {"environment": environment, "held": held, "free": free, "steps_per_second": 5.0, "peak_allocated": 2**30}
    lines = [{**common, "path": name} for name in ("plain", "plain-attention", "eager")]
    lines += [{**common, "path": "packed", "free": {**free, "largest": float("nan")}}]
    lines += [{**common, "path": "compiled", "free": {**free, "early": 0.1}}]
    failed = {key: value for key, value in common.items() if key not in ("held", "free")}
    lines += [{**failed, "path": "offload", "failed": "CUDA error | here"}]

    text = page([json.loads(json.dumps(line)) for line in lines])

    assert "1 of 4 runs are within tolerance." in text
    assert "Not: lora packed; lora compiled; lora offload." in text
    assert "losses, first steps: 0.1, tolerated 0.0001" in text
    assert "CUDA error \\| here" in text
    assert "Not run here: lora compiled-bf16" in text
