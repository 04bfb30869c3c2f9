"""Slot tables: rows read the operands of any delta by slot, and answer as under a plain route."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectune.deltas import Method, SlotTables, TableRoute, attach, attached, detach, route
from spectune.errors import ConfigError
from spectune.methods import LNTuning, LoRA, PrefixTuning, PromptTuning
from tests.contract.conftest import CASES, move, refusal
from tests.contract.families import gpt2, llama, mixtral

METHODS: dict[str, Method] = {
    **{name: method for name, method in CASES.items() if not method.trains_base},
    "lora-3": LoRA(r=3, use_rslora=True),
    "lora-9": LoRA(r=9),
    "lora-pissa": LoRA(r=2, init_lora_weights="pissa"),
    "lora-some": LoRA(r=2, target_modules=r".*\.1\..*"),
}
#: they change the batch's places, so that the bare base's rows have other shapes to be computed in
VIRTUAL = (PrefixTuning, PromptTuning)


@pytest.fixture(scope="module", params=[gpt2, llama], ids=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    found: PreTrainedModel = request.param().eval()
    for number, (name, method) in enumerate(METHODS.items()):
        if refusal(request.param.__name__, method) is None:
            move(attach(found, method, name, seed=number), 0.1)
    return found


@pytest.fixture
def tables(model: PreTrainedModel) -> Iterator[SlotTables]:
    made = SlotTables(model, 5)
    yield made
    made.close()


def answer(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    return logits


IDS = torch.randint(1, 90, (7, 6), generator=torch.Generator().manual_seed(5))


def test_rows_over_tables_answer_as_under_a_route_whatever_a_slot_held_before(
    model: PreTrainedModel, tables: SlotTables
) -> None:
    names = [name for name in attached(model) if tables.why_not(name) is None]
    assert len(names) == len(attached(model))  # gpt2 has all of BitFit's biases at outputs
    for start in range(0, len(names), 3):
        group = [names[(start + i) % len(names)] for i in range(5)]
        rows = [group[2], None, *group, None][:7]
        for name in group:
            tables.put(name)
        with route(model, rows):
            expected = answer(model, IDS)
        with tables.routed(rows):
            found = answer(model, IDS)
        index = tables.index_of(rows)
        with tables.along(TableRoute(rows, index, cached=False, slots=index.tolist(), kept=True)):
            apart = [answer(model, IDS), answer(model, IDS)]  # each kind by its own rows, chosen once
        for row, name in enumerate(rows):
            for one in (found, *apart):
                assert float((expected[row] - one[row]).abs().max()) < 1e-5, (name, rows)
        for name in group:
            tables.take(name)


def test_rows_of_the_bare_base_are_the_base_s_to_the_bit(model: PreTrainedModel, tables: SlotTables) -> None:
    group = [n for n, d in attached(model).items() if not isinstance(d.method, VIRTUAL) and n != "oft"][:5]
    for name in group:
        tables.put(name)
    with route(model, None):
        bare = answer(model, IDS)
    with tables.routed([*group, None, None]):
        assert torch.equal(answer(model, IDS)[5:], bare[5:])


def test_one_index_serves_any_mixture_and_what_is_cached_is_not_put_in_again(
    model: PreTrainedModel, tables: SlotTables
) -> None:
    names = ["lora", "bitfit", "ln", "prompt", "prefix"]
    slots = [tables.put(name) for name in names]
    index = torch.zeros(7, dtype=torch.int64)
    with tables.routed(None, index, cached=True):
        with route(model, None):
            bare = answer(model, IDS)
        assert torch.equal(answer(model, IDS)[3:], bare[3:])
        index[:3] = torch.tensor(slots[:3])
        index[3:5] = torch.tensor(slots[3:])
        found = answer(model, IDS)
    with route(model, [*names[:3], None, None, None, None]):
        expected = answer(model, IDS)
    assert float((found - expected).abs().max()) < 1e-5


def test_rows_of_some_kinds_read_these_alone_and_tables_of_all_are_there_again_after(
    model: PreTrainedModel, tables: SlotTables
) -> None:
    slots = {name: tables.put(name) for name in ("lora", "bitfit")}
    rows = ["lora", None, "lora", "lora", None, None, "lora"]
    index = tables.index_of(rows)
    with route(model, rows):
        expected = answer(model, IDS)
    both = TableRoute(None, torch.full((7,), slots["bitfit"]), cached=True)
    with tables.along(both):
        offsets = answer(model, IDS)
        with tables.along(TableRoute(None, index, cached=True), tables.kinds_of(rows)):
            assert torch.allclose(answer(model, IDS), expected, atol=1e-5)
        assert torch.equal(answer(model, IDS), offsets)
    with tables.along(both, tables.kinds_of(["lora"])), route(model, None):
        bare = answer(model, IDS)
    with tables.along(both, tables.kinds_of(["lora"])):
        assert torch.equal(answer(model, IDS), bare)


def test_a_slot_is_filled_once_and_kept_until_it_is_needed(model: PreTrainedModel, tables: SlotTables) -> None:
    first = tables.put("lora")
    version = tables.version
    assert tables.put("lora") == first
    tables.take("lora")
    tables.take("lora")
    with pytest.raises(ConfigError, match="no slot that is used"):
        tables.take("lora")
    for name in ("lora-3", "lora-pissa", "lora-some", "bitfit"):
        tables.put(name)
    assert tables.put("lora") == first
    with pytest.raises(ConfigError, match="all 5 slots are in use"):
        tables.put("ia3")
    tables.take("bitfit")
    assert tables.put("ia3") not in (0, first)
    assert tables.version > version
    assert tables.put(None) == 0


def test_only_a_larger_rank_or_another_kind_makes_tables_anew(model: PreTrainedModel, tables: SlotTables) -> None:
    tables.put("lora")
    before, size = tables.version, tables.nbytes
    tables.put("lora-3")
    assert (tables.version, tables.nbytes) == (before, size)
    tables.put("lora-9")
    assert tables.version > before
    assert tables.nbytes == 4 * size  # a rank of 16 in place of 4


def test_a_delta_in_use_is_not_detached_and_another_of_its_name_is_written_anew() -> None:
    model = llama().eval()
    move(attach(model, LoRA(r=2), "a"), 0.1)
    tables = SlotTables(model, 2)
    tables.put("a")
    with pytest.raises(ConfigError, match="in use"):
        detach(model, "a")
    tables.take("a")
    attach(model, LoRA(r=2), "b")
    detach(model, "a")
    move(attach(model, LNTuning(), "a"), 0.1)
    slot = tables.put("a")
    with route(model, "a"):
        expected = answer(model, IDS)
    with tables.routed(["a"] * 7, torch.full((7,), slot)):
        assert torch.allclose(answer(model, IDS), expected, atol=1e-5)
    del tables
    gc.collect()
    detach(model, "a")  # nobody uses it any more


def test_what_cannot_be_in_tables_is_said_with_its_reason() -> None:
    model = mixtral().eval()
    attach(model, LoRA(r=2, target_parameters="all-experts"), "experts")
    attach(model, LoRA(r=2, target_modules=["q_proj"]), "attention")
    tables = SlotTables(model, 2)
    assert tables.why_not("attention") is None
    reason = tables.why_not("experts")
    assert reason is not None
    assert "changes a parameter itself" in reason
    with pytest.raises(ConfigError, match="in a batch of their own"):
        tables.put("experts")
    with pytest.raises(ConfigError, match="no delta 'nobody'"):
        tables.why_not("nobody")
    with pytest.raises(ConfigError, match="needs the names of its rows"), tables.routed(None):
        pass
    with pytest.raises(ConfigError, match="nothing to keep in tables"):
        SlotTables(llama(), 2)


def test_tables_of_a_base_in_bfloat16_hold_matrices_in_its_type_and_vectors_in_float32() -> None:
    model = llama().eval().to(torch.bfloat16)
    move(attach(model, LoRA(r=4), "a"), 0.1)
    move(attach(model, CASES["bitfit"], "b"), 0.1)
    tables = SlotTables(model, 2)
    tables.put("a")
    tables.put("b")
    with route(model, ["a", "b"]):
        expected = answer(model, IDS[:2])
    with tables.routed(["a", "b"]):
        assert torch.allclose(answer(model, IDS[:2]), expected, atol=3e-2)
    matrices = sum(p.numel() for _, m in attached(model)["a"].sites for p in m.parameters())
    vectors = sum(p.numel() for _, m in attached(model)["b"].sites for p in m.parameters())
    assert tables.nbytes == 3 * (2 * matrices + 4 * vectors)


def test_two_owners_of_tables_are_told_apart(model: PreTrainedModel, tables: SlotTables) -> None:
    other = SlotTables(model, 1)
    tables.put("lora")
    other.put("bitfit")
    with tables.routed(["lora"] * 7):
        expected = answer(model, IDS)
        with pytest.raises(ConfigError, match="other tables"), other.routed(["bitfit"] * 7):
            pass
    with other.routed(["bitfit"] * 7):
        answer(model, IDS)
    with tables.routed(["lora"] * 7):
        assert torch.equal(answer(model, IDS), expected)
    other.close()


def test_a_module_whose_rows_cannot_be_told_apart_is_refused(model: PreTrainedModel, tables: SlotTables) -> None:
    tables.put("lora")
    linear = next(m for n, m in model.named_modules() if n.endswith(("q_proj", "c_attn")) and isinstance(m, nn.Module))
    features = 32
    with tables.routed(["lora"] * 7), pytest.raises(ConfigError, match="cannot be told apart"):
        linear(torch.zeros(3, 2, features))


def test_a_copy_of_a_model_that_reads_tables_begins_without_them(model: PreTrainedModel, tables: SlotTables) -> None:
    tables.put("lora")
    with tables.routed(["lora"] * 7):
        expected = answer(model, IDS)
        copied = copy.deepcopy(model)
    other = SlotTables(copied, 1)
    other.put("lora")
    with other.routed(["lora"] * 7):
        assert torch.allclose(answer(copied, IDS), expected, atol=1e-5)
