"""A packed batch is the padded one: the same loss and the same gradients, of every method, on every family."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, MambaConfig, MambaForCausalLM, PreTrainedModel

from spectune.blocks.recompute import recomputing
from spectune.compute.varlen import loop_by_document
from spectune.data import Example, Row, collate, collate_packs
from spectune.deltas import Attachment, Method, attached, kernel_serves, packed, packing, route, why_not_packed
from spectune.errors import ConfigError
from spectune.methods import LoRA, PrefixTuning, PromptTuning
from spectune.objectives import CAUSAL_LM
from tests.contract.conftest import CASES, KINDS, move, put_on
from tests.contract.families import FAMILIES, VOCABULARY

FAST = ("gpt2", "llama", "gemma3")
HOW = {"eager masks": ("eager", None), "sdpa masks": ("sdpa", None), "sdpa loop": ("sdpa", loop_by_document)}
#: a case of each kind, and those that attention itself knows; of the others a module like one of these is all there is
LOOKED_AT = (*KINDS, "prefix-projected", "prefix-sliding")
LENGTHS = [9, 4, 13, 2, 7, 11, 3]  # longer than Gemma's window of 6, and shorter
PACKS = [[2, 3], [5, 1], [0, 4], [6]]


@pytest.fixture(params=[f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=list(HOW))
def how(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return HOW[request.param]


def examples() -> list[Example]:
    drawn = random.Random(4)
    ids = [[drawn.randrange(1, VOCABULARY) for _ in range(length)] for length in LENGTHS]
    return [Example(row, n % 3, Row(f"t:{n}", text="")) for n, row in enumerate(ids)]


def gradients(model: PreTrainedModel, batch: dict[str, Tensor], kernel: Any = None) -> tuple[float, dict[str, Tensor]]:
    """Loss sum, and the gradient of its mean, with backward outside of everything."""
    delta = attached(model)["task"]
    for parameter in delta.parameters():
        parameter.grad = None
    documents = batch.pop("documents", None)
    if documents is None:
        loss, count = CAUSAL_LM.loss_sum(model, batch)
    else:
        with packing(model, kernel), packed(model, documents):
            loss, count = CAUSAL_LM.loss_sum(model, batch)
    (loss / count).backward()
    return float(loss.detach()), {name: p.grad for name, p in delta.named_parameters() if p.grad is not None}


def assert_same(found: tuple[float, dict[str, Tensor]], wanted: tuple[float, dict[str, Tensor]]) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)
    assert found[1].keys() == wanted[1].keys()
    size = max(float(gradient.abs().max()) for gradient in wanted[1].values())
    assert size > 0
    for name, gradient in found[1].items():
        torch.testing.assert_close(gradient, wanted[1][name], atol=1e-5 * max(1.0, size), rtol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("method", "how"),
    [
        pytest.param(case, how, marks=[] if case in LOOKED_AT or how == "sdpa loop" else pytest.mark.slow)
        for case in CASES
        for how in HOW
    ],
    indirect=True,
)
def test_losses_and_gradients_are_those_of_the_padded_batch(
    model: PreTrainedModel, method: Method, how: tuple[str, Any]
) -> None:
    attention, kernel = how
    model.set_attn_implementation(attention)
    move(put_on(model, method))
    rows = examples()
    padded = gradients(model, collate(rows, 0))
    batch = collate_packs([[rows[i] for i in pack] for pack in PACKS], 0)
    assert_same(gradients(model, batch, kernel), padded)


@pytest.mark.parametrize("case", ["lora", "prompt", "prefix-sliding", "full"])
def test_recomputed_too(model: PreTrainedModel, case: str, how: tuple[str, Any]) -> None:
    """Two packed batches are on their way at once, and both are recomputed as they were."""
    attention, kernel = how
    model.set_attn_implementation(attention)
    delta = put_on(model, CASES[case])
    move(delta)
    rows = examples()
    both = [[[2, 3], [5, 1]], [[0, 4, 6]]]
    wanted = gradients(model, collate(rows, 0))
    for parameter in delta.parameters():
        parameter.grad = None
    model.train()
    losses, count = [], 0
    with recomputing(model, True), packing(model, kernel):
        for packs in both:
            batch = collate_packs([[rows[i] for i in pack] for pack in packs], 0)
            with packed(model, batch.pop("documents")):
                loss, targets = CAUSAL_LM.loss_sum(model, batch)
            losses.append(loss)
            count += targets
        for loss in losses:
            (loss / count).backward()
    found = {name: p.grad for name, p in delta.named_parameters() if p.grad is not None}
    assert_same((sum(float(loss.detach()) for loss in losses), found), wanted)


#: deltas of packs side by side: prefixes and prompts of unlike lengths, neighbours unlike
MIXED: dict[str, Method | None] = {
    "prefix": CASES["prefix"],
    "adapter": CASES["adapter-block"],
    "prompt": CASES["prompt"],
    "none": None,
    "lora": CASES["lora"],
    "short-prompt": PromptTuning(num_virtual_tokens=2),
    "sliding": PrefixTuning(num_virtual_tokens=4, sliding=True),
    "ln": CASES["ln"],
    "short-prefix": PrefixTuning(num_virtual_tokens=3),
}


@pytest.mark.parametrize("mode", [False, True], ids=["kept", "recomputed"])
def test_packs_of_a_delta_each_are_the_padded_batches_of_each_delta(
    model: PreTrainedModel, how: tuple[str, Any], mode: bool
) -> None:
    attention, kernel = how
    model.set_attn_implementation(attention)
    deltas = {name: put_on(model, method, name) for name, method in MIXED.items() if method is not None}
    for delta in deltas.values():
        move(delta)
    names = [name if name in deltas else None for name in MIXED]
    rows, packs = examples(), [[2, 3], [5, 1], [0, 4, 6], [6], [1, 3], [4, 0], [2], [6, 3], [5]]
    wanted = 0.0
    for name, pack in zip(names, packs, strict=True):
        with route(model, name):
            loss, _ = CAUSAL_LM.loss_sum(model, collate([rows[i] for i in pack], 0))
        if name is not None:
            loss.backward()
        wanted += float(loss.detach())
    alone = {name: [p.grad for p in delta.parameters()] for name, delta in deltas.items()}
    for parameter in model.parameters():
        parameter.grad = None
    batch = collate_packs([[rows[i] for i in pack] for pack in packs], 0)
    model.train(mode)
    around = packing(model, kernel), packed(model, batch.pop("documents")), recomputing(model, mode)
    with around[0], around[1], around[2], route(model, names):
        loss, _ = CAUSAL_LM.loss_sum(model, batch)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-6)
    for name, delta in deltas.items():
        for parameter, gradient in zip(delta.parameters(), alone[name], strict=True):
            size = max(1.0, float(gradient.abs().max()))
            torch.testing.assert_close(parameter.grad, gradient, atol=1e-5 * size, rtol=1e-5, msg=name)


def test_outside_of_a_pack_the_model_is_as_ever(model: PreTrainedModel) -> None:
    before = str(model.config.get_text_config()._attn_implementation)
    put_on(model, LoRA(r=2))
    batch = collate(examples(), 0)
    wanted = gradients(model, dict(batch))
    with packing(model, loop_by_document):
        assert str(model.config.get_text_config()._attn_implementation) != before
        assert_same(gradients(model, dict(batch)), wanted)
    assert str(model.config.get_text_config()._attn_implementation) == before
    assert not any("_spectune_registry" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize(
    "method",
    [case if case in LOOKED_AT else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
    indirect=True,
)
def test_the_probe_finds_that_documents_are_kept_apart(model: PreTrainedModel, method: Method) -> None:
    put_on(model, method)
    training = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert why_not_packed(model) is None
    assert why_not_packed(model, loop_by_document) is None
    assert [module.training for module in model.modules()] == training
    assert torch.equal(torch.get_rng_state(), state)


def test_the_probe_finds_a_leak(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    from spectune.deltas.hooks import packed_attention
    from spectune.deltas.probes import documents

    put_on(model, LoRA(r=2))

    def deaf(make: Any, pack: Any, settings: dict[str, Any]) -> Any:
        return make(**{**settings, "allow_is_causal_skip": False})

    monkeypatch.setattr(packed_attention, "mask_of", deaf)
    assert "does not keep documents apart" in (why_not_packed(model) or "")
    monkeypatch.undo()
    assert why_not_packed(model) is None
    attachment = Attachment.of(model)
    assert attachment is not None
    attachment.proved.clear()  # what was proved is not looked at again
    # positions that go on from one document to the next
    monkeypatch.setattr(documents, "_places", lambda pack: torch.arange(sum(map(len, pack))))
    assert (why_not_packed(model) is None) == (model.config.model_type not in ("gpt2", "opt"))  # a table of positions


def test_a_kernel_serves_every_layer_or_none(family: str, model: PreTrainedModel) -> None:
    put_on(model, LoRA(r=2))
    assert kernel_serves(model, loop_by_document)
    put_on(model, PrefixTuning(num_virtual_tokens=2), "prefix")
    # windows beside a prefix that is seen from everywhere need masks
    assert kernel_serves(model, loop_by_document) == (family != "gemma3")
    if family in ("gpt2", "llama"):
        dropout = "attn_dropout" if family == "gpt2" else "attention_dropout"
        for module in model.modules():
            if hasattr(module, dropout):
                setattr(module, dropout, torch.nn.Dropout(0.1) if family == "gpt2" else 0.1)
        assert not kernel_serves(model, loop_by_document)
    model.set_attn_implementation("eager")
    assert not kernel_serves(model, loop_by_document)


def test_a_state_over_positions_is_found_out() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": 0, "eos_token_id": 0}
    model = MambaForCausalLM(MambaConfig(**sizes, bos_token_id=0)).eval()
    put_on(model, PromptTuning(num_virtual_tokens=2))
    assert "no attention was found" in (why_not_packed(model) or "")


def test_what_does_not_go_into_a_pack_is_refused_by_name(model: PreTrainedModel) -> None:
    put_on(model, LoRA(r=2), "a")
    put_on(model, PromptTuning(num_virtual_tokens=2), "b")
    batch = collate_packs([[examples()[0], examples()[1]], [examples()[2]]], 0)
    documents, given = batch["documents"], {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    with pytest.raises(ConfigError, match="with packing"), packed(model, documents):
        pass
    with packing(model), packed(model, documents):
        with route(model, ["a", "b", "a"]), pytest.raises(ConfigError, match="3 rows and this batch has 2 rows"):
            model(**given)
        with pytest.raises(ConfigError, match="no attention mask"):
            model(**given, attention_mask=torch.ones_like(documents))
        with pytest.raises(ConfigError, match="goes with no cache"):
            model(**given, past_key_values=DynamicCache())
        with pytest.raises(ConfigError, match=r"the batch is \[2, 5\]"):
            model(input_ids=batch["input_ids"][:, :5], use_cache=False)
    with packing(model), pytest.raises(ConfigError, match="on already"), packing(model):
        pass


@pytest.mark.parametrize("case", ["lora", "prefix", "prompt"])
def test_through_flash_attention(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, case: str) -> None:
    """All but the kernel, which runs on CUDA alone: the loop stands in for it, behind the same arguments."""
    from torch.nn.attention import varlen as torch_varlen

    from spectune.compute import varlen
    from spectune.compute.pack_layout import Spans
    from spectune.deltas.hooks import packed_attention

    calls = 0

    def stand_in(
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
        scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        nonlocal calls
        calls += 1
        queries, keys = (Spans(bounds.diff().tolist(), bounds.device) for bounds in (cu_seq_q, cu_seq_k))
        assert (queries.most, keys.most) == (max_q, max_k)
        window = None if window_size == (-1, 0) else window_size[0] + 1
        return loop_by_document(query, key, value, queries, keys, scale=scale, window=window)

    monkeypatch.setattr(torch_varlen, "varlen_attn", stand_in)
    monkeypatch.setattr(packed_attention, "flash_takes", lambda *_: True)
    move(put_on(model, CASES[case]))
    rows = examples()
    batch = collate_packs([[rows[i] for i in pack] for pack in PACKS], 0)
    assert_same(gradients(model, batch, varlen.flash_by_document), gradients(model, collate(rows, 0)))
    windows = sum(kind == "sliding_attention" for kind in getattr(model.config, "layer_types", None) or [])
    layers = model.config.num_hidden_layers
    assert calls == (layers - windows if case == "prefix" else layers)
