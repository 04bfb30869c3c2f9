"""What deltas leave of a base: work that does not grow with their number, and a model that is as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectune.deltas import Attachment, Method, attach, attached, detach, merge, route
from spectune.deltas.attaching import place
from spectune.errors import ConfigError
from spectune.methods import METHODS, BitFit, DoRA, FullFineTuning, LoRA, PrefixTuning, PromptTuning
from tests.contract.conftest import move, tokens
from tests.contract.families import gpt2, llama


def answer(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens(2, 6)).logits
    return logits


class visits:  # noqa: N801 - reads as a statement
    """A `with` that counts the modules that anybody walks over, and the forward passes of one."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.modules, self.passes = model, 0, 0

    def __enter__(self) -> visits:
        self.patch, walk = pytest.MonkeyPatch(), nn.Module.named_modules

        def counting(module: nn.Module, *args: Any, **kwargs: Any) -> Iterator[Any]:
            for found in walk(module, *args, **kwargs):
                self.modules += 1
                yield found

        def passing(*_: Any) -> None:
            self.passes += 1

        self.patch.setattr(nn.Module, "named_modules", counting)
        self.handle = self.model.register_forward_pre_hook(passing)
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()
        self.patch.undo()


@pytest.mark.parametrize("method", [LoRA(r=2), BitFit(), PrefixTuning(num_virtual_tokens=2), PromptTuning()], ids=str)
def test_attaching_does_not_grow_with_the_number_of_deltas(method: Method) -> None:
    model = llama().eval()
    attach(model, method, "first")

    def cost(name: str) -> tuple[int, int]:
        with visits(model) as seen:
            attach(model, method, name)
        return seen.modules, seen.passes

    second = cost("second")
    for number in range(20):
        attach(model, method, f"more-{number}")
    assert cost("last") == second


def test_what_was_proved_at_the_sites_of_one_method_is_not_proved_again_for_another() -> None:
    """Of what only writes. Whether gradients come to a method's own weights is that method's."""
    model = llama().train(False)

    def passes(method: Method, name: str, *, serving: bool) -> int:
        with visits(model) as seen:
            place(model, method, name, fill=lambda delta: None, serving=serving)
        return seen.passes

    assert passes(LoRA(r=2), "first", serving=True) > 0
    assert passes(DoRA(r=2), "second", serving=True) == 0
    assert passes(LoRA(r=2, target_modules=["q_proj"]), "elsewhere", serving=True) == 1
    assert passes(DoRA(r=2), "trained", serving=False) == 1


def test_a_forward_pass_walks_no_modules() -> None:
    model = llama().eval()
    for number in range(5):
        attach(model, LoRA(r=2), f"delta-{number}")
    for name in (None, "delta-1", ["delta-1", None]):
        with visits(model) as seen, route(model, name):
            answer(model)
        assert (seen.modules, seen.passes) == (0, 1)


def test_checkpointing_that_is_switched_on_after_attach_is_found() -> None:
    model = llama()
    for name, scale in (("a", 0.1), ("b", -0.1)):
        move(attach(model, LoRA(r=2), name), scale)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        with route(model, "a"):
            loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()  # outside: the active delta is b by now
        grads.append([p.grad.clone() for p in attached(model)["a"].parameters() if p.grad is not None])
        for parameter in attached(model)["a"].parameters():
            parameter.grad = None
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


def add_a_head(model: Any) -> None:
    model.v_head = nn.Linear(32, 1)


def untie_the_head(model: Any) -> None:
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())


@pytest.mark.parametrize("change", [add_a_head, untie_the_head])
@pytest.mark.parametrize("method", [LoRA(r=2), BitFit(), PrefixTuning(num_virtual_tokens=2)], ids=str)
def test_what_is_added_after_attach_stays_and_the_rest_is_as_it_was(
    method: Method, change: Callable[[Any], None]
) -> None:
    model = gpt2().eval()
    next(model.parameters()).requires_grad_(False)
    before = {name: (p, p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    bare = answer(model)
    move(attach(model, method, "task"))
    change(model)
    tuned = answer(model)
    if method.can_merge and change is add_a_head:
        assert torch.allclose(answer(merge(model, "task")), tuned, atol=1e-4)
    detach(model, "task")
    assert torch.equal(answer(model), bare)
    for name, parameter in model.named_parameters():
        if name in before:
            was, values, trainable = before[name]
            assert parameter is was
            assert torch.equal(parameter, values)
            assert parameter.requires_grad is trainable
    assert Attachment.of(model) is None


@pytest.mark.parametrize("keep_base", [False, True])
def test_a_failed_attach_of_full_fine_tuning_says_why_and_leaves_the_model(keep_base: bool) -> None:
    model = gpt2().eval()
    requires_grad = [p.requires_grad for p in model.parameters()]
    layer: Any = model.get_submodule("transformer.h.1")

    def failing(*_: Any, **__: Any) -> None:
        raise ValueError("this layer is broken")

    layer.forward = failing
    with pytest.raises(ValueError, match="this layer is broken"):
        attach(model, FullFineTuning(), "task", keep_base=keep_base)
    assert not attached(model)
    assert [p.requires_grad for p in model.parameters()] == requires_grad
    assert Attachment.of(model) is None
    del layer.forward
    attach(model, LoRA(r=2), "task")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("no memory")], ids=repr)
@pytest.mark.parametrize("method", [LoRA(r=2), PrefixTuning(num_virtual_tokens=2), PromptTuning(), FullFineTuning()],
                         ids=lambda method: str(method.name))  # fmt: skip
def test_memory_that_runs_out_in_any_pass_of_attach_is_said_and_the_model_is_as_it_was(
    method: Method, error: BaseException
) -> None:
    """Whichever of the passes it is: no refusal that names another reason."""
    model = llama().eval()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    layer: Any = model.get_submodule("model.layers.1")
    whole, passes = layer.forward, 0
    for failing in range(1, 20):
        calls = 0

        def forward(*args: Any, number: int = failing, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                raise error
            return whole(*args, **kwargs)

        layer.forward = forward
        raised = None
        try:
            attach(model, method, "task", keep_base=method.trains_base)
        except BaseException as met:  # whatever it is
            raised = met
        if raised is None:
            break
        passes += 1
        assert raised is error
        assert Attachment.of(model) is None
        assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert passes >= 1
    assert calls == passes


def test_a_model_without_logits_is_refused_with_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = gpt2().eval()
    whole = model.forward

    def without(*args: Any, **kwargs: Any) -> Any:
        output = whole(*args, **kwargs)
        return {"loss": output.loss}

    monkeypatch.setattr(model, "forward", without)
    for method in (FullFineTuning(), LoRA(r=2)):
        with pytest.raises(AttributeError, match="logits"):
            attach(model, method, "task")
        assert not attached(model)
    monkeypatch.undo()
    attach(model, FullFineTuning(), "task")


@pytest.mark.parametrize("kind", METHODS, ids=lambda kind: str(kind.model_fields["name"].default))
def test_saving_into_a_folder_with_other_files_is_refused_and_loses_nothing(kind: type[Method], tmp_path: Path) -> None:
    model = gpt2().eval()
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "notes.txt").write_text("mine")
    files = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    delta = attach(model, kind(), "task")
    with pytest.raises(ConfigError, match=r"base is not empty.*notes\.txt"):
        delta.save(tmp_path / "base")
    assert {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()} == files
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_saving_again_replaces_what_a_save_wrote_of_any_method(tmp_path: Path) -> None:
    model = gpt2().eval()
    attach(model, FullFineTuning(), "full", keep_base=True).save(tmp_path / "saved")
    detach(model, "full")
    for method in (LoRA(r=2), PrefixTuning(num_virtual_tokens=2), LoRA(r=3)):
        delta = attach(model, method, method.name)
        assert delta.save(tmp_path / "saved") == tmp_path / "saved"
        detach(model, method.name)
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "spectune.json",
    ]
