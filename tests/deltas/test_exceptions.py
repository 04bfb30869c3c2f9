"""An exception leaves nothing behind: in forward, in generate, in backward, in attach and in load, for every method."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from spectune.deltas import Delta, Method, attach, attached, detach, route
from spectune.errors import ConfigError
from spectune.methods import METHODS, BitFit, LoRA, PrefixTuning
from spectune.storage import load_delta
from tests.contract.conftest import CASES, KINDS, move, of_each_kind, put_on, tokens
from tests.contract.families import gpt2, llama

ERRORS: tuple[type[BaseException], ...] = (RuntimeError, KeyboardInterrupt)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=list(CASES))
def method(request: pytest.FixtureRequest) -> Method:
    return CASES[request.param]


def make_model(make: Callable[[int], PreTrainedModel] = gpt2) -> PreTrainedModel:
    torch.manual_seed(7)
    model = make(2).eval()
    next(model.parameters()).requires_grad_(False)
    model.get_submodule("transformer.h.1" if make is gpt2 else "model.layers.1").train()
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(), attention_mask=torch.ones(3, 10)).logits


def state(model: PreTrainedModel) -> dict[str, Any]:
    """All that an exception could leave behind, gradients and values of the weights aside."""
    modules = dict(model.named_modules())
    return {
        "hooks": {name: [list(getattr(m, hooks)) for hooks in HOOKS] for name, m in modules.items()},
        "attributes": {name: sorted(m.__dict__) for name, m in modules.items()},
        "training": {name: m.training for name, m in modules.items()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "attention": model.config._attn_implementation,
        "deltas": list(attached(model)),
    }


def answers(model: PreTrainedModel) -> list[torch.Tensor]:
    """Logits as routed now, and routed to each delta by name."""
    found = [logits(model)]
    for name, delta in attached(model).items():
        with route(model, name):
            found.append(logits(model))
        if not delta.method.trains_base:
            with route(model, None):
                found.append(logits(model))
    return found


class unharmed:  # noqa: N801 - reads as a statement
    """A `with` in which an exception of `error` has to come up, after which the model is as before."""

    def __init__(self, model: PreTrainedModel, error: type[BaseException]) -> None:
        self.model, self.error = model, error

    def __enter__(self) -> None:
        self.state, self.answers = state(self.model), answers(self.model)
        self.weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
        assert kind is self.error, f"{error!r} came up, expected {self.error.__name__}"
        assert state(self.model) == self.state
        for name, parameter in self.model.named_parameters():
            assert torch.equal(parameter, self.weights[name]), name
        for now, before in zip(answers(self.model), self.answers, strict=True):
            assert torch.equal(now, before)
        return True


class raising:  # noqa: N801
    """A `with` in which the module's `forward` raises at its `call`-th call."""

    def __init__(self, module: nn.Module, error: type[BaseException], call: int = 1) -> None:
        self.module, self.error, self.call = module, error, call

    def __enter__(self) -> None:
        original, count = self.module.forward, itertools.count(1)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if next(count) >= self.call:
                raise self.error("planted")
            return original(*args, **kwargs)

        self.module.forward = forward  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        del self.module.forward


#: a case of each kind of module, where what is around it is what has to hold; the others are behind `-m slow`
def test_every_method_has_a_case() -> None:
    assert {type(method) for method in CASES.values()} == set(METHODS)


@of_each_kind
@pytest.mark.parametrize("error", ERRORS)
def test_in_a_module_of_the_base(method: Method, error: type[BaseException]) -> None:
    model = make_model()
    move(put_on(model, method))
    for path in ("transformer", "transformer.wte", "transformer.h.0.attn", "transformer.h.1", "lm_head"):
        module = model.get_submodule(path)
        with unharmed(model, error), raising(module, error):
            logits(model)
        with unharmed(model, error), raising(module, error), route(model, "task"):
            logits(model)


@of_each_kind
@pytest.mark.parametrize("error", ERRORS)
def test_in_a_delta_s_module(method: Method, error: type[BaseException]) -> None:
    for make in (gpt2, llama):
        model = make_model(make)
        delta = put_on(model, method)
        move(delta)
        for _, module in delta.sites[:: max(1, len(delta.sites) // 3)]:
            with unharmed(model, error), raising(module, error):
                logits(model)


def test_between_two_routes(method: Method) -> None:
    """A route that was open when it happened is closed, the one around it is in force again."""
    if method.trains_base:
        pytest.skip("full fine-tuning stands alone")
    model = make_model()
    move(put_on(model, method))
    move(put_on(model, LoRA(r=2), "second"), 0.1)
    bare, task, second = (run(model, name) for name in (None, "task", "second"))
    layer = model.get_submodule("transformer.h.1")
    for inner in (None, "task", "second"):
        with route(model, "task"):
            with pytest.raises(RuntimeError), route(model, inner), raising(layer, RuntimeError):
                logits(model)
            assert torch.equal(logits(model), task)
        assert torch.equal(logits(model), second)
    detach(model, "second")
    assert torch.equal(logits(model), bare)


def run(model: PreTrainedModel, name: str | None) -> torch.Tensor:
    with route(model, name):
        return logits(model)


@of_each_kind
@pytest.mark.parametrize("error", [pytest.param(RuntimeError, marks=pytest.mark.slow), KeyboardInterrupt])
def test_in_generate(method: Method, error: type[BaseException]) -> None:
    """Ctrl-C between two tokens and within one, with each kind of cache."""
    for make in (gpt2, llama):
        model = make_model(make)
        move(put_on(model, method))
        for cache in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
            call = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones(3, 10), **cache}
            before = model.generate(tokens(), **call)
            state_before = state(model)

            class Stop(LogitsProcessor):
                def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                    if ids.shape[1] > 11:
                        raise error("planted")
                    return scores

            with unharmed(model, error):
                model.generate(tokens(), logits_processor=LogitsProcessorList([Stop()]), **call)
            last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
            with unharmed(model, error), raising(last, error, call=3):
                model.generate(tokens(), **call)
            assert torch.equal(model.generate(tokens(), **call), before)
            assert state(model) == state_before


@of_each_kind
@pytest.mark.parametrize("error", ERRORS)
def test_in_the_recomputation_of_checkpointing(method: Method, error: type[BaseException]) -> None:
    model = make_model()
    delta = put_on(model, method)
    move(delta)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    logits(model)  # what checkpointing itself needs is put in place at the first forward pass
    ids = tokens()
    layer = model.get_submodule("transformer.h.1.mlp")
    with unharmed(model, error), route(model, "task"), raising(layer, error, call=2):
        model(input_ids=ids, labels=ids).loss.backward()
    for parameter in delta.parameters():
        parameter.grad = None
    model(input_ids=ids, labels=ids).loss.backward()  # a step after it is as good as ever
    assert all(parameter.grad is not None for parameter in delta.parameters() if parameter.requires_grad)


# -- attach and load: all or nothing ----------------------------------------------------------------------------------


class at_call:  # noqa: N801
    """A `with` in which `cls.name` raises at its `call`-th call, after its work if `after`."""

    def __init__(self, cls: type, name: str, error: type[BaseException], call: int = 1, after: bool = False) -> None:
        self.cls, self.name, self.error, self.call, self.after = cls, name, error, call, after

    def __enter__(self) -> None:
        self.patch = pytest.MonkeyPatch()
        original, count = getattr(self.cls, self.name), itertools.count(1)

        def instead(*args: Any, **kwargs: Any) -> Any:
            now = next(count) >= self.call
            if now and not self.after:
                raise self.error("planted")
            result = original(*args, **kwargs)
            if now:
                raise self.error("planted")
            return result

        self.patch.setattr(self.cls, self.name, instead)

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


#: every method once, and a case of each kind beside another delta with the other error; the rest is behind `-m slow`
ATTACHED = [
    pytest.param(case, error, beside, id=f"{case}-{'beside another' if beside else 'alone'}-{error.__name__}",
                 marks=() if case in KINDS and beside is (error is KeyboardInterrupt) else pytest.mark.slow)
    for case in CASES
    for error in ERRORS
    for beside in (False, True)
    if not (beside and CASES[case].trains_base)  # which stands alone
]  # fmt: skip


@pytest.mark.parametrize(("method", "error", "beside"), ATTACHED, indirect=["method"])
def test_a_failed_attach(method: Method, error: type[BaseException], beside: bool) -> None:
    for make in (gpt2, llama):
        model, other = make_model(make), fresh(make, method)
        sites = method.sites(other.family)
        if beside:  # of another method: what was proved for one is not proved again for the next
            move(put_on(model, BitFit() if isinstance(method, LoRA) else LoRA(r=2), "first"))
        cls = type(method)
        places = [("initialise", 1, False), ("initialise", 1, True)]
        if sites:
            places += [("sites", 1, False), ("build", 1, False), ("build", 3, False), ("build_shared", 1, True)]
        for name, call, after in places:
            if name == "build" and call > len(sites):
                continue
            with unharmed(model, error), at_call(cls, name, error, call, after):
                put_on(model, method)
        for after in (False, True):
            with unharmed(model, error), at_call(type(other), "put_on", error, 1, after):
                put_on(model, method)
        layer = model.get_submodule("transformer.h.1" if make is gpt2 else "model.layers.1")
        with unharmed(model, error), raising(layer, error):  # in the probe, or in what initialise runs
            put_on(model, method)
        move(put_on(model, method))  # and then it works
        expected = logits(model)
        assert torch.equal(run(model, "task"), expected)
        assert torch.equal(expected, answer_of_a_fresh(make, method))


def fresh(make: Callable[[int], PreTrainedModel], method: Method) -> Delta:
    return put_on(make_model(make), method)


def answer_of_a_fresh(make: Callable[[int], PreTrainedModel], method: Method) -> torch.Tensor:
    delta = fresh(make, method)
    move(delta)
    return logits(delta.model)


@of_each_kind
@pytest.mark.parametrize("error", [pytest.param(RuntimeError, marks=pytest.mark.slow), KeyboardInterrupt])
def test_a_failed_load(method: Method, error: type[BaseException], tmp_path: Path) -> None:
    delta = fresh(gpt2, method)
    move(delta)
    delta.save(tmp_path / "saved")
    kind, files = type(delta), type(delta.files)
    model = make_model()
    for owner, name, after in ((files, "read", False), (files, "read", True), (kind, "put_on", True)):
        with unharmed(model, error), at_call(owner, name, error, 1, after):
            load_delta(model, tmp_path / "saved", "task")
    with unharmed(model, KeyboardInterrupt), at_call(files, "check", KeyboardInterrupt):
        load_delta(model, tmp_path / "saved", "task")
    loaded = load_delta(model, tmp_path / "saved", "task")
    detach(model, "task")
    for stored in {type(module) for _, module in build(loaded)}:
        with unharmed(model, error), at_call(stored, "load_stored", error, min(2, len(build(loaded)))):
            load_delta(model, tmp_path / "saved", "task")
    load_delta(model, tmp_path / "saved", "task")


def build(delta: Delta) -> list[tuple[object, nn.Module]]:
    """Modules like those of a delta that is off again."""
    return [(site, delta.method.build(site)) for site in delta.method.sites(delta.family)]


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another"])
def test_a_refused_attach(beside: bool) -> None:
    """Refusals of the kinds that come after something was opened."""
    model = make_model()
    if beside:
        move(put_on(model, LoRA(r=2), "first"))
    with unharmed(model, ConfigError):
        attach(model, LoRA(r=2, target_modules=("nothing",)), "task")
    with unharmed(model, ConfigError):
        attach(model, LoRA(r=2), "task", keep_base=True)
    unused = nn.Linear(4, 4)
    model.get_submodule("transformer.h.0").unused = unused
    if not beside:
        with unharmed(model, ConfigError):
            attach(model, LoRA(r=2, target_modules=("unused", "c_attn")), "task")
    model.get_submodule("transformer.h.1.mlp").deltas = 3  # found after the first layer's site is open
    with unharmed(model, ConfigError):
        attach(model, CASES["adapter-ffn"], "task")


def test_a_refused_attention() -> None:
    model = make_model(llama)
    model.set_attn_implementation("flex_attention")
    before = state(model)  # flex attention itself does not run here
    with pytest.raises(ConfigError, match="eager and SDPA"):
        attach(model, PrefixTuning(num_virtual_tokens=2), "task")
    assert state(model) == before
