"""Models with heads: every method trains and stores a head of its own beside its weights, and leaves the base's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2DoubleHeadsModel,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
)

from spectune.deltas import Method, attach, attached, detach, merge, route
from spectune.errors import ConfigError, DataError
from spectune.methods import FullFineTuning, LoRA
from spectune.objectives import objective_of
from spectune.storage import load_delta
from tests.contract.conftest import CASES, KINDS, move, padded, put_on, tokens
from tests.contract.families import CONTEXT, SIZES, TOKENS

LLAMA: dict[str, Any] = {**SIZES, "num_hidden_layers": 2, "num_labels": 3, "classifier_dropout": 0.0}
GPT2: dict[str, Any] = {
    **TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "num_labels": 3, "resid_pdrop": 0.0,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0, "classifier_dropout": 0.0,
}  # fmt: skip
MODELS = {
    "llama-text": lambda **more: LlamaForSequenceClassification(LlamaConfig(**LLAMA | more)),
    "llama-tokens": lambda **more: LlamaForTokenClassification(LlamaConfig(**LLAMA | more)),
    "gpt2-text": lambda **more: GPT2ForSequenceClassification(GPT2Config(**GPT2 | more)),
    "gpt2-tokens": lambda **more: GPT2ForTokenClassification(GPT2Config(**GPT2 | more)),
}
BESIDE = [name for name, method in CASES.items() if not method.trains_base]


def make(kind: str, head: int = 0, **more: Any) -> PreTrainedModel:
    """The same base each time; its head is drawn by `head`."""
    torch.manual_seed(7)
    model = MODELS[kind](**more).eval()
    torch.manual_seed(head)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # away from zeros and ones, so that nothing is hidden by them
                parameter.add_(0.1)
            if name.startswith(("score", "classifier")):
                parameter.copy_(torch.randn(parameter.shape))
    return model


def head_of(model: PreTrainedModel) -> torch.nn.Linear:
    return getattr(model, "score", None) or model.classifier


def batch_of(kind: str) -> dict[str, Tensor]:
    ids, mask = padded([row[: 10 - 2 * n] for n, row in enumerate(tokens())], "right")
    labels = torch.tensor([0, 2, 1]) if "text" in kind else (ids % 3).masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def outputs(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    places = {} if mask is None else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, attention_mask=mask, **places).logits
    return found


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def beside(request: pytest.FixtureRequest) -> Method:
    return CASES[request.param]


#: every method on rows' heads, a case of each kind on tokens' heads
ON_HEADS = pytest.mark.parametrize(
    ("kind", "beside"),
    [
        pytest.param(kind, name, marks=[] if kind.endswith("text") or name in KINDS else pytest.mark.slow)
        for kind in MODELS
        for name in BESIDE
    ],
    indirect=True,
)


@ON_HEADS
def test_a_delta_has_its_own_head_from_the_first_step_to_another_model(kind: str, beside: Method, folder: Path) -> None:
    """Attach, gradients, save, load on a model whose head is another, route, detach."""
    model, ids = make(kind), tokens()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bare = outputs(model, ids)
    delta = attach(model, beside, "task", seed=3)
    if beside.starts_at_identity:
        assert torch.equal(outputs(model, ids), bare)
    names = {name for name, _ in delta.named_parameters()}
    assert {name for name in names if name.startswith(("score", "classifier"))}
    assert delta.num_trained_parameters() == sum(p.numel() for p in delta.parameters())
    assert delta.num_parameters() == sum(t.numel() for t in delta.state_dict().values())

    move(delta)
    loss, count = objective_of(model).loss_sum(model, batch_of(kind))
    (loss / count).backward()
    silent = {name for name, p in delta.named_parameters() if p.grad is None or not p.grad.abs().sum()}
    assert all("bias" in name for name in silent), f"key biases alone may have no gradient: {silent}"
    assert not any(p.grad is not None for n, p in model.named_parameters() if ".deltas." not in f".{n}")

    tuned = outputs(model, ids)
    delta.save(folder / "saved")
    other = make(kind, head=1)
    assert not torch.equal(outputs(other, ids), bare)
    load_delta(other, folder / "saved", "loaded")
    assert torch.equal(outputs(other, ids), tuned)
    with route(model, None):
        assert torch.equal(outputs(model, ids), bare)
    detach(model, "task")
    assert {name: tensor for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])} == {}
    assert model.state_dict().keys() == before.keys()


@ON_HEADS
def test_padding_on_either_side_changes_nothing(kind: str, beside: Method) -> None:
    model, rows = make(kind), [row[: 10 - 2 * n] for n, row in enumerate(tokens())]
    move(put_on(model, beside))
    expected = [outputs(model, row[None], torch.ones_like(row)[None])[0] for row in rows]
    for side in ("left", "right"):
        ids, mask = padded(rows, side)
        found = outputs(model, ids, mask)
        for n, row in enumerate(expected):
            real = found[n] if "text" in kind else found[n][mask[n] == 1]
            torch.testing.assert_close(real, row, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama-text", "gpt2-tokens"])
def test_rows_of_a_mixed_batch_have_each_their_own_head(kind: str) -> None:
    """One delta of every method at once, which have only the head in common, and the bare base."""
    model, taken = make(kind), []
    for name in BESIDE:
        if name.startswith("prompt") and "gpt2" in kind:
            continue  # rows with and without a prompt are padded on the left, which absolute positions do not stand
        delta = put_on(model, CASES[name], name)
        move(delta)
        taken.append(name)
    names = [*taken, None]
    ids = tokens(1).repeat(len(names), 1)
    mask = torch.ones_like(ids)
    with route(model, names):
        mixed = outputs(model, ids, mask)
    for n, name in enumerate(names):
        with route(model, name):
            alone = outputs(model, ids[n : n + 1], mask[:1])[0]
        torch.testing.assert_close(mixed[n], alone, rtol=0, atol=1e-5 * float(alone.abs().max()))
    # without windows a prefix that slides is one that does not
    assert len({tuple(row.flatten().tolist()) for row in mixed}) == len(names) - 1


@pytest.mark.parametrize("kind", ["llama-text", "gpt2-tokens"])
@pytest.mark.parametrize("name", [name for name, method in CASES.items() if method.can_merge])
def test_a_merged_model_has_the_deltas_head(kind: str, name: str) -> None:
    if (kind, name) == ("llama-text", "bitfit"):
        return  # a base without biases: refused, as a causal language model is
    model, ids = make(kind), tokens()
    move(put_on(model, CASES[name]))
    merged = merge(model, "task")
    expected = outputs(model, ids)
    torch.testing.assert_close(outputs(merged, ids), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert type(merged) is type(model)
    changed = not torch.equal(head_of(merged).weight, head_of(make(kind)).weight)
    assert changed


@pytest.mark.parametrize("kind", ["llama-text", "gpt2-tokens"])
def test_full_fine_tuning_trains_the_head_in_place(kind: str, folder: Path) -> None:
    model = make(kind)
    delta = put_on(model, FullFineTuning())
    loss, _ = objective_of(model).loss_sum(model, batch_of(kind))
    loss.backward()
    assert head_of(model).weight.grad is not None
    move(delta)
    delta.save(folder / "saved")
    other = make(kind, head=1)
    load_delta(other, folder / "saved", "loaded")
    assert torch.equal(outputs(other, tokens()), outputs(model, tokens()))


def test_a_head_for_another_number_of_labels_is_refused_in_words(folder: Path) -> None:
    put_on(make("llama-text"), LoRA(r=2)).save(folder / "saved")
    other = make("llama-text", num_labels=5)
    with pytest.raises(DataError, match=r"head gives 3 outputs, this model's 5 .*num_labels=3"):
        load_delta(other, folder / "saved")
    assert attached(other) == {}


def test_a_delta_of_another_task_is_refused_in_words(folder: Path) -> None:
    plain = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()
    plain.model.load_state_dict(make("llama-text").model.state_dict())
    put_on(plain, LoRA(r=2), "words").save(folder / "words")
    with pytest.raises(DataError, match=r"has no head .*trained for\s+another task"):
        load_delta(make("llama-text"), folder / "words")
    put_on(make("llama-text"), LoRA(r=2)).save(folder / "classes")
    with pytest.raises(DataError, match="SEQ_CLS"):
        load_delta(plain, folder / "classes", "classes")
    assert list(attached(plain)) == ["words"]


OTHERS: dict[str, tuple[Any, str]] = {
    "question answering": (lambda: LlamaForQuestionAnswering(LlamaConfig(**LLAMA)), "LlamaForQuestionAnswering has"),
    "no head": (lambda: LlamaModel(LlamaConfig(**LLAMA)), "LlamaModel has"),
    "two heads": (lambda: GPT2DoubleHeadsModel(GPT2Config(**GPT2 | {"num_labels": 1})), "GPT2DoubleHeadsModel has"),
    "several classes": (
        lambda: make("llama-text", problem_type="multi_label_classification"), "multi_label_classification"
    ),
    "several numbers": (lambda: make("gpt2-text", problem_type="regression"), "regression with 3 outputs"),
    "encoder": (
        lambda: RobertaForSequenceClassification(
            RobertaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
        ),
        "Heads are for decoder-only models",
    ),
    "encoder and decoder": (
        lambda: T5ForSequenceClassification(T5Config(vocab_size=97, d_model=32, num_layers=1, num_heads=4, d_ff=48)),
        "is an encoder-decoder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_heads_are_refused_by_name_with_the_model_as_it_was(name: str) -> None:
    model = OTHERS[name][0]()
    before = {n: (p.requires_grad, len(m._forward_hooks)) for n, p in model.named_parameters() for m in [model]}
    with pytest.raises(ConfigError, match=OTHERS[name][1]):
        attach(model, LoRA(r=2), "task")
    assert before == {n: (p.requires_grad, len(m._forward_hooks)) for n, p in model.named_parameters() for m in [model]}
    assert not any("deltas" in n for n, _ in model.named_modules())


def test_without_a_padding_id_several_rows_are_an_error_that_says_what_to_do() -> None:
    model = make("llama-text", pad_token_id=None)
    put_on(model, LoRA(r=2))
    batch = batch_of("llama-text")
    with pytest.raises(ConfigError, match=r"set model.config.pad_token_id = tokenizer.pad_token_id"):
        objective_of(model).loss_sum(model, batch)
    one = {name: tensor[:1] for name, tensor in batch.items()}
    assert objective_of(model).loss_sum(model, one)[1] == 1
