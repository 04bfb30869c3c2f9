"""Fingerprints: other bases are told apart by what differs, and the same base is known again in any form."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.coverage.bases import make
from benchmarks.fingerprints import CHANGES, Tally, print_of, same_again, tell_apart
from torch import nn
from transformers import AutoModelForSequenceClassification

from spectune.deltas import attach
from spectune.families import compare_bases, differences
from spectune.families.weight_digest import RANGE, WHOLE, columns_read, digest, sampled, tail_begins
from spectune.methods import LoRA
from spectune.storage.base_precision import KINDS


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of one process, for sharding."""
    store = tmp_path_factory.mktemp("store") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def base() -> Any:
    return make("llama")


def changed(base: Any, path: str, rows: Any = slice(None), by: float = 0.5) -> Any:
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.get_parameter(path)[rows] += by
    return other


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt2"])
def test_bases_are_told_apart_and_known_again(model_type: str) -> None:
    """A part of benchmarks/fingerprints.py, which has 264 pairs of the one kind and 100 of the other."""
    apart, same, model = Tally(), Tally(), make(model_type)
    tell_apart(model, model_type, apart, ("bfloat16",), seed=1)
    same_again(model, model_type, same)
    assert apart.total == len(CHANGES)
    assert same.total >= 8
    assert not any(apart.wrong.values()), apart.wrong
    assert not any(same.wrong.values()), same.wrong


def test_what_differs_is_named_by_part_and_the_rest_is_said_to_be_equal(base: Any) -> None:
    before = print_of(base)
    layer = "model.layers.0"
    found = differences(before, print_of(changed(base, f"{layer}.self_attn.q_proj.weight")))
    assert found == [f"1 of 21 linears differ: {layer}.self_attn.q_proj", "equal: embeddings, norms, head"]
    found = differences(before, print_of(changed(base, f"{layer}.input_layernorm.weight", 3, by=0.01)))
    assert found[0] == f"1 of 7 norms differ: {layer}.input_layernorm"
    found = differences(before, print_of(changed(base, "model.embed_tokens.weight", [3, 5, 6])))
    assert found[0] == "rows 3, 5 to 6 of the 128 of model.embed_tokens differ, the others are equal"
    other = differences(before, print_of(make("gpt2")))
    assert other[0] == (
        "the base's parts differ: it was trained on a llama base with other names or shapes, this is a gpt2 base"
    )
    assert other[1].startswith("missing here: model.embed_tokens.weight")


def test_one_number_that_only_float32_can_hold_is_seen_where_both_hold_it(base: Any) -> None:
    """Of norms that are all ones, of which bfloat16's rounding would leave nothing else."""
    ones = copy.deepcopy(base)
    nn.init.ones_(ones.model.norm.weight)
    other = changed(ones, "model.norm.weight", 7, by=1e-5)
    assert differences(print_of(ones), print_of(other)) == [
        "1 of 7 norms differ: model.norm", "equal: embeddings, linears, head"
    ]  # fmt: skip
    # and what bfloat16 cannot hold is no difference to a bfloat16 copy
    assert differences(print_of(ones), print_of(other.to(torch.bfloat16))) == []


def test_a_float16_copy_and_a_bfloat16_copy_of_float32_weights_are_one_base(base: Any) -> None:
    """Neither can be rounded to the other: they are compared by sketches."""
    half, brain = copy.deepcopy(base).half(), copy.deepcopy(base).bfloat16()
    assert differences(print_of(half), print_of(brain)) == []
    other = changed(base, "model.layers.1.mlp.up_proj.weight", 4).bfloat16()
    assert differences(print_of(half), print_of(other))[0] == "1 of 21 linears differ: model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("rows", [97, 1024, 1300])
def test_added_rows_are_told_from_changed_ones(rows: int) -> None:
    """At and around the borders of ranges of rows, whichever of the two has more."""
    table = torch.randn(rows + 700, 8)
    base = {"model_type": "x", "decoder": "model"}

    def of(count: int, change: int | None = None, own: bool = False) -> dict[str, Any]:
        weight = table[:count].clone()
        if own:
            weight[rows:].normal_()
        if change is not None:
            weight[change] += 1
        part = {"kind": "embeddings", "shape": list(weight.shape), "stored_as": "float32"}
        return base | {"parts": {"e.weight": part | digest(weight, table=True).as_dict()}}

    for more in (1, 3, 200):
        found = compare_bases(of(rows), of(rows + more))
        assert (found.changed, found.unread) == ([], [])
        assert found.added == [f"e has {more} rows more than the {rows} that were there, which are equal"]
        assert "are missing" in compare_bases(of(rows + more), of(rows)).changed[0]
        [line, *_] = compare_bases(of(rows), of(rows + more, change=rows - 1)).changed
        assert line.startswith(f"row {rows - 1} of the {rows} of e differ")
        last = f"row {rows}" if more == 1 else f"rows {rows} to {rows + more - 1}"
        [line] = compare_bases(of(rows + more), of(rows + more, own=True)).changed
        assert line.startswith(f"{last} of the {rows + more} of e differ, the others are equal (rows that are added")
    far = compare_bases(of(rows), of(rows + 700))
    assert far.changed == []
    assert far.added
    assert bool(far.unread) == bool(rows % RANGE)  # rows whose range has other rows now, and too far from the end


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_codes_are_sampled_before_they_are_decoded(precision: str) -> None:
    linear = KINDS[precision](torch.randn(1024, 208), None)
    whole = digest(linear.dequantised())
    assert digest(linear.weight, scale=linear.weight_scale) == whole


def test_every_row_and_every_column_of_a_large_matrix_is_read() -> None:
    for rows, columns in ((4096, 1024), (1000, 999), (60, 4000)):
        assert rows * columns > WHOLE
        width = columns_read(rows, columns)
        marks = torch.arange(rows * columns, dtype=torch.float64).view(rows, columns)
        found = sampled(marks, width)
        assert torch.equal(found, sampled(marks.T.contiguous().T, width))  # GPT-2's weights are transposed
        assert torch.equal((found // columns).long(), torch.arange(rows)[:, None].expand(rows, width))
        if rows * width >= 2 * columns:
            assert len((found % columns).unique()) == columns


def test_a_table_ends_with_rows_that_are_known_one_by_one() -> None:
    for rows in (1, RANGE - 1, RANGE, RANGE + 1, 3 * RANGE, 5 * RANGE + 9):
        found = digest(torch.randn(rows, 4), table=True)
        assert len(found.digests) == -(-rows // RANGE)
        assert len(found.tail) == rows - tail_begins(rows)
        assert min(rows, RANGE) <= len(found.tail) < 2 * RANGE


def test_zeros_have_no_sign_and_weights_that_are_not_finite_have_a_fingerprint() -> None:
    assert digest(torch.zeros(2, 3)) == digest(-torch.zeros(2, 3))
    tiny = torch.full((2, 3), -1e-9)  # rounds to zero in float16
    assert digest(tiny).digests[0].split()[2] == digest(torch.zeros(2, 3)).digests[0].split()[2]
    json.dumps(digest(torch.tensor([[float("nan"), float("inf")]])).as_dict(), allow_nan=False)


def test_deltas_and_heads_of_tasks_are_no_part_of_the_base(base: Any, tmp_path: Path) -> None:
    before = print_of(base)
    other = copy.deepcopy(base)
    attach(other, LoRA(r=2), "a.b")
    other.v_head = nn.Linear(32, 1)
    assert print_of(other) == before
    base.save_pretrained(tmp_path)
    heads = [AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=n) for n in (2, 3)]
    assert differences(print_of(heads[0]), print_of(heads[1])) == []
    assert differences(before, print_of(heads[0])) == []


def test_what_cannot_be_read_is_said(base: Any) -> None:
    offloaded = copy.deepcopy(base)
    offloaded.model.layers[0].mlp.up_proj.to("meta")
    found = compare_bases(print_of(base), print_of(offloaded))
    assert found.changed == []
    assert found.unread == [
        "model.layers.0.mlp.up_proj: on no device, or in an encoding that is not known here"
    ]  # fmt: skip
