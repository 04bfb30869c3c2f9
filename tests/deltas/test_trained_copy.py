"""A trained copy of a base's module: it computes what the module itself would with the copy's weights."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from spectune.deltas import CopySite, TrainedCopy
from spectune.errors import ConfigError
from spectune.families import quantised_weights

MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(8, 8),
    "linear without bias": lambda: nn.Linear(8, 8, bias=False),
    "layer norm": lambda: nn.LayerNorm(8),
    "llama's norm": lambda: LlamaRMSNorm(8),
    "gemma's norm": lambda: GemmaRMSNorm(8),
    "gpt2's linear": lambda: Conv1D(8, 8),
}


def copied(host: nn.Module) -> TrainedCopy:
    made = TrainedCopy(CopySite.of("score", host))
    made.on_attach(host)
    return made


def moved(module: nn.Module, seed: int = 3) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return module


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_computes_what_its_host_would_with_its_weights(name: str, dtype: torch.dtype) -> None:
    host = MODULES[name]().to(dtype)
    trained = copied(host)
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(trained(x, host(x)), host(x)), "it begins as the host"
    moved(trained)
    merged = copy.deepcopy(host)
    trained.merge_into(merged)
    expected = merged(x)
    assert torch.equal(trained(x, host(x)), expected)
    assert not torch.equal(expected, host(x))
    assert trained(x, host(x)).dtype == dtype
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    assert list(trained.stored()) == [n for n, _ in host.named_parameters()]


def test_the_gradient_is_the_copys_alone_and_that_of_the_module() -> None:
    host, x = nn.Linear(8, 3), torch.randn(4, 8)
    trained = copied(host)
    trained(x, host(x)).square().sum().backward()
    host.double()(x.double()).square().sum().backward()
    assert trained.get_parameter("weight").grad is not None
    for name, parameter in host.named_parameters():
        torch.testing.assert_close(trained.get_parameter(name).grad, parameter.grad.float(), rtol=1e-5, atol=1e-6)


def test_hooks_of_the_host_do_not_run_inside_of_it() -> None:
    host = nn.Linear(8, 3)
    trained = copied(host)
    host.register_forward_hook(lambda module, args, output: trained(args[0], output))
    x = torch.randn(2, 8)
    assert torch.equal(host(x), nn.functional.linear(x, host.weight, host.bias))


def test_it_can_be_compiled_in_one_graph() -> None:
    host = GemmaRMSNorm(8).bfloat16()
    trained = copied(host)
    x = torch.randn(2, 8).bfloat16()
    whole = torch.compile(lambda x: trained(x, x), backend="aot_eager", fullgraph=True)
    assert torch.equal(whole(x), trained(x, x))


def test_threads_that_share_a_host_do_not_meet() -> None:
    host = nn.Linear(8, 3).bfloat16()
    copies = [moved(copied(host), seed) for seed in range(3)]
    x = torch.randn(5, 8).bfloat16()
    expected, wrong = [c(x, x) for c in copies], []

    def run(index: int) -> None:
        wrong.extend(1 for _ in range(50) if not torch.equal(copies[index](x, x), expected[index]))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_cannot_be_copied_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"head .Sequential. cannot be trained as a copy"):
        CopySite.of("head", nn.Sequential(nn.Linear(2, 2)))
    host = nn.Linear(8, 3, bias=False)
    trained = TrainedCopy(CopySite.of("score", host))
    host.weight = nn.Parameter(torch.zeros(3, 8, dtype=torch.int8), requires_grad=False)
    assert quantised_weights(host)
    with pytest.raises(ConfigError, match="quantised"):
        trained.on_attach(host)
