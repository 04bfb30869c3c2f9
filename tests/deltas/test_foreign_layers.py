"""Models with another library's adapters in them, or with computed weights, are refused by name and left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from spectune.deltas import Attachment, Method, attach, detach
from spectune.errors import ConfigError
from spectune.methods import BitFit, FullFineTuning, LoRA, PrefixTuning
from tests.contract.conftest import tokens
from tests.contract.families import llama

Q = "model.layers.0.self_attn.q_proj"


def injected(config: Any) -> Callable[[Any], Any]:
    return lambda model: peft.inject_adapter_in_model(config, model)


def peft_model(model: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))


def inside_of_a_peft_model(model: Any) -> Any:
    return peft_model(model).get_base_model()


def prompt_of_peft(model: Any) -> Any:
    return peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


class Wrapped(nn.Module):
    """As many write LoRA themselves."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base = linear
        self.side = nn.Sequential(nn.Linear(linear.in_features, 4), nn.Linear(4, linear.out_features))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.base(x) + self.side(x)
        return made


class Inherited(nn.Linear):
    """As loralib has it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight
        self.lora_A = nn.Parameter(torch.zeros(4, linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, 4))


def replaced(kind: type) -> Callable[[Any], Any]:
    def replace(model: Any) -> Any:
        model.set_submodule(Q, kind(model.get_submodule(Q)))
        return model

    return replace


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def computed(how: Callable[[nn.Module], Any]) -> Callable[[Any], Any]:
    def change(model: Any) -> Any:
        how(model.get_submodule(Q))
        return model

    return change


ADAPTERS: dict[str, Callable[[Any], Any]] = {
    "PeftModel": peft_model,
    "inside of a PeftModel": inside_of_a_peft_model,
    "PEFT's prompt": prompt_of_peft,
    "PEFT's LoRA": injected(peft.LoraConfig(target_modules=["q_proj", "v_proj"])),
    "PEFT's DoRA": injected(peft.LoraConfig(target_modules=["q_proj"], use_dora=True)),
    "PEFT's IA3": injected(peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])),
    "PEFT's embeddings": injected(peft.LoraConfig(target_modules=["embed_tokens"])),
    "PEFT's parameters": injected(peft.LoraConfig(target_parameters=["q_proj.weight"], target_modules=[])),
    "a wrapper": replaced(Wrapped),
    "a subclass": replaced(Inherited),
}
COMPUTED: dict[str, Callable[[Any], Any]] = {
    "parametrization": computed(lambda linear: parametrize.register_parametrization(linear, "weight", Half())),
    "weight norm": computed(parametrizations.weight_norm),
    "pruning": computed(lambda linear: prune.l1_unstructured(linear, "weight", 0.3)),  # type: ignore[no-untyped-call]
}


def modules_and_flags(model: nn.Module) -> list[Any]:
    named = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    return [named, [id(module) for module in model.modules()], hooks, sorted(model.__dict__)]


@pytest.mark.parametrize("method", [LoRA(r=2), BitFit(), PrefixTuning(num_virtual_tokens=2), FullFineTuning()],
                         ids=lambda method: str(method.name))  # fmt: skip
@pytest.mark.parametrize("how", [*ADAPTERS, *COMPUTED])
def test_they_are_refused_with_what_to_do_and_the_model_is_as_it_was(how: str, method: Method) -> None:
    model = {**ADAPTERS, **COMPUTED}[how](llama().eval())
    before = modules_and_flags(model)
    cure = r"merge_and_unload\(\)" if how in ADAPTERS else "remove_parametrizations"
    with pytest.raises(ConfigError, match=cure):
        attach(model, method, "task")
    assert modules_and_flags(model) == before
    assert Attachment.of(model) is None


@pytest.mark.parametrize("leave", ["merge_and_unload", "unload"])
def test_what_peft_has_merged_or_taken_off_is_a_base_like_any_other(leave: str) -> None:
    model = getattr(peft_model(llama().eval()), leave)()
    with torch.no_grad():
        bare = model(input_ids=tokens()).logits
    assert len(attach(model, LoRA(r=2), "task").sites) == 21
    detach(model, "task")
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens()).logits, bare)


def test_a_linear_inside_of_a_module_of_ones_own_is_no_adapter() -> None:
    model = llama().eval()
    model.set_submodule(Q, nn.Sequential(model.get_submodule(Q)))
    assert len(attach(model, LoRA(r=2), "task").sites) == 21
