"""How models make their logits, found by running them: on types whose heads differ, and on models that are watched."""

from __future__ import annotations

import copy
import gc
import inspect
import logging
import pickle
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    OPTConfig,
    PreTrainedModel,
)

import spectune
from spectune.compute.head import LinearHead, linear_head
from spectune.objectives import CAUSAL_LM
from spectune.objectives.causal_lm import causal_lm_loss_sum
from spectune.planning.shape import Shape
from spectune.planning.tracer import Tracer

V = 37
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GATED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 24, "max_position_embeddings": 32}

GPT: dict[str, Any] = {"vocab_size": V, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
NO_DROPOUT: dict[str, Any] = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
PROJECTED: dict[str, Any] = {"ffn_dim": 24, "word_embed_proj_dim": 8, "max_position_embeddings": 32, "dropout": 0.0}

#: config, then the scale and the soft cap that it asks for
TYPES: dict[str, tuple[Callable[[], Any], float, float | None]] = {
    "gpt2": (lambda: GPT2Config(**GPT, **NO_DROPOUT), 1.0, None),
    "llama": (lambda: LlamaConfig(**GATED), 1.0, None),
    "llama tied": (lambda: LlamaConfig(**GATED, tie_word_embeddings=True), 1.0, None),
    "gemma2": (lambda: Gemma2Config(**GATED, head_dim=8, final_logit_softcapping=2.0), 1.0, 2.0),
    "gemma2 uncapped": (lambda: Gemma2Config(**GATED, head_dim=8, final_logit_softcapping=None), 1.0, None),
    "gemma3": (lambda: Gemma3TextConfig(**GATED, head_dim=8, final_logit_softcapping=3.0), 1.0, 3.0),
    "granite": (lambda: GraniteConfig(**GATED, logits_scaling=4.0), 0.25, None),
    "cohere": (lambda: CohereConfig(**GATED, logit_scale=0.125), 0.125, None),
    "opt": (lambda: OPTConfig(**SIZES, **PROJECTED), 1.0, None),
    "bloom": (lambda: BloomConfig(**{**SIZES, "n_layer": 2, "n_head": 4}), 1.0, None),
    "mpt": (lambda: MptConfig(vocab_size=V, d_model=16, n_layers=2, n_heads=4, max_seq_len=32), 1.0, None),
    "falcon": (lambda: FalconConfig(**SIZES), 1.0, None),
    "gptj with a bias": (lambda: GPTJConfig(**GPT, **NO_DROPOUT, rotary_dim=4), 1.0, None),
}


def build(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(TYPES[kind][0]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def batch(*, positions: bool = False) -> dict[str, Tensor]:
    ids = torch.randint(1, V, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :4] = -100
    labels[2, :7] = -100
    made = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {**made, "position_ids": torch.arange(9).expand(3, -1) + 2} if positions else made


def inputs() -> dict[str, Any]:
    return {**{name: value for name, value in batch().items() if name != "labels"}, "use_cache": False}


def plain_head(model: nn.Module, data: dict[str, Any]) -> LinearHead | None:
    """What the first loss of such a batch finds out, and keeps."""
    return linear_head(model, {**{name: value for name, value in data.items() if name != "labels"}, "use_cache": False})


def watch_logits(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts calls of the model's own forward, without a hook on it."""
    calls: list[int] = []
    own = type(model).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", forward)
    return calls


@pytest.mark.parametrize("kind", list(TYPES))
def test_scale_and_soft_cap_are_those_of_the_config(kind: str) -> None:
    head = linear_head(build(kind), inputs())
    assert head is not None
    assert (head.scale, head.softcap) == (pytest.approx(TYPES[kind][1]), TYPES[kind][2])
    assert (head.bias is not None) == (kind == "gptj with a bias")


@pytest.mark.parametrize("positions", [False, True], ids=["", "positions"])
@pytest.mark.parametrize("kind", list(TYPES))
def test_loss_and_all_gradients_equal_the_models_own(
    kind: str, positions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every weight trained, tied heads included, against the model's own forward in float64."""
    model, data = build(kind).train(), batch(positions=positions)
    if positions and not accepts_positions(model):
        pytest.skip("this type takes no positions")
    exact = copy.deepcopy(model).double()
    given = {name: value for name, value in data.items() if name != "labels"}
    expected = nn.functional.cross_entropy(
        exact(**given).logits[:, :-1][data["labels"][:, 1:] != -100].double(),
        data["labels"][:, 1:][data["labels"][:, 1:] != -100],
        reduction="sum",
    )
    expected.backward()
    assert plain_head(model, data) is not None
    calls = watch_logits(model, monkeypatch)
    loss, count = CAUSAL_LM.loss_sum(model, data)
    loss.backward()
    assert not calls
    assert count == int((data["labels"][:, 1:] != -100).sum())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    largest = max(float(p.grad.abs().max()) for p in exact.parameters() if p.grad is not None)
    for (name, ours), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-5 * largest, rtol=0, msg=name)


def accepts_positions(model: PreTrainedModel) -> bool:
    return "position_ids" in inspect.signature(type(model).forward).parameters


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_frozen_base_gives_the_gradient_of_what_is_below(kind: str) -> None:
    model, data = build(kind).train(), batch()
    model.requires_grad_(False)
    layer = model.get_decoder().layers[0].mlp.up_proj.weight.requires_grad_()
    full = model(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits
    expected = torch.autograd.grad(causal_lm_loss_sum(full, data["labels"])[0], layer)[0]
    found = torch.autograd.grad(CAUSAL_LM.loss_sum(model, data)[0], layer)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_batch_without_targets_is_zero_with_a_gradient() -> None:
    model, data = build("llama").train(), batch()
    data["labels"] = torch.full_like(data["labels"], -100)
    loss, count = CAUSAL_LM.loss_sum(model, data)
    loss.backward()
    assert (loss.item(), count) == (0.0, 0)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_batches_added_up_have_the_gradient_of_the_whole() -> None:
    model, data = build("llama tied").train(), batch()
    CAUSAL_LM.loss_sum(model, data)[0].backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for row in range(3):
        CAUSAL_LM.loss_sum(model, {name: value[row : row + 1] for name, value in data.items()})[0].backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], atol=1e-5, rtol=1e-5)


def test_no_tensor_of_all_logits_is_made() -> None:
    config = LlamaConfig(**{**GATED, "vocab_size": 5000})
    model, rows = LlamaForCausalLM(config).train(), 40
    ids = torch.randint(0, 5000, (rows, 30))
    data = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    plain_head(model, data)
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.untyped_storage().nbytes())
            return result

    with Largest():
        CAUSAL_LM.loss_sum(model, data)[0].backward()
    assert largest < 4 * 5000 * rows * 29 / 1.3  # two chunks: the whole of it would be more


class Scaled(LlamaForCausalLM):
    """Makes its logits in a way of its own: `after` is done to the head's output, `before` to its input."""

    after: Callable[[Tensor], Tensor] = staticmethod(lambda logits: logits)
    before: Callable[[Tensor], Tensor] = staticmethod(lambda hidden: hidden)

    def forward(self, input_ids: Tensor, attention_mask: Any = None, use_cache: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache).last_hidden_state
        return SimpleNamespace(logits=self.after(self.lm_head(self.before(hidden))))


def in_place(logits: Tensor) -> Tensor:
    logits *= 0.5
    return logits.tanh_().mul_(4)


@pytest.mark.parametrize(
    ("after", "scale", "softcap"),
    [
        (lambda z: z.float().contiguous(), 1.0, None),
        (lambda z: 3 * (z / 2) * 0.5, 0.75, None),
        (lambda z: torch.tanh(z), 1.0, 1.0),
        (lambda z: 5 * torch.tanh(z * 2 / 5), 2.0, 5.0),
        (in_place, 2.0, 4.0),
        (lambda z: z.view(-1, V).float().view(z.shape), 1.0, None),
    ],
)
def test_numbers_around_a_tanh_are_read(after: Any, scale: float, softcap: float | None) -> None:
    model = Scaled(LlamaConfig(**GATED))
    model.after = after
    head = linear_head(model, inputs())
    assert head is not None
    assert (head.scale, head.softcap) == (pytest.approx(scale), softcap)


@pytest.mark.parametrize(
    "after",
    [
        lambda z: z + 1,
        lambda z: z.tanh().tanh(),
        lambda z: z * torch.ones(()),
        lambda z: 1 / z,
        lambda z: z.log_softmax(-1),
        lambda z: z.flip(-1),
        lambda z: z[..., 1:],
        lambda z: z * z,
        lambda z: (z * 2, z)[1],
        lambda z: (z.mul_(2), z[..., :])[1] + 0,
        lambda z: torch.zeros_like(z),
    ],
)
def test_anything_else_done_to_logits_goes_through_the_models_own_forward(after: Any) -> None:
    model = Scaled(LlamaConfig(**GATED))
    model.after = after
    assert linear_head(model, inputs()) is None


@pytest.mark.parametrize(
    "before", [lambda h: h * 2, lambda h: h[:, -1:], lambda h: h.clone().zero_(), lambda h: h.flip(0)]
)
def test_anything_done_to_the_heads_input_too(before: Any) -> None:
    model = Scaled(LlamaConfig(**GATED))
    model.before = before
    assert linear_head(model, inputs()) is None
    model.before = lambda hidden: hidden[:, 0:].to(torch.float64).to(torch.float32)
    model.__dict__["get_decoder"] = lambda: model.model
    assert linear_head(Scaled(model.config), inputs()) is not None


def watched(model: PreTrainedModel, how: str) -> None:
    head = model.get_output_embeddings()
    if how == "hook on the head":
        head.register_forward_hook(lambda *_: None)
    elif how == "hook on the model":
        model.register_forward_pre_hook(lambda *_: None)
    elif how == "forward replaced":  # as accelerate does for models in parts
        head.forward = head.forward
    elif how == "delta at the head":
        head.deltas = nn.ModuleDict()
    elif how == "compiled":
        model.compile(backend="eager")
    elif how == "another head":

        class Doubled(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return 2 * super().forward(x)

        model.set_output_embeddings(Doubled(16, V, bias=False))


@pytest.mark.parametrize(
    "how",
    ["hook on the head", "hook on the model", "forward replaced", "delta at the head", "compiled", "another head"],
)
def test_what_is_watched_is_called_itself(
    how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where it was found to be plain before; it is said once, and the loss is the model's own."""
    model, data = build("llama"), batch()
    assert plain_head(model, data) is not None
    watched(model, how)
    with caplog.at_level(logging.INFO, "spectune"):
        loss, _ = CAUSAL_LM.loss_sum(model, data)
        CAUSAL_LM.loss_sum(model, data)
    expected = causal_lm_loss_sum(model(**{**data, "labels": None}).logits, data["labels"])[0]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    told = [record.getMessage() for record in caplog.records if record.name == "spectune"]
    assert len(told) == 1
    assert told[0].startswith("LlamaForCausalLM: the loss is taken from its logits, all of them at once: ")


def test_an_input_that_is_not_of_each_token_goes_through_the_models_own_forward() -> None:
    mask = torch.zeros(1, 1, 9, 9)
    assert linear_head(build("llama"), {**inputs(), "attention_mask": mask}) is None


def test_the_model_is_found_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("gpt2").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    names = [set(module.__dict__) for module in model.modules()]
    names[0].add("_spectune_head")  # what was found
    state = torch.get_rng_state()
    calls = watch_logits(model, monkeypatch)
    for _ in range(3):
        assert linear_head(model, inputs()) is not None
    assert len(calls) == 1
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert [set(module.__dict__) for module in model.modules()] == names
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_is_found_anew_for_another_head_and_other_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    calls = watch_logits(model, monkeypatch)
    linear_head(model, inputs())
    linear_head(model, {**inputs(), "position_ids": torch.arange(9).expand(3, -1)})
    assert len(calls) == 2
    model.set_output_embeddings(nn.Linear(16, V, bias=True))
    found = linear_head(model, inputs())
    assert len(calls) == 3
    assert isinstance(found, LinearHead)
    assert found.bias is model.get_output_embeddings().bias


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_are_not_compiled_for_it() -> None:
    seen: list[int] = []

    def backend(graph: Any, example: Any) -> Any:
        seen.append(1)
        return graph.forward

    torch._dynamo.reset()
    model = build("llama")
    for layer in model.get_decoder().layers:
        layer.compile(backend=backend)
    assert linear_head(model, inputs()) is not None
    assert not seen
    CAUSAL_LM.loss_sum(model, batch())
    assert seen
    torch._dynamo.reset()


def test_a_model_on_the_meta_device_is_read_too() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(TYPES["gemma2"][0]())
        given = {name: torch.zeros(1, 2, dtype=torch.int64) for name in ("input_ids", "position_ids")}
    with Tracer(Shape(1, 2, 1, 1), ()):  # answers what masks ask of values
        head = linear_head(model, {**given, "use_cache": False})
    assert head is not None
    assert head.softcap == 2.0


def test_what_is_known_of_a_model_is_neither_copied_nor_pickled_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    linear_head(model, inputs())
    calls = watch_logits(model, monkeypatch)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found = linear_head(other, inputs())
        assert found is not None
        assert found.weight is other.get_output_embeddings().weight
    assert len(calls) == 2


def test_models_are_not_kept_alive() -> None:
    model = build("llama")
    spectune.attach(model, spectune.PromptTuning(num_virtual_tokens=2))
    assert linear_head(model, inputs()) is not None
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
