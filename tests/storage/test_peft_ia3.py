"""IA3 there and back: PEFT's on any linears here, ours in PEFT, mixed in one batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from spectune.deltas import attach, route
from spectune.errors import DataError
from spectune.methods import IA3
from spectune.storage import export_formats, load_delta
from tests.contract.conftest import tokens
from tests.contract.families import FAMILIES

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning")]


def make(family: str) -> PreTrainedModel:
    torch.manual_seed(7)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms away from their special first values
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tokens()).logits
    return found


def scaled(parameters: Any) -> None:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))


def theirs(model: PreTrainedModel, **config: Any) -> Any:
    found = peft.get_peft_model(model, peft.IA3Config(task_type="CAUSAL_LM", **config)).eval()
    scaled(parameter for name, parameter in found.named_parameters() if "ia3_l" in name)
    return found


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("llama", {"target_modules": ["q_proj", "gate_proj"], "feedforward_modules": ["gate_proj"]}),
        ("llama", {"target_modules": r".*\.1\..*(q|k)_proj", "feedforward_modules": []}),
        ("gpt2", {}),
        ("gpt2", {"target_modules": ["attn.c_proj", "mlp.c_fc"], "feedforward_modules": ["mlp.c_fc"]}),
        ("opt", {}),
        ("gpt_neox", {}),
    ],
)
def test_pefts_ia3_answers_alike_here_and_back_there(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    """Its defaults scale queries in some types, which the paper's IA3 does not."""
    peer = theirs(make(family), **config)
    peer.save_pretrained(tmp_path / "theirs")
    expected, ours = logits(peer), make(family)
    assert float((expected - logits(ours)).abs().max()) > 1e-3
    delta = load_delta(ours, tmp_path / "theirs", "task")
    assert float((logits(ours) - expected).abs().max()) <= 1e-5
    delta.save(tmp_path / "mine")
    back = peft.PeftModel.from_pretrained(make(family), tmp_path / "mine").eval()
    assert float((logits(back) - expected).abs().max()) <= 1e-5
    again = make(family)
    assert load_delta(again, tmp_path / "mine", "task").method == delta.method
    assert torch.equal(logits(again), logits(ours))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt_neox"])
def test_the_papers_ia3_answers_alike_in_peft(family: str, tmp_path: Path) -> None:
    """A fused projection's queries are scaled by one; feed-forwards before their last linear."""
    model = make(family)
    delta = attach(model, IA3(), "task")
    assert export_formats(delta) == ["peft"]
    scaled(delta.parameters())
    expected = logits(model)
    delta.save(tmp_path)
    back = peft.PeftModel.from_pretrained(make(family), tmp_path).eval()
    assert float((logits(back) - expected).abs().max()) <= 1e-5
    again = make(family)
    assert load_delta(again, tmp_path, "task").method == IA3()
    assert torch.equal(logits(again), expected)
    (tmp_path / "spectune.json").unlink()
    stranger = make(family)
    load_delta(stranger, tmp_path, "task")
    assert float((logits(stranger) - expected).abs().max()) <= 1e-5


def test_one_training_step_gives_the_same_vectors(tmp_path: Path) -> None:
    ids = tokens()
    peer = theirs(make("llama"))
    peer.save_pretrained(tmp_path)
    model = make("llama")
    delta = load_delta(model, tmp_path, "task", trainable=True)
    peer = peft.PeftModel.from_pretrained(make("llama"), tmp_path, is_trainable=True).eval()
    for one in (peer, model):
        one(input_ids=ids, labels=ids).loss.backward()
    grads = {n: p.grad for n, p in peer.named_parameters() if p.requires_grad}
    for name, parameter in delta.named_parameters():
        [grad] = [g for n, g in grads.items() if f".{name.removesuffix('.scale')}.ia3_l" in n]
        assert parameter.grad is not None
        assert grad is not None
        assert float((parameter.grad - grad.flatten()).abs().max()) <= 1e-6, name


def test_rows_of_a_batch_may_have_one_each(tmp_path: Path) -> None:
    theirs(make("llama")).save_pretrained(tmp_path)
    model = make("llama")
    load_delta(model, tmp_path, "peft")
    scaled(attach(model, IA3(), "ours").parameters())
    ids, alone = tokens(), []
    for row, name in enumerate(("peft", None, "ours")):
        with route(model, name), torch.no_grad():
            alone.append(model(input_ids=ids[row : row + 1]).logits)
    with route(model, ["peft", None, "ours"]), torch.no_grad():
        assert float((model(input_ids=ids).logits - torch.cat(alone)).abs().max()) <= 1e-5


def test_what_scales_more_than_the_method_is_refused(tmp_path: Path) -> None:
    """A folder that says it is the paper's, whose fused projection scales queries too."""
    attach(make("gpt2"), IA3(), "task").save(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file)
    ours = json.loads((tmp_path / "spectune.json").read_text())
    (tmp_path / "spectune.json").write_text(json.dumps({**ours, "weights": None}))
    with pytest.raises(DataError, match="scales more than keys and values"):
        load_delta(make("gpt2"), tmp_path, "task")


def test_settings_that_scale_nothing_are_refused() -> None:
    for fields in ({"target_modules": ()}, {"feedforward_modules": ("down_proj",)}):
        with pytest.raises(ValueError, match=r"nothing would be trained|some of target_modules"):
            IA3(**fields)
