"""One batch whose rows use different deltas (contract point 7): every row equals its solo run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from spectune.deltas import Attachment, Delta, Method, attach, attached, detach, route
from spectune.errors import ConfigError
from spectune.methods import BottleneckAdapter, FullFineTuning, LoRA, PrefixTuning, PromptTuning
from tests.contract.conftest import CASES, KINDS, move, padded, refusal, tokens
from tests.contract.families import FAMILIES, mixtral

Make = Callable[[], PreTrainedModel]

#: twelve deltas of every method that can share a batch, prefixes and prompts of unlike lengths
DELTAS: dict[str, Method] = {
    **{f"case-{name}": method for name, method in CASES.items() if not method.trains_base},
    "lora-8": LoRA(r=8, use_rslora=True),
    "lora-one": LoRA(r=2, target_modules=r".*\.0\..*att.*"),
    "prefix-3": PrefixTuning(num_virtual_tokens=3),
    "prompt-9": PromptTuning(num_virtual_tokens=9),
}


#: one of each kind, with prefixes and prompts of unlike lengths: for what every module of a kind is called alike in
FEW = [*(f"case-{kind}" for kind in KINDS if kind != "full"), "prefix-3", "prompt-9"]


def put_all(model: PreTrainedModel, family: str, names: Iterable[str] = DELTAS) -> dict[str, Delta]:
    found = {}
    for number, name in enumerate(names):
        method = DELTAS[name]
        if refusal(family, method) is None:
            found[name] = attach(model, method, name, seed=number)
            move(found[name])
    return found


def batch_route(deltas: dict[str, Delta]) -> list[str | None]:
    """Sixteen rows and more: every delta, some twice, and the bare base, neighbours unlike."""
    names: list[str | None] = [None, *deltas]
    names += [None, "prefix-3", "prompt-9", "case-lora", "case-prompt"]
    return names[::2] + names[1::2]


def ragged(rows: int, side: str) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    texts = [tokens(1, 4 + (5 * i) % 7, seed=i)[0] for i in range(rows)]
    return *padded(texts, side), texts


def close(a: torch.Tensor, b: torch.Tensor, what: object, tolerance: float = 1e-5) -> None:
    worst = float((a - b).detach().abs().max())
    assert worst <= tolerance, f"{what}: {worst:.3g}"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_and_gradients_of_a_mixed_batch_equal_solo_runs(
    make_model: Make, family: str, side: str, attention: str
) -> None:
    model = make_model()
    model.set_attn_implementation(attention)
    check_against_solo_runs(model, family, side)


def test_logits_and_gradients_of_a_mixed_batch_equal_solo_runs_on_a_mixture_of_experts() -> None:
    """The other tests of this family are slow ones."""
    torch.manual_seed(7)
    model = mixtral(1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    check_against_solo_runs(model, "mixtral", "left")


def check_against_solo_runs(model: PreTrainedModel, family: str, side: str) -> None:
    deltas = put_all(model, family)
    names = batch_route(deltas)
    ids, mask, _ = ragged(len(names), side)
    given = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    # a text's first token is predicted from nothing, or from padding
    labels = ids.masked_fill(mask.cumsum(-1) <= 1, -100)

    def losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )

    with route(model, names):
        together = model(input_ids=ids, attention_mask=mask, **given).logits
    losses(together, labels).backward()  # outside of the `with`
    mixed = {name: [p.grad.clone() for p in delta.parameters()] for name, delta in deltas.items()}
    for delta in deltas.values():
        for parameter in delta.parameters():
            parameter.grad = None
    for row, name in enumerate(names):
        one = slice(row, row + 1)
        with route(model, name):
            alone = model(input_ids=ids[one], attention_mask=mask[one], **{k: v[one] for k, v in given.items()}).logits
        real = mask[row] == 1
        close(together[row][real], alone[0][real], (row, name))
        if name is not None:
            losses(alone, labels[one]).backward()
    for name, delta in deltas.items():
        for (part, parameter), gradient in zip(delta.named_parameters(), mixed[name], strict=True):
            scale = max(1.0, float(gradient.abs().max()))
            close(gradient, parameter.grad, (name, part), 1e-5 * scale)


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_that_nobody_gave_are_each_rows_own(make_model: Make, family: str, side: str) -> None:
    """Rows with virtual tokens count real tokens, the others are numbered as the base does it by itself."""
    model = make_model()
    names = batch_route(put_all(model, family))
    ids, mask, _ = ragged(len(names), side)
    with torch.no_grad():
        with route(model, names):
            together = model(input_ids=ids, attention_mask=mask).logits
        for row, name in enumerate(names):
            with route(model, name):
                alone = model(input_ids=ids[row : row + 1], attention_mask=mask[row : row + 1]).logits[0]
            close(together[row][mask[row] == 1], alone[mask[row] == 1], (row, name))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cache_implementation": "static"},
        {"use_cache": False},
        pytest.param({"num_beams": 3}, marks=pytest.mark.slow),  # less than the next one
        {"num_beams": 3, "num_return_sequences": 2},
    ],
    ids=["greedy", "static", "uncached", "beams", "beams-returned"],
)
def test_generation_of_a_mixed_batch_equals_solo_runs(make_model: Make, family: str, settings: dict[str, Any]) -> None:
    model = make_model()
    names = batch_route(put_all(model, family, FEW))
    ids, mask, texts = ragged(len(names), "left")
    returned = settings.get("num_return_sequences", 1)
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **settings}
    with route(model, names):
        together = model.generate(ids, attention_mask=mask, **how)[:, ids.shape[1] :]
    for row, name in enumerate(names):
        with route(model, name):
            alone = model.generate(texts[row][None], attention_mask=torch.ones(1, len(texts[row])).long(), **how)
        mine = together[row * returned : (row + 1) * returned]
        assert mine.tolist() == alone[:, len(texts[row]) :].tolist(), name


def test_several_sampled_sequences_carry_their_route(make_model: Make, family: str) -> None:
    """With top_k=1 sampling has no choice: each of a row's sequences is what greedy search writes."""
    model = make_model()
    names = batch_route(put_all(model, family, FEW))
    ids, mask, _ = ragged(len(names), "left")
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "attention_mask": mask}
    with route(model, names):
        greedy = model.generate(ids, do_sample=False, **how)
        sampled = model.generate(ids, do_sample=True, top_k=1, num_return_sequences=3, **how)
        again = model.generate(ids, do_sample=False, **how)
    assert torch.equal(sampled, greedy.repeat_interleave(3, dim=0))
    assert torch.equal(again, greedy)
    assert Attachment.of(model).state.thread.copies == 1


def test_no_row_depends_on_its_neighbours_or_on_what_else_is_attached(make_model: Make, family: str) -> None:
    model = make_model()
    few = {name: attach(model, DELTAS[name], name, seed=1) for name in ("case-lora", "prefix-3")}
    for delta in few.values():
        move(delta, 0.1)
    ids = tokens(3, 8)
    with torch.no_grad():
        with route(model, ["case-lora", None, "prefix-3"]):
            before = model(input_ids=ids).logits
        move(attach(model, PromptTuning(num_virtual_tokens=7), "other"), 0.3)
        with route(model, ["case-lora", None, "prefix-3"]):
            assert torch.equal(model(input_ids=ids).logits, before)
        with route(model, ["case-lora", "other", "prefix-3"]):
            changed = model(input_ids=ids).logits
    close(changed[[0, 2]], before[[0, 2]], "neighbour changed")


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # transformers 5.17, without gradients
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_each_rows_route(make_model: Make, family: str, reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = make_model()
        deltas = put_all(model, family, FEW)
        names = batch_route(deltas)
        ids, mask, _ = ragged(len(names), "right")
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        with route(model, names):
            loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        with torch.no_grad(), route(model, "case-lora"):
            model(input_ids=tokens(2, 3))  # another batch, under another route, before backward
        loss.backward()
        gradients.append([p.grad for delta in deltas.values() for p in delta.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        close(recomputed, plain, "gradient")


def test_batches_of_another_size_and_full_tuning_are_refused(make_model: Make, family: str) -> None:
    model = make_model()
    attach(model, LoRA(r=2), "a")
    with route(model, ["a", None]):
        model(input_ids=tokens(2, 4))
        for rows in (1, 3, 4):  # four rows are two copies of each in generation only
            with pytest.raises(ConfigError, match=f"2 rows and this batch has {rows} rows"):
                model(input_ids=tokens(rows, 4))
        with pytest.raises(ConfigError, match="in use"):
            detach(model, "a")
    with pytest.raises(ConfigError, match="no delta 'b'"), route(model, ["a", "b"]):
        pass
    detach(model, "a")
    attach(model, FullFineTuning(), "full", keep_base=True)
    refused = r"'full' is a fully tuned base .* cannot share a batch"
    with pytest.raises(ConfigError, match=refused), route(model, ["full", None]):
        pass
    with route(model, ["full", "full"]):
        model(input_ids=tokens(2, 4))


def test_a_cache_with_virtual_tokens_belongs_to_its_route(make_model: Make, family: str) -> None:
    model = make_model()
    attach(model, PromptTuning(num_virtual_tokens=4), "long")
    attach(model, PromptTuning(num_virtual_tokens=2), "short")
    attach(model, BottleneckAdapter(), "adapter")
    ids = tokens(2, 5)
    for filled, now in (("long", "short"), ("long", None), (None, "long"), ("adapter", "short")):
        with torch.no_grad():
            with route(model, filled):
                out = model(input_ids=ids, use_cache=True)
            cache = getattr(out, "past_key_values", None) or out.cache
            name = "past_key_values" if getattr(out, "past_key_values", None) is not None else "cache"
            with route(model, now), pytest.raises(ConfigError, match="this cache was filled under"):
                model(input_ids=ids[:, :1], attention_mask=torch.ones(2, 6).long(), **{name: cache})


def test_after_an_error_inside_a_mixed_forward_nothing_is_left(make_model: Make, family: str) -> None:
    model = make_model()
    names = batch_route(put_all(model, family))
    ids, mask, _ = ragged(len(names), "left")
    with torch.no_grad():
        with route(model, names):
            expected = model(input_ids=ids, attention_mask=mask).logits
        bare = model(input_ids=ids[:2]).logits
        handle = model.get_output_embeddings().register_forward_pre_hook(_fail)
        inner = model.get_decoder().register_forward_pre_hook(_fail)
        with pytest.raises(KeyboardInterrupt), route(model, names):
            model(input_ids=ids, attention_mask=mask)
        inner.remove()
        with pytest.raises(KeyboardInterrupt), route(model, names):
            model.generate(ids, attention_mask=mask, max_new_tokens=3, num_beams=2)
        handle.remove()
        assert torch.equal(model(input_ids=ids[:2]).logits, bare)
        with route(model, names):
            assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)
    assert Attachment.of(model).state.thread.copies == 1
    for name in list(attached(model)):
        detach(model, name)
    assert "generate" not in model.__dict__


def _fail(*_: object) -> None:
    raise KeyboardInterrupt


def test_the_first_mixed_pass_is_noted_as_its_own() -> None:
    """How the base counts positions is found out by running it, in the first pass that asks for it: what that run
    leaves behind is not this pass's. Where a window reaches a prefix, the padding of each row counts."""
    model = FAMILIES["gemma3"]().eval()
    attach(model, PrefixTuning(num_virtual_tokens=3, sliding=True), "prefix")
    move(attach(model, LoRA(r=2), "lora"))
    ids, mask, _ = ragged(2, "left")
    with torch.no_grad(), route(model, ["prefix", "lora"]):
        first = model(input_ids=ids, attention_mask=mask).logits
        again = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(first, again)
