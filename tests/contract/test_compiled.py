"""Compiled equals eager, one method after another in one process: the trap is a graph reused across models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from spectune.deltas import attach
from spectune.errors import ConfigError
from spectune.methods import LoRA
from tests.contract.conftest import CASES, KINDS, move, put_on, refusal, tokens
from tests.contract.families import FAMILIES

Make = Callable[[], PreTrainedModel]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    # all models run the same code object, each under guards of its own: more than Dynamo's usual eight
    with torch._dynamo.config.patch(recompile_limit=64):
        yield
    torch._dynamo.reset()


#: the trap is in the methods' code and in Dynamo's guards, not in a family or in its depth: one layer and a case of
#: each kind show it, in a small part of the time
DEPTHS = [
    ("llama", 1, KINDS),
    pytest.param("llama", 1, tuple(CASES), marks=pytest.mark.slow),
    *(pytest.param(family, None, tuple(CASES), marks=pytest.mark.slow) for family in FAMILIES),
]


@pytest.mark.parametrize(("family", "layers", "cases"), DEPTHS)
def test_bare_then_every_method_compiled_in_one_process(
    make_model: Make, family: str, layers: int | None, cases: tuple[str, ...]
) -> None:
    def made() -> Any:
        model: Any = make_model()
        if layers is not None:
            model.model.layers = model.model.layers[:layers]
            model.config.num_hidden_layers = layers
        return model

    def compiled_logits(model: PreTrainedModel) -> torch.Tensor:
        # the trap is sprung before any backend sees a graph
        compiled = torch.compile(model, backend="eager" if cases is KINDS else "aot_eager", fullgraph=True)
        with torch.no_grad():
            return compiled(input_ids=tokens(), use_cache=False).logits

    bare = compiled_logits(made())
    for name in cases:
        method = CASES[name]
        if refusal(family, method) is not None:
            continue
        model = made()
        move(put_on(model, method))
        with torch.no_grad():
            eager = model(input_ids=tokens(), use_cache=False).logits
        got = compiled_logits(model)
        assert float((got - eager).abs().max()) <= 1e-5, name
        assert float((got - bare).abs().max()) > 1e-4, f"{name} did nothing when compiled"


def test_attach_after_compile_is_an_error(make_model: Make) -> None:
    model = make_model()
    model.compile(backend="aot_eager")
    with pytest.raises(ConfigError, match="compiled already"):
        attach(model, LoRA())
    with pytest.raises(ConfigError, match="compiled already"):
        attach(torch.compile(make_model(), backend="aot_eager"), LoRA())
