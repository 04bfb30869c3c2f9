"""Tiny models of several families, random weights, float32: what every method must hold on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from spectune.deltas import Delta, Method, attach
from spectune.methods import (
    IA3,
    OFT,
    BitFit,
    BottleneckAdapter,
    DoRA,
    FullFineTuning,
    LNTuning,
    LoRA,
    MiSS,
    PrefixTuning,
    PromptTuning,
)
from tests.contract.families import FAMILIES, VOCABULARY, gpt2, llama
from tests.support.quick import others_slow

#: every method at small size, and the variants whose code differs
CASES: dict[str, Method] = {
    "full": FullFineTuning(),
    "adapter-block": BottleneckAdapter(bottleneck_dim=8, placement="block", dropout=0.0),
    "adapter-ffn": BottleneckAdapter(bottleneck_dim=8, placement="ffn", dropout=0.0),
    "adapter-both": BottleneckAdapter(bottleneck_dim=8, placement="attention+ffn", dropout=0.0),
    "adapter-parallel": BottleneckAdapter(bottleneck_dim=8, placement="parallel", dropout=0.0),
    "prefix": PrefixTuning(num_virtual_tokens=5),
    "prefix-projected": PrefixTuning(num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=16),
    "prefix-sliding": PrefixTuning(num_virtual_tokens=5, sliding=True),
    "prompt": PromptTuning(num_virtual_tokens=5),
    "lora": LoRA(r=4, lora_alpha=8),
    "bitfit": BitFit(),
    "dora": DoRA(r=4, lora_alpha=8),
    "ia3": IA3(),
    "oft": OFT(oft_block_size=8),
    "miss": MiSS(r=6),
    "ln": LNTuning(),
}


#: what a family cannot take: the method's case and the words of the refusal
REFUSED: dict[tuple[str, str], str] = {
    ("opt", "adapter-parallel"): "its feed-forward is not a module of its own",
    ("gpt_neox", "ia3"): "a projection fused head by head",
}


def refusal(family: str, method: Method) -> str | None:
    """The words with which attach refuses the method on this family, None where it takes it."""
    return next((w for (f, case), w in REFUSED.items() if f == family and CASES[case] == method), None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test of a method on a family that refuses it does not exist; that it is refused is a test of its own. The
    others say what they are about, for tools/contract_matrix.py."""
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        names = {"family": params.get("family"), "case": params.get("method", params.get("name"))}
        item.user_properties += [(key, value) for key, value in names.items() if isinstance(value, str)]
    gone = [
        item
        for item in items
        if hasattr(item, "callspec")
        and (item.callspec.params.get("family"), item.callspec.params.get("method")) in REFUSED
    ]
    if gone:
        config.hook.pytest_deselected(items=gone)
        items[:] = [item for item in items if item not in gone]


#: the families that every fast run looks at, with a first layer and a last one; the others are behind `-m slow`
FAST: dict[str, Callable[[], PreTrainedModel]] = {"gpt2": partial(gpt2, 2), "llama": partial(llama, 2)}

#: one case of each kind of module and method, for what is the same code whatever a kind's module computes
KINDS = ("full", "adapter-block", "prefix", "prompt", "lora", "bitfit", "oft", "ia3")
of_each_kind = pytest.mark.parametrize("method", others_slow(CASES, KINDS), indirect=True)


@pytest.fixture(params=[f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_model(family: str) -> Callable[[], PreTrainedModel]:
    """A function that builds the same model each time."""

    def make() -> PreTrainedModel:
        torch.manual_seed(7)
        model = {**FAMILIES, **FAST}[family]().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # biases and norms away from their special first values, so that nothing is hidden by zeros and ones
                if parameter.dim() == 1:
                    parameter.add_(torch.randn(parameter.shape) * 0.1)
                else:
                    parameter.add_(torch.randn(parameter.shape) * 0.1)
                assert name
        return model

    return make


@pytest.fixture
def model(make_model: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    return make_model()


@pytest.fixture(params=list(CASES))
def method(request: pytest.FixtureRequest) -> Method:
    return CASES[request.param]


@pytest.fixture
def delta(model: PreTrainedModel, method: Method) -> Delta:
    return put_on(model, method)


def put_on(model: PreTrainedModel, method: Method, name: str = "task") -> Delta:
    return attach(model, method, name, seed=3, keep_base=method.trains_base)


def move(delta: Delta, size: float = 0.05) -> None:
    """Shift every trained weight, so that the delta does something."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_((torch.randn(parameter.shape, generator=generator) * size).to(parameter.device))


def tokens(rows: int = 3, length: int = 10, seed: int = 5) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[i, where] = row
        mask[i, where] = 1
    return ids, mask


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    return tmp_path
